"""Past runs: filtered, exported, compared, and checked against today's predictions."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load_job
from launcher.documents import write_document
from launcher.errors import ConfigError, LaunchError, PeakMoved
from launcher.history import report_answer
from launcher.memory import MeasuredPhase, MemoryMeasurement, Phase, StepShape
from launcher.planning import find_plan, resolve
from launcher.run.ledger import write_record
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, Status, WorkerOrder, WorkerOutcome
from launcher.workflow import Answer

DONE = WorkerOutcome(Status.DONE, "", 3, 2.0, 1.0, 4.5, 100.0, 0.5, 1)
JOB = (
    "recipe=smollm_lora",
    "hardware=cpu",
    "data.max_length=64",
    "training.global_batch_size=2",
    "planner.headroom=0.05",
    "planner.pin.micro_batch_size=2",
    "planner.pin.activation_checkpointing=none",
)


@pytest.fixture(scope="module")
def order() -> WorkerOrder:
    """A small plan of the default recipe, traced."""
    job = resolve(load_job(JOB), ())
    choice = find_plan(job)
    assert choice.plan is not None and choice.estimate is not None
    return WorkerOrder(job, choice.plan, choice.estimate, "", "", choice.step)


def make_run(root: Path, order: WorkerOrder, started: str, measured_bytes: int, **changes: Any) -> RunRecord:
    """A run directory with an order and a record."""
    seen = (MeasuredPhase(Phase.TRAIN_STEP, measured_bytes, None, None),)
    measured = MemoryMeasurement(0, "by hand", seen, {}, (StepShape(2, 64),))
    record = RunRecord(
        run_dir=str(root),
        recipe="smollm_lora",
        model=order.job.model.path,
        hardware="cpu",
        started=started,
        plan=order.plan,
        predicted=order.predicted,
        predicted_as_run=None,
        measured=measured,
        outcome=DONE,
        versions={"torch": "2.9.0"},
    )
    record = replace(record, **changes)
    write_document(RunPaths(root).worker, order)
    write_record(RunPaths(root), record)
    return record


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command itself."""
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def report(*arguments: str) -> Answer:
    """What `action=report` has to say."""
    return report_answer(load_job(["action=report", *arguments]))


def test_filters_choose_and_exports_hold_what_was_chosen(order: WorkerOrder, tmp_path: Path) -> None:
    make_run(tmp_path / "a", order, "2026-11-01T00:00:00+00:00", 1000)
    make_run(tmp_path / "b", order, "2026-11-02T00:00:00+00:00", 1100, recipe="other")
    stopped = replace(DONE, status=Status.INTERRUPTED)
    make_run(tmp_path / "c", order, "2026-11-03T00:00:00+00:00", 1200, outcome=stopped)

    def listed(*arguments: str) -> list[str]:
        runs: Sequence[Any] = report(f"run_dir={tmp_path}", *arguments).document["runs"]
        return [Path(run["run_dir"]).name for run in runs]

    assert listed() == ["c", "b", "a"]
    assert listed("report.recipe=smollm_lora") == ["c", "a"]
    assert listed("report.recipe=smollm_lora", "report.status=done") == ["a"]
    assert listed("report.hardware=a100_40g") == []
    for name in ("runs.csv", "runs.json"):
        report(f"run_dir={tmp_path}", "report.status=done", f"report.export={tmp_path / name}")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(row["recipe"], row["measured_peak_bytes"]) for row in rows] == [
        ("other", "1100"),
        ("smollm_lora", "1000"),
    ]
    peak = str(order.predicted.peak_allocated_bytes)
    assert rows[0]["micro_batch_size"] == "2" and rows[0]["predicted_peak_bytes"] == peak
    exported = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [run["recipe"] for run in exported] == ["other", "smollm_lora"]


