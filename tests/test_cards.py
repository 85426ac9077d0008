"""Devices compared for one job: by figures worked by hand, by their syntax, and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cli import run
from launcher.comparison import ListedHardware, compared_jobs, listed_hardware
from launcher.config import group_choices, load_job
from launcher.errors import ConfigError
from launcher.explanation import OnCard
from launcher.job import Engine, PlannerSpec
from launcher.plan import Grade
from launcher.planner.cards import cheapest, on_card, ranked
from launcher.planner.search import search
from launcher.report.cards import cards_document, cards_text
from tests.imagined import FakeForecaster, Law, job_with

LAW = Law()
JOB = replace(job_with(10**9), planner=PlannerSpec(headroom=0.0, prices={"imagined": 3.6}))
CARD = on_card(JOB, search(JOB, FakeForecaster(LAW)))
CARDS = (
    replace(CARD, hardware="slow", tokens_per_second=100.0, dollars_per_million_tokens=1.0),
    replace(CARD, hardware="fast", tokens_per_second=200.0, dollars_per_million_tokens=2.0),
    replace(CARD, hardware="none", plan=None, reason="too small"),
    replace(CARD, hardware="worse", position=1, tokens_per_second=900.0, dollars_per_million_tokens=0.1),
)


def named(cards: tuple[OnCard, ...]) -> list[str]:
    return [card.hardware for card in cards]


def test_a_token_costs_what_the_hour_costs_over_its_tokens() -> None:
    assert CARD.tokens_per_second is not None
    # 3.6 dollars per hour are a thousandth per second
    assert CARD.dollars_per_million_tokens == pytest.approx(1000.0 / CARD.tokens_per_second)
    several = replace(JOB, hardware=replace(JOB.hardware, num_devices=2))
    choice = search(JOB, FakeForecaster(LAW))
    both = on_card(several, choice)
    assert both.tokens_per_second == pytest.approx(2 * CARD.tokens_per_second)
    assert both.dollars_per_million_tokens == pytest.approx(CARD.dollars_per_million_tokens)
    assert on_card(replace(JOB, planner=PlannerSpec()), choice).dollars_per_million_tokens is None


def test_the_jobs_own_order_comes_before_speed_and_speed_before_price() -> None:
    assert named(ranked(CARDS)) == ["fast", "slow", "worse", "none"]
    best = cheapest(ranked(CARDS))
    assert best is not None and best.hardware == "slow"
    unpriced = tuple(replace(card, dollars_per_million_tokens=None) for card in CARDS)
    assert cheapest(unpriced) is None


def test_the_table_fits_a_terminal_and_names_the_best() -> None:
    cards = ranked(tuple(replace(card, grade=Grade.COMFORTABLE) for card in CARDS))
    text = cards_text(cards, cheapest(cards))
    assert "none: too small" in text
    words = " ".join(text.split())
    assert (
        "fast is the fastest of those that get the job's best choice, and slow the cheapest: $1.00" in words
    )
    assert "planner.prices={fast: <dollars per hour>, ...}" in cards_text(cards, None)
    document = json.loads(json.dumps(cards_document(cards, cheapest(cards))))
    assert (document["best"], document["cheapest"]) == ("fast", "slow")
    assert [item["hardware"] for item in document["devices"]] == ["fast", "slow", "worse", "none"]
    nothing = cards_document(ranked(CARDS[2:3]), None)
    assert nothing["best"] is None


LARGE = tuple(
    replace(
        CARD,
        hardware=name,
        num_devices=nodes * 16,
        num_nodes=nodes,
        plan=replace(
            CARD.plan,
            engine=engine,
            zero_stage=stage,
            num_devices=16,
            num_nodes=nodes,
            offload_optimizer=engine is Engine.DEEPSPEED,
            offload_parameters=engine is Engine.DEEPSPEED,
            micro_batch_size=16,
            max_length=131072,
        ),
        peak_device_bytes=180 * 2**30,
        capacity_bytes=191 * 2**30,
        tokens_per_second=123456.0 * nodes,
        dollars_per_million_tokens=123.45,
        grade=Grade.COMFORTABLE,
    )
    for name in group_choices("hardware")
    for engine, stage in ((Engine.DDP, 0), (Engine.DEEPSPEED, 3), (Engine.FSDP2, 3))
    for nodes in (1, 2)
    if CARD.plan is not None
)
"""Every device of the catalogue with figures as wide as they get, under every engine."""


def test_the_widest_names_figures_and_engines_are_all_there_in_80_columns() -> None:
    text = cards_text(LARGE, LARGE[0])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["device", "tokens/s", "/device", "$/M", "peak", "of", "grade"]
    for card in LARGE:
        name = f"{'2x' * (card.num_nodes == 2)}16x {card.hardware}"
        rows = [number for number, line in enumerate(lines) if line.startswith(f"{name} ")]
        assert len(rows) == 3
        figures = ["246,912" if card.num_nodes == 2 else "123,456", "7,716", "123.45"]
        for row in rows:
            assert lines[row].split()[2:] == [*figures, "180.0", "GiB", "191.0", "GiB", "comfortable"]
    words = " ".join(text.split())
    assert text.isascii()
    assert words.count("ZeRO stage 3, optimizer states and parameters offloaded") == len(LARGE) / 3
    assert words.count(", DDP") == words.count(", FSDP2") == len(LARGE) / 3
    named = tuple(replace(card, hardware="a_name_of_my_own" * 4) for card in LARGE[:6])
    lines = cards_text(named, named[0]).splitlines()
    assert max(map(len, lines)) <= 80 and lines[1] == f"16x {'a_name_of_my_own' * 4}"


def test_one_of_each_has_no_counts_and_no_column_without_figures() -> None:
    unpriced = tuple(replace(card, dollars_per_million_tokens=None) for card in ranked(CARDS))
    lines = cards_text(unpriced, None).splitlines()
    assert lines[0].split() == ["device", "tokens/s", "peak", "of"]
    assert [line.split()[:2] for line in lines[1:7:2]] == [["fast", "200"], ["slow", "100"], ["worse", "900"]]
    one_and_two = (CARDS[0], replace(CARDS[0], num_devices=2, tokens_per_second=180.0))
    lines = cards_text(ranked(one_and_two), None).splitlines()
    assert lines[1].startswith("2x slow") and lines[1].split()[2:4] == ["180", "90"]
    assert lines[3].startswith("1x slow") and lines[3].split()[2:4] == ["100", "100"]


def test_the_best_by_time_and_by_price_is_named_once_if_it_is_the_same() -> None:
    def told(*cards: OnCard) -> str:
        best_first = ranked(cards)
        words = cards_text(best_first, cheapest(best_first))
        return " ".join(words.split("best ", 1)[1].split())

    fast, slow = CARDS[1], CARDS[0]
    both = replace(fast, dollars_per_million_tokens=0.5)
    assert told(both, slow) == "fast is the fastest that fits, and the cheapest: $0.50 per million tokens"
    eight = replace(slow, num_devices=8, tokens_per_second=700.0, dollars_per_million_tokens=1.2)
    assert told(slow, eight) == (
        "8x slow is the fastest that fits, and 1x slow the cheapest: $1.00 per million tokens"
    )
    unpriced = replace(fast, dollars_per_million_tokens=None)
    assert told(unpriced, slow).endswith(
        "and slow the cheapest of those with a price: $1.00 per million tokens"
    )
    assert told(slow, CARDS[2]) == "slow is the only one that fits: $1.00 per million tokens"
    assert told(slow, CARDS[3]).startswith("slow is the only one that gets the best choice of the job: $1.00")
    nobody_knows = replace(slow, tokens_per_second=None, dollars_per_million_tokens=None)
    assert told(nobody_knows) == "slow gets the job's best choice; how fast it is nobody knows"


def test_a_document_counts_devices_and_nodes() -> None:
    eight = replace(CARDS[0], num_devices=16, num_nodes=2, tokens_per_second=1600.0)
    document = json.loads(json.dumps(cards_document((eight, *CARDS[:1]), CARDS[0])))
    first, second = document["devices"]
    assert (first["num_devices"], first["num_nodes"]) == (16, 2)
    assert (first["tokens_per_second"], first["tokens_per_second_per_device"]) == (1600.0, 100.0)
    assert (second["num_devices"], second["num_nodes"]) == (1, 1)
    assert (document["best"], document["best_index"]) == ("slow", 0)
    assert (document["cheapest"], document["cheapest_index"]) == ("slow", 1)


def test_lists_of_devices_are_read() -> None:
    plain = ("recipe=llama_lora", "hardware=a100_40g")
    assert listed_hardware(plain) == ListedHardware(others=plain)
    found = listed_hardware(["hardware=[l4_24g, t4_16g,l4_24g]", "action=plan"])
    assert found == ListedHardware(("l4_24g", "t4_16g"), others=("action=plan",))
    every = listed_hardware(["hardware=any"])
    assert set(every.names) == set(group_choices("hardware")) - {"cpu", "auto"} and not every.mistakes


def test_lists_of_counts_are_read_beside_one_device_and_beside_several() -> None:
    found = listed_hardware(
        ["hardware.num_devices=[1, 2,8]", "hardware=a100_80g", "hardware.num_nodes=[1,2]"]
    )
    assert found.is_comparison and (found.num_devices, found.num_nodes) == ((1, 2, 8), (1, 2))
    assert found.points() == [
        ["hardware=a100_80g", f"hardware.num_nodes={nodes}", f"hardware.num_devices={devices}"]
        for nodes in (1, 2)
        for devices in (1, 2, 8)
    ]
    several = listed_hardware(["hardware=[l4_24g,t4_16g]", "hardware.num_devices=[1,4]"])
    assert several.points() == [
        [f"hardware={name}", f"hardware.num_devices={count}"]
        for name in ("l4_24g", "t4_16g")
        for count in (1, 4)
    ]
    plain = ("hardware=a100_40g", "hardware.num_devices=4")
    assert not listed_hardware(plain).is_comparison and listed_hardware(plain).points() == [list(plain)]
    # as elsewhere, the last one counts
    last = listed_hardware(
        ["hardware.num_devices=[1,2]", "hardware.num_devices=[4]", "hardware.num_nodes=[2]"]
    )
    assert (last.num_devices, last.others) == ((4,), ())
    assert not listed_hardware(["hardware.num_devices=[1,2]", "hardware.num_devices=4"]).is_comparison


def test_each_point_is_the_job_that_its_own_command_line_describes() -> None:
    words = ["recipe=llama_full", "action=plan", "hardware=[a100_80g,h100_80g]", "hardware.num_devices=[1,8]"]
    found = listed_hardware(words)
    assert compared_jobs(found) == [load_job(point) for point in found.points()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("hardware=[l4_24g,nothing]", "nothing can't be compared"),
        ("hardware=[cpu]", "cpu can't be compared"),
        ("hardware=[h100,l4_24g]", "did you mean `h100_80g`?"),
        ("hardware=[]", "lists no device"),
        ("hardware=[l4_24g,]", "can't be read as a list"),
    ],
)
def test_devices_that_can_not_be_compared_are_named(words: str, said: str) -> None:
    (mistake,) = listed_hardware([words]).mistakes
    assert words in mistake and "legal are any, and lists of a100_40g" in mistake and said in mistake


@pytest.mark.parametrize("key", ["hardware.num_devices", "hardware.num_nodes"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("[0,2]", "0 can't be a count"),
        ("[1,two,-3]", "two, -3 can't be a count"),
        ("[true,2.0]", "true, 2.0 can't be a count"),
        ("[[1],99999999999999999999]", "[1], 99999999999999999999 can't be a count"),
        ("[4,1,4]", "4 is there twice"),
        ("[]", "lists no count"),
        ("[1,2", "can't be read as a list"),
    ],
)
def test_counts_that_are_none_are_named(key: str, values: str, said: str) -> None:
    (mistake,) = listed_hardware([f"{key}={values}"]).mistakes
    assert f"`{key}={values}`" in mistake and said in mistake
    assert "legal are whole numbers from 1 on, each once" in mistake and f"`{key}=[1,2,4,8]`" in mistake


def test_all_mistakes_of_lists_and_job_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    words = "hardware=[a100_40g,nope] hardware.num_devices=[0,2] colour=red action=plan"
    assert run(words.split()) == 2
    told = capsys.readouterr()
    assert (
        told.out == ""
        and "3 mistakes:\n" in told.err
        and told.err.count("\n- ") == 3
        and "hint: " in told.err
    )
    for part in (
        "nope can't be compared",
        "0 can't be a count",
        "key `colour`",
    ):
        assert part in told.err


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        capture_output=True, text=True, check=False, cwd=folder, timeout=900,
    )  # fmt: skip


def test_several_devices_are_only_planned_for(tmp_path: Path) -> None:
    child = command("hardware=[l4_24g,t4_16g]", folder=tmp_path)
    assert child.returncode == 2
    assert "action=run with several devices" in child.stderr


def test_counts_that_a_job_can_not_be_split_over_are_listed_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "recipe=smollm_lora hardware=a100_40g hardware.num_devices=[3,8] action=plan"
    assert run(words.split()) == 3
    told = " ".join(capsys.readouterr().out.split())
    for count in (3, 8):
        assert (
            f"- {count}x a100_40g: training.global_batch_size=4 can't be split over {count} devices" in told
        )


def test_a_price_of_an_unknown_device_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="did you mean `l4_24g`"):
        load_job(["planner.prices.l4_42g=0.8"])
    assert load_job(["planner.prices={l4_24g: 0.8, t4_16g: 0.4}"]).planner.prices == {
        "l4_24g": 0.8,
        "t4_16g": 0.4,
    }


@pytest.mark.thorough
def test_a_real_job_is_compared_by_the_command(tmp_path: Path) -> None:
    child = command(
        "recipe=smollm_lora", "hardware=[v100_16g,l4_24g]", "planner.prices={l4_24g: 0.8}",
        "planner.pin.micro_batch_size=2", "action=plan", "output=json", folder=tmp_path,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    document = json.loads(child.stdout)
    found = {item["hardware"]: item for item in document["devices"]}
    assert set(found) == {"v100_16g", "l4_24g"}
    for item in found.values():
        assert item["plan"]["micro_batch_size"] == 2
        assert 0 < item["peak_device_bytes"] < item["capacity_bytes"]
        assert item["tokens_per_second"] > 0
    assert document["cheapest"] == "l4_24g"
    assert found["v100_16g"]["dollars_per_million_tokens"] is None
