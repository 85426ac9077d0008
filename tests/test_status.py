"""Where a run stands, from what its directory, this machine and Slurm say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoints import seal
from launcher.cluster import SubmittedJob
from launcher.documents import write_document
from launcher.errors import ConfigError, LaunchError
from launcher.job import Engine
from launcher.report.status import RANKS_SHOWN, status_document, status_text
from launcher.run.launch import prepare_run
from launcher.run.node import clear_leftovers, note_failure
from launcher.run.status import decide, ordered_run, run_status, unrecorded_outcome
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOrder, WorkerOutcome
from launcher.run_status import NodeFailure, RankProcess, RunState, RunStatus
from tests.tiny_job import tiny_order

DONE = WorkerOutcome(Status.DONE, "", 3, 2.0, 1.0, 4.5, 100.0, 0.5, 2, host="here")
BOTH_DONE = (DONE, replace(DONE, rank=1))
OUT_OF_MEMORY = replace(DONE, status=Status.OUT_OF_MEMORY, message="no memory", rank=1)
STOPPED = replace(DONE, status=Status.INTERRUPTED, message="stopped after step 3")
FAILED = NodeFailure(6, "rank 1 on host here ended with signal SIGKILL")
ASLEEP = RankProcess(0, "", None, None)
ALIVE, GONE, AFAR = (RankProcess(0, "here", 7, alive) for alive in (True, False, None))


@pytest.mark.parametrize(
    ("outcomes", "failures", "rank", "submitted", "word", "state"),
    [
        ((), (), ASLEEP, False, "", RunState.PREPARED),
        ((), (), ASLEEP, True, "", RunState.SUBMITTED),
        ((), (), ASLEEP, True, "PENDING", RunState.PENDING),
        ((STOPPED,), (), GONE, True, "REQUEUED", RunState.PENDING),
        ((), (), ASLEEP, True, "RUNNING", RunState.RUNNING),
        ((), (), ALIVE, False, "", RunState.RUNNING),
        ((), (), AFAR, False, "", RunState.RUNNING),
        ((DONE,), (), GONE, True, "RUNNING", RunState.RUNNING),  # rank 1 has not ended
        (BOTH_DONE, (), GONE, True, "RUNNING", RunState.FINISHED),  # the job reports of itself
        (BOTH_DONE, (), GONE, True, "", RunState.FINISHED),
        (BOTH_DONE, (FAILED,), GONE, False, "", RunState.FAILED),
        ((STOPPED,), (NodeFailure(130, "stopped"),), GONE, True, "CANCELLED", RunState.INTERRUPTED),
        ((), (NodeFailure(130, "stopped"),), GONE, False, "", RunState.INTERRUPTED),
        ((OUT_OF_MEMORY, DONE), (), GONE, True, "FAILED", RunState.FAILED),
        ((), (FAILED,), GONE, True, "RUNNING", RunState.FAILED),
        ((), (NodeFailure(130, "stopped"), FAILED), GONE, False, "", RunState.FAILED),
        ((), (), GONE, False, "", RunState.FAILED),
        ((), (), ASLEEP, True, "NODE_FAIL", RunState.FAILED),
        ((), (), ASLEEP, True, "COMPLETED", RunState.FAILED),
    ],
)
def test_the_state_follows_from_what_is_known(
    outcomes: Sequence[WorkerOutcome],
    failures: Sequence[NodeFailure],
    rank: RankProcess,
    submitted: bool,
    word: str,
    state: RunState,
) -> None:
    found, message = decide(outcomes, failures, (rank, replace(rank, rank=1)), submitted, word)
    assert found is state
    if FAILED in failures:
        assert message == FAILED.message
    assert bool(message) is (state in (RunState.FAILED, RunState.INTERRUPTED) or rank is AFAR)


@pytest.fixture
def run(nasty_path: Path) -> tuple[RunPaths, WorkerOrder]:
    """A prepared run of two ranks on this machine."""
    paths, order = RunPaths(nasty_path / "run"), tiny_order(nasty_path, Engine.DDP)
    prepare_run(paths, order, {})
    return paths, order


def test_processes_are_looked_for_by_number_and_run(run: tuple[RunPaths, WorkerOrder]) -> None:
    paths, order = run
    assert run_status(paths, order).state is RunState.PREPARED
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(paths.root)])
    try:
        paths.host(0).write_text(socket.gethostname())
        paths.pid(0).write_text(str(worker.pid))
        paths.host(1).write_text("another-host")
        paths.pid(1).write_text(str(worker.pid))
        status = run_status(paths, order)
        assert status.state is RunState.RUNNING
        assert status.ranks[0] == RankProcess(0, socket.gethostname(), worker.pid, True)
        assert status.ranks[1] == RankProcess(1, "another-host", worker.pid, None)
        text = status_text(status)
        assert f"process {worker.pid} on another-host: on another machine" in text and "alive" in text
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    paths.host(1).write_text(socket.gethostname())
    paths.pid(1).write_text(str(os.getpid()))  # the number was given to a process of something else
    status = run_status(paths, order)
    assert [rank.is_alive for rank in status.ranks] == [False, False]
    assert status.state is RunState.FAILED and "ended from outside" in status.message


def test_progress_is_the_last_that_was_logged(run: tuple[RunPaths, WorkerOrder]) -> None:
    paths, order = run
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "eval_loss": 9.0},
        {"step": 3, "train_runtime": 1.0},
    ]
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    for step in (9, 10, 11):
        (paths.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    for step in (9, 10):
        (paths.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        seal(paths.checkpoints / f"checkpoint-{step}")
    write_document(paths.submitted, SubmittedJob("17", "big"))
    status = run_status(paths, order, ask=lambda job: "PENDING" if job.job_id == "17" else "")
    assert (status.step, status.max_steps, status.loss) == (3, 4, 1.5)
    assert status.last_checkpoint == str(paths.checkpoints / "checkpoint-10")  # 11 is not complete
    assert status_text(status).splitlines() == [
        f"run       {paths.root}",
        "state     pending",
        "job       17 on big: Slurm says PENDING",
        "step      3/4, loss 1.5000",
        f"saved     {paths.checkpoints / 'checkpoint-10'}",
    ]
    document = json.loads(json.dumps(status_document(status)))
    assert document["state"] == "pending" and document["cluster"] == "local"
    assert (document["job_id"], document["slurm_cluster"], document["slurm_state"]) == (
        "17",
        "big",
        "PENDING",
    )
    assert document["ranks"] == [{"rank": rank, "host": "", "pid": None, "is_alive": None} for rank in (0, 1)]


def test_many_ranks_are_summed_up() -> None:
    ranks = tuple(RankProcess(rank, "node", rank + 1, None) for rank in range(1024))
    status = RunStatus(
        "run", tiny_order(Path("x"), Engine.DDP).job.launch.cluster, RunState.RUNNING, "", 0, None, None, "",
        None, "", ranks,
    )  # fmt: skip
    assert f"and {1024 - RANKS_SHOWN} more ranks" in status_text(status)


def test_a_failure_is_left_and_forgotten_by_the_next_start(run: tuple[RunPaths, WorkerOrder]) -> None:
    paths, order = run
    note_failure(paths, 0, LaunchError("port 29500 is in use", "another one"))
    status = run_status(paths, order)
    assert (status.state, status.message) == (RunState.FAILED, "port 29500 is in use")
    clear_leftovers(paths, order.plan)
    assert run_status(paths, order).state is RunState.PREPARED
    note_failure(RunPaths(paths.root / "gone"), 0, LaunchError("x"))  # no folder, no file
    assert not (paths.root / "gone").exists()


def test_an_end_is_reconciled_once(run: tuple[RunPaths, WorkerOrder]) -> None:
    paths, order = run
    assert unrecorded_outcome(paths, order) is None
    for outcome in BOTH_DONE:
        write_document(paths.outcome(outcome.rank), outcome)
    assert unrecorded_outcome(paths, order) == DONE
    paths.record.write_text("{}")
    assert unrecorded_outcome(paths, order) is None
    later = paths.record.stat().st_mtime + 5
    os.utime(paths.outcome(1), (later, later))  # it was resumed, and ended again
    assert unrecorded_outcome(paths, order) == DONE


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        ordered_run(tmp_path)