def test_runs_and_plans_are_compared(order: WorkerOrder, tmp_path: Path) -> None:
    make_run(tmp_path / "a", order, "2026-11-01T00:00:00+00:00", 1000)
    changed = replace(order.plan, micro_batch_size=1, gradient_accumulation_steps=2)
    make_run(tmp_path / "b", order, "2026-11-02T00:00:00+00:00", 900, plan=changed)
    answer = report(f"report.compare=[{tmp_path / 'a'},{tmp_path / 'b'}]")
    fields = answer.document["compare"]
    assert fields["plan"] == {"micro_batch_size": (2, 1), "gradient_accumulation_steps": (1, 2)}
    assert fields["measured_by_phase_bytes"] == {"train_step": (1000, 900)}
    assert "-10.00 %" in answer.text and "micro_batch_size" in answer.text
    plan = {"plan": {"rank": 16}, "predicted": {"by_phase_bytes": {}, "by_category_bytes": {}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    mixed = report(f"report.compare=[{tmp_path / 'plan.json'},{tmp_path / 'a'}]").document["compare"]
    assert mixed["plan"]["max_length"] == (None, 64) and "rank" not in mixed["plan"]
    (tmp_path / "plan.json").write_text('{"plan": null}')
    for wrong, words in (("plan.json", "holds no plan"), ("nowhere", "can't be read")):
        with pytest.raises(ConfigError, match=words):
            report(f"report.compare=[{tmp_path / 'a'},{tmp_path / wrong}]")


def test_a_check_tells_whether_peaks_have_moved(order: WorkerOrder, tmp_path: Path) -> None:
    make_run(tmp_path / "old", order, "2026-11-01T00:00:00+00:00", 1_000_000, versions={"torch": "2.8.0"})
    make_run(tmp_path / "new", order, "2026-11-02T00:00:00+00:00", 1_004_000)
    same = report(f"run_dir={tmp_path}", "report.check=smollm_lora")
    assert same.failure is None, same.failure
    assert [item["share"] for item in same.document["check"]] == pytest.approx([0.0, 0.004])
    assert "torch 2.8.0 -> 2.9.0" in same.text
    strict = report(f"run_dir={tmp_path}", "report.check=smollm_lora", "report.tolerance=0.003")
    assert isinstance(strict.failure, PeakMoved) and strict.failure.exit_code == 1
    assert "measured peak +0.40%" in strict.failure.message
    peak = order.predicted.peak
    fewer = replace(
        peak,
        allocated_bytes=peak.allocated_bytes // 2,
        by_category_bytes={next(iter(peak.by_category_bytes)): peak.allocated_bytes // 2},
    )
    smaller = replace(order.predicted, phases=(fewer,))
    make_run(tmp_path / "newest", order, "2026-11-03T00:00:00+00:00", 1_004_000, predicted=smaller)
    moved = report(f"run_dir={tmp_path}", "report.check=smollm_lora")
    assert moved.failure is not None and "predicted peak +100" in moved.failure.message
    with pytest.raises(ConfigError, match="no run of this recipe"):
        report(f"run_dir={tmp_path}", "report.check=llama_lora")


def test_a_check_says_when_there_is_no_earlier_run_with_the_plan(order: WorkerOrder, tmp_path: Path) -> None:
    """An upgrade may have changed the plan too."""
    other = replace(order.plan, micro_batch_size=1, gradient_accumulation_steps=2)
    make_run(tmp_path / "old", order, "2026-11-01T00:00:00+00:00", 1_000_000, plan=other)
    make_run(tmp_path / "new", order, "2026-11-02T00:00:00+00:00", 1_400_000)
    answer = report(f"run_dir={tmp_path}", "report.check=smollm_lora")
    assert answer.failure is None and [item["what"] for item in answer.document["check"]] == ["predicted"]
    assert "no earlier run with this plan" in answer.text and str(tmp_path / "new") in answer.text
    assert answer.document["notes"] == [answer.text.splitlines()[-1]]
    make_run(tmp_path / "cut", order, "2026-11-03T00:00:00+00:00", 0, measured=None)
    assert "ended before its meter was read" in report(f"run_dir={tmp_path}", "report.check=smollm_lora").text


def test_the_command_ends_with_one_when_a_peak_has_moved(order: WorkerOrder, tmp_path: Path) -> None:
    """The prediction is kept from the fixture: nothing is traced."""
    make_run(tmp_path / "old", order, "2026-11-01T00:00:00+00:00", 1_000_000)
    make_run(tmp_path / "new", order, "2026-11-02T00:00:00+00:00", 1_004_000)
    done = launch(
        "action=report", f"run_dir={tmp_path}", "report.check=smollm_lora", "report.tolerance=0.003"
    )
    assert done.returncode == 1, done.stderr
    assert "smollm_lora moved by more than 0.30%: measured peak +0.40%" in done.stderr
    assert "  measured" in done.stdout


def test_an_export_that_cannot_be_written_is_one_message(order: WorkerOrder, tmp_path: Path) -> None:
    make_run(tmp_path / "a", order, "2026-11-01T00:00:00+00:00", 1000)
    for place in ("/proc/no/such/runs.csv", str(tmp_path / "a" / "record.json" / "runs.json")):
        with pytest.raises(LaunchError, match=r"`report.export=.* can't be written") as caught:
            report(f"run_dir={tmp_path}", f"report.export={place}")
        assert "<another file>" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["action=plan", "report.check=llama_lora"], "`report.check` with `action=plan`"),
        (["action=report", "report.compare=[a]"], "`report.compare` names 1"),
        (["action=report", "report.export=runs.xls"], "ends in .csv or .json"),
        (["action=report", "report=html"], "a report is written about a plan"),
        (["action=report", "report.status=fine"], "input should be"),
    ],
)
def test_what_a_report_cannot_be_asked_is_said(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(arguments)
    assert words in str(caught.value)
