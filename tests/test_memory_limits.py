"""scripts/memory_limits.py calls a phase right only when memory ran out there, and the job ended as it should.

Its runs are not repeated here; what they showed is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.documents import from_json
from launcher.memory import Phase
from launcher.run_paths import RunPaths
from scripts.endurance import ROOT
from scripts.memory_limits import (
    LONGEST_APART_SECONDS,
    TRIALS,
    Limit,
    Met,
    Outcome,
    Rank,
    Seen,
    Trial,
    Visit,
    command,
    data_bytes,
    document_of,
    meeting,
    note,
    watch,
)

STEP, UPDATE, SAVE = Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP, Phase.SAVE
MET = Outcome(
    SAVE,
    1,
    3,
    2,
    engine="zero3",
    tripped=("save",),
    exit_code=4,
    shows_bill=True,
    resumed=True,
    apart_seconds=0.1,
    loss_difference=0.0,
)


def test_a_phase_that_never_ran_out_of_memory_is_not_right() -> None:
    assert MET.is_right
    assert not replace(MET, tripped=()).is_right
    assert not replace(MET, tripped=(), limit_bytes=None).is_right
    assert not replace(MET, tripped=("save", "train_step")).is_right
    assert not replace(MET, loss_difference=0.1).is_right
    assert not replace(MET, loss_difference=None).is_right


def test_a_job_that_does_not_end_as_it_should_is_not_right() -> None:
    assert not replace(MET, shows_bill=False).is_right
    assert not replace(MET, keeps_job=False).is_right
    assert not replace(MET, apart_seconds=LONGEST_APART_SECONDS + 1).is_right
    assert not replace(MET, exit_code=6).is_right
    assert not replace(MET, smaller_bytes=1).is_right, "what was seen to fit must end under the limit"
    assert replace(MET, smaller_bytes=1, exit_code=0, resumed=False, shows_bill=False).is_right


def test_each_stay_in_a_phase_knows_what_was_before_it() -> None:
    """The first optimizer step makes the states; the second backward pass has them and more."""
    visits: list[Visit] = []
    for phase, size in ((STEP, 5), (STEP, 4), (UPDATE, 4), (UPDATE, 8), (STEP, 8), (STEP, 9), (UPDATE, 8)):
        note(visits, phase, size)
    assert visits == [
        Visit(STEP, 0, 5, 5),
        Visit(UPDATE, 5, 4, 8),
        Visit(STEP, 8, 8, 9),
        Visit(UPDATE, 9, 8, 8),
    ]
    assert [visit.rise_bytes(False) for visit in visits if visit.phase is UPDATE] == [3, -1]
    assert [visit.rise_bytes(True) for visit in visits if visit.phase is UPDATE] == [4, 0]


def test_a_limit_that_all_ranks_have_is_above_what_the_others_ever_take(tmp_path: Path) -> None:
    """Rank 0 gathers; what the other takes anywhere must fit, or memory would run out there."""
    gathers = (
        Visit(STEP, 0, 5, 50),
        Visit(SAVE, 50, 40, 80),
        Visit(STEP, 80, 50, 60),
        Visit(SAVE, 80, 45, 90),
    )
    other = (Visit(STEP, 0, 5, 55), Visit(SAVE, 55, 41, 50), Visit(STEP, 55, 50, 56), Visit(SAVE, 56, 45, 46))
    for visits, rank in (((gathers, other), 0), ((other, gathers), 1)):
        seen = Seen(visits, 0.0)
        assert seen.highest_bytes == 90
        assert meeting(Trial(SAVE, engine="fsdp2"), seen, tmp_path) == Met(rank, 56, 80)
        assert meeting(Trial(SAVE, engine="zero3", met_stay=2), seen, tmp_path) == Met(rank, 45, 90)
        assert meeting(Trial(SAVE, engine="zero3", met_stay=1), seen, tmp_path) == Met(rank, 40, 90)


def test_a_smaller_job_is_the_same_but_for_what_is_smaller(tmp_path: Path) -> None:
    (trial,) = (trial for trial in TRIALS if trial.phase is Phase.EVALUATION)
    whole = command(trial, tmp_path, tmp_path, tmp_path / "run")
    small = command(trial, tmp_path, tmp_path, tmp_path / "run", trial.smaller)
    assert set(whole) - set(small) == {"evaluation.batch_size=4"}
    assert set(small) - set(whole) == set(trial.smaller) and len(small) == len(whole)


WORKER = """
import mmap, os, pathlib, sys, time
run, rank, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
(run / f"worker.rank{rank}.phase").write_text("save")
(run / f"worker.rank{rank}.pid").write_text(str(os.getpid()))
time.sleep(seconds)
try:
    held = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    (run / f"fits.rank{rank}").touch()
except OSError:
    (run / f"short.rank{rank}").touch()
"""
LAUNCHER = """
import subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:3], *rank]) for rank in (("0", "1"), ("1", "3"))]
[rank.wait() for rank in ranks]
time.sleep(0.5)  # a launcher reads how they ended
"""


@pytest.mark.parametrize(
    ("limit", "short"),
    [(None, []), (Limit(1 << 29), [0, 1]), (Limit(1 << 29, SAVE, 1, 1), [1]), (Limit(1 << 29, SAVE, 2), [])],
)
def test_ranks_are_watched_to_their_ends_and_limited_as_they_should(
    limit: Limit | None, short: list[int], tmp_path: Path
) -> None:
    """Real processes and a real limit. The second rank ends two seconds after the first."""
    child = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER, str(tmp_path)])
    seen = watch(child, RunPaths(tmp_path), 2, limit)
    assert child.returncode == 0
    assert [rank for rank in (0, 1) if (tmp_path / f"short.rank{rank}").exists()] == short
    assert [visit.phase for visits in seen.visits for visit in visits] == [SAVE, SAVE]
    assert 0.5 < seen.apart_seconds < 20


def test_a_process_that_is_gone_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert data_bytes(child.pid) == 0 < data_bytes(os.getpid())
    assert Rank().gone_at is None


def test_phases_that_were_run_again_take_the_places_of_the_old_ones(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    merged = Outcome(Phase.MERGE, 1, 3, 2)
    file.write_text(json.dumps(document_of({"merge": merged, "save-zero3": MET}, file, "2026-11-27")))
    again = document_of({"merge": replace(merged, limit_bytes=1)}, file, "2026-11-27")
    assert [(phase["name"], phase["limit_bytes"]) for phase in again["phases"]] == [
        ("save-zero3", 2),
        ("merge", 1),
    ]
    another_day = document_of({"merge": merged}, file, "2026-11-28")
    assert [phase["name"] for phase in another_day["phases"]] == ["merge"]


def test_what_is_recorded_is_right_in_every_phase() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-memory-limits.json"))
    recorded = json.loads(newest.read_text(encoding="utf-8"))["phases"]
    assert [phase.pop("name") for phase in recorded] == [trial.name for trial in TRIALS]
    outcomes = [from_json(Outcome, json.dumps(phase)) for phase in recorded]
    assert {outcome.phase for outcome in outcomes} == set(Phase)
    for outcome, trial in zip(outcomes, TRIALS, strict=True):
        assert outcome.is_right, asdict(outcome)
        assert outcome.limit_bytes is not None
        assert (
            max(outcome.before_bytes, outcome.smaller_bytes or 0) < outcome.limit_bytes < outcome.phase_bytes
        )
        assert (outcome.smaller_bytes is not None) == bool(trial.smaller)
        assert (outcome.apart_seconds is not None) == (trial.num_ranks > 1)
