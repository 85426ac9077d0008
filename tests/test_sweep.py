"""Sweeps: their points against Hydra's own sweeper, their table by imagined cards, and the command on a real job."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import run
from launcher.config import load_job
from launcher.errors import ConfigError
from launcher.explanation import SweepPoint
from launcher.job import Engine, PlannerSpec
from launcher.plan import Grade
from launcher.planner.cards import on_card
from launcher.planner.search import search
from launcher.report.sweep import sweep_document, sweep_text
from launcher.sweep import sweep_points
from tests.imagined import FakeForecaster, Law, job_with
from tests.tiny_job import write_tiny_model

JOB = job_with(10**9, PlannerSpec(headroom=0.0))
CARD = on_card(JOB, search(JOB, FakeForecaster(Law())))


def test_the_issue_is_four_points_in_hydras_order() -> None:
    words = ["recipe=llama_lora", "hardware=a100_40g,h100_80g", "max_length=2048,8192", "action=plan"]
    points = sweep_points(["-m", *words])
    assert [(point.job.hardware.name, point.job.data.max_length) for point in points] == [
        ("a100_40g", 2048), ("a100_40g", 8192), ("h100_80g", 2048), ("h100_80g", 8192),
    ]  # fmt: skip
    assert points[1].swept == (("hardware", "a100_40g"), ("data.max_length", "8192"))
    alone = load_job(["recipe=llama_lora", "hardware=a100_40g", "data.max_length=8192", "action=plan"])
    assert points[1].job == alone
    assert [point.job for point in sweep_points([*words, "--multirun"])] == [point.job for point in points]


@pytest.mark.parametrize(
    "words",
    [
        ["method=lora,qlora", "method.rank=8,16", "data.max_length=512"],
        ["training.global_batch_size=range(4,9,step=4)", "method=choice(full,lora)"],
        ["planner.choices.max_length=[64,32],[128]", "data.path='a,b.jsonl'"],
        ["data.max_length=64,128", "data.max_length=256"],
        ["method.rank=sort(8,2,4)", "training.learning_rate=1e-4"],
    ],
)
def test_points_are_those_of_hydras_sweeper(words: list[str]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    base = ["recipe=smollm_lora", "action=plan", "hardware=a100_40g"]
    overrides = OverridesParser.create().parse_overrides([*base, *words])
    (theirs,) = BasicSweeper.split_arguments(overrides, None)
    assert [point.job for point in sweep_points(["-m", *base, *words])] == [
        load_job(point) for point in theirs
    ]


def test_a_pattern_takes_the_choices_of_a_group() -> None:
    points = sweep_points(["-m", "hardware=glob(a100*)", "action=plan"])
    assert [point.job.hardware.name for point in points] == ["a100_40g", "a100_80g"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=a100_40g,h100_80g"], "action=run with -m"),
        (["hardware=a100_40g,h100", "action=plan"], "did you mean `h100_80g`"),
        (["hardware=[a100_40g,h100_80g]", "action=plan"], "without brackets"),
        (["hardware=any", "action=plan"], "without brackets"),
        (
            ["hardware.num_devices=[1,2]", "action=plan"],
            r"counts are .* `hardware\.num_devices=<one>,<other>`",
        ),
        (["action=plan,run"], "a sweep has one action"),
        (["action=plan", "output=text,json"], "a sweep has one output"),
        (["action=plan", "method.rank=interval(1,8)"], "an interval has no end"),
        (["action=plan", "hardware=glob(nothing*)"], "matches nothing"),
        (["action=plan", "cutoff_len=64,128"], "here it is `data.max_length`"),
        (["action=plan", "method.rank=0,8"], "method.rank=0"),
    ],
)
def test_what_can_not_be_swept_is_said(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep_points(["-m", "recipe=smollm_lora", *words])


def test_a_short_spelling_is_a_sweeps_alone() -> None:
    with pytest.raises(ConfigError, match=r"here it is `data\.max_length`"):
        load_job(["max_length=2048"])
    with pytest.raises(ConfigError, match="-m"):
        load_job(["data.max_length=2048,8192"])


def points_of(*swept: tuple[tuple[str, str], ...]) -> list[SweepPoint]:
    points = [SweepPoint(item, replace(CARD, tokens_per_second=100.0 * n)) for n, item in enumerate(swept, 1)]
    return [*points[:-1], replace(points[-1], card=replace(CARD, plan=None, reason="too small by far"))]


def test_the_table_has_every_point_and_fits_a_terminal() -> None:
    short = points_of(
        *[(("hardware", name), ("data.max_length", "64")) for name in ("l4_24g", "t4_16g", "v100")]
    )
    text = sweep_text(short)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["hardware", "max_length", "plan"]
    assert [line.split()[0] for line in lines[1:4]] == ["l4_24g", "t4_16g", "v100"]
    assert "no plan" in lines[3] and "- hardware=v100 data.max_length=64: too small by far" in text
    noted = [replace(short[0], note="length 64: no token is lost"), *short[1:]]
    assert "- hardware=l4_24g data.max_length=64: length 64: no token is lost" in sweep_text(noted)
    assert "fastest   hardware=t4_16g data.max_length=64: 200 tokens/s" in text
    long = points_of(*[(("data.path", f"{name * 30}.jsonl"), ("method", "lora")) for name in "abc"])
    assert max(map(len, sweep_text(long).splitlines())) <= 80
    assert f"1 data.path={'a' * 30}.jsonl method=lora" in " ".join(sweep_text(long).split())
    document = json.loads(json.dumps(sweep_document(short, [{"feasible": True}, {}, {"feasible": False}])))
    assert document["points"][2] == {
        "overrides": {"hardware": "v100", "data.max_length": "64"},
        "feasible": False,
    }


def test_the_table_names_engines_and_fits_a_terminal() -> None:
    assert CARD.plan is not None
    sharded = replace(
        CARD.plan,
        engine=Engine.DEEPSPEED,
        zero_stage=3,
        num_devices=8,
        offload_optimizer=True,
        offload_parameters=True,
    )
    cards = [
        replace(CARD, num_devices=8, plan=plan, tokens_per_second=1234567.0, grade=Grade.COMFORTABLE)
        for plan in (sharded, replace(CARD.plan, engine=Engine.DDP, num_devices=8))
    ]
    for swept in (("hardware.num_devices", "8"), ("data.path", f"{'a' * 30}.jsonl")):
        text = sweep_text([SweepPoint((swept,), card) for card in cards])
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        words = " ".join(line[:40] for line in lines).split()
        assert words.count("ZeRO") == 1 and words.count("DDP") == 1 and words.count("offloaded") == 1
        assert text.count("comfortable") == text.count("1,234,567  comfortable") == 2


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "-m", *words], capture_output=True, text=True, check=False,
        cwd=folder, timeout=600,
    )  # fmt: skip


def test_a_real_job_is_swept_and_what_does_not_fit_is_shown(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    words = [
        f"model.path={tmp_path}", "hardware=cpu", "training.precision=fp32", "method=full,lora", "max_length=64,96",
        "training.global_batch_size=1", "data=file", "data.path=train.jsonl", "data.packing=true",
        "planner.pin.activation_checkpointing=none", "action=plan", "output=json",
    ]  # fmt: skip
    child = command(tmp_path, *words, "hardware.memory_bytes=4294967296")
    assert child.returncode == 0, child.stderr
    points: list[dict[str, Any]] = json.loads(child.stdout)["points"]
    assert [point["overrides"] for point in points] == [
        {"method": method, "data.max_length": length}
        for method in ("full", "lora")
        for length in ("64", "96")
    ]
    assert all(point["feasible"] for point in points)
    peaks = {
        (p["plan"]["method"], p["plan"]["max_length"]): p["predicted"]["peak_device_bytes"] for p in points
    }
    assert peaks["full", 64] < peaks["full", 96] and peaks["lora", 64] < peaks["lora", 96]
    memory = sorted(peaks.values())[1]
    child = command(tmp_path, *words[:-1], f"hardware.memory_bytes={memory}", "planner.headroom=0")
    assert child.returncode == 0, child.stderr
    rows = [line.split() for line in child.stdout.splitlines()[1:5]]
    assert {(row[0], int(row[1])): row[2] != "no" for row in rows} == {
        point: peak <= memory for point, peak in peaks.items()
    }
    child = command(tmp_path, *words, "hardware.memory_bytes=1000000")
    assert child.returncode == 3
    document = json.loads(child.stdout)
    assert [point["feasible"] for point in document["points"]] == [False] * 4


def test_a_sweep_only_plans(tmp_path: Path) -> None:
    child = command(tmp_path, "hardware=a100_40g,h100_80g")
    assert child.returncode == 2 and "action=run with -m" in child.stderr
    assert run(["-m", "hardware=a100_40g,h100_80g", "action=plan", "report=html"]) == 2
