"""Devices compared for one job: by figures worked by hand, by their syntax, and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import ListedHardware, group_choices, listed_hardware, load_job
from launcher.errors import ConfigError
from launcher.explanation import OnCard
from launcher.job import PlannerSpec
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


def test_lists_of_devices_are_read() -> None:
    plain = ("recipe=llama_lora", "hardware=a100_40g")
    assert listed_hardware(plain) == ListedHardware(others=plain)
    found = listed_hardware(["hardware=[l4_24g, t4_16g,l4_24g]", "action=plan"])
    assert found == ListedHardware(("l4_24g", "t4_16g"), ("action=plan",))
    every = listed_hardware(["hardware=any"])
    assert set(every.names) == set(group_choices("hardware")) - {"cpu", "auto"} and not every.mistakes


@pytest.mark.parametrize("words", ["hardware=[l4_24g,nothing]", "hardware=[cpu]", "hardware=[]"])
def test_devices_that_can_not_be_compared_are_named(words: str) -> None:
    (mistake,) = listed_hardware([words]).mistakes
    assert words in mistake and "lists of a100_40g" in mistake


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        capture_output=True, text=True, check=False, cwd=folder, timeout=900,
    )  # fmt: skip


def test_several_devices_are_only_planned_for(tmp_path: Path) -> None:
    child = command("hardware=[l4_24g,t4_16g]", folder=tmp_path)
    assert child.returncode == 2
    assert "action=run with several devices" in child.stderr


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
