"""Where a run stands: read from its directory, from the processes of this machine, and from Slurm."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from launcher.checkpoints import last_checkpoint
from launcher.cluster import SubmittedJob
from launcher.documents import read_document, read_lines
from launcher.errors import Interrupted, Terminated
from launcher.run.ledger import read_order
from launcher.run.lock import works_on
from launcher.run.ranks import deciding_outcome, read_outcomes
from launcher.run.slurm import slurm_state
from launcher.run_paths import RunPaths, run_of
from launcher.run_record import Status, WorkerOrder, WorkerOutcome
from launcher.run_status import NodeFailure, RankProcess, RunState, RunStatus

QUEUED: Final = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
UNDER_WAY: Final = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""Slurm's words for jobs that have not begun, and for those that have (squeue's manual, 22.05 to 25.05); any other word
means an end."""
ENDS: Final = {
    Status.DONE: RunState.FINISHED,
    Status.INTERRUPTED: RunState.INTERRUPTED,
    Status.TERMINATED: RunState.INTERRUPTED,
}
INTERRUPTED: Final = (Interrupted.exit_code, Terminated.exit_code)
"""Exit codes of what was asked to stop."""


def ordered_run(root: Path) -> tuple[RunPaths, WorkerOrder]:
    """A run directory and its order.

    Raises:
        ConfigError: When the folder is no run directory, or its order can't be read.
    """
    paths = run_of("run_dir", root)
    return paths, read_order(paths)


def run_status(
    paths: RunPaths, order: WorkerOrder, ask: Callable[[SubmittedJob], str] = slurm_state
) -> RunStatus:
    """Where a run stands.

    Args:
        paths: Its directory.
        order: What its workers do.
        ask: What Slurm calls the state of a job; empty where it can't say.
    """
    world_size = order.plan.world_size
    job = read_document(paths.submitted, SubmittedJob) if paths.submitted.exists() else None
    word = ask(job) if job is not None else ""
    ranks = tuple(_process(paths, rank) for rank in range(world_size))
    outcomes = read_outcomes(paths, world_size)
    failures = [paths.failure(node) for node in range(order.plan.num_nodes)]
    noted = [read_document(file, NodeFailure) for file in failures if file.exists()]
    state, message = decide(outcomes, noted, ranks, job is not None, word)
    logged = _last_logged(paths.metrics)
    checkpoint = last_checkpoint(paths.checkpoints)
    return RunStatus(
        run_dir=str(paths.root),
        cluster=order.job.launch.cluster,
        state=state,
        message=message,
        step=int(logged.get("step", 0)),
        max_steps=order.job.training.max_steps,
        loss=logged.get("loss"),
        last_checkpoint=str(checkpoint or ""),
        job=job,
        slurm_state=word,
        ranks=ranks,
    )


def decide(
    outcomes: Sequence[WorkerOutcome],
    failures: Sequence[NodeFailure],
    ranks: Sequence[RankProcess],
    is_submitted: bool,
    slurm_word: str,
) -> tuple[RunState, str]:
    """How far a run is, and why it ended so.

    What is seen to run comes first, then what launchers and workers left, then what Slurm says.

    Args:
        outcomes: How ranks ended, of those that could say.
        failures: Why machines' parts did not end well, where their launchers could say.
        ranks: The processes.
        is_submitted: Whether a scheduler took the job.
        slurm_word: Slurm's word for it; empty where it can't be asked.
    """
    if slurm_word in QUEUED:
        return RunState.PENDING, ""
    under_way = slurm_word in UNDER_WAY
    if any(rank.is_alive for rank in ranks) or (under_way and not failures and len(outcomes) < len(ranks)):
        return RunState.RUNNING, ""
    if failures:  # a launcher knows which rank drew the others after it
        worst = min(failures, key=lambda failure: failure.exit_code in INTERRUPTED)
        return RunState.INTERRUPTED if worst.exit_code in INTERRUPTED else RunState.FAILED, worst.message
    found = deciding_outcome(outcomes, len(ranks))
    if found is not None:
        return ENDS.get(found.status, RunState.FAILED), found.message
    if slurm_word and not under_way:
        return RunState.FAILED, f"Slurm says {slurm_word}, and the workers left no outcome"
    if is_submitted and not slurm_word:
        return RunState.SUBMITTED, ""
    if any(rank.pid is not None and rank.is_alive is None for rank in ranks):
        hosts = sorted({rank.host for rank in ranks if rank.pid is not None and rank.is_alive is None})
        return RunState.RUNNING, f"its processes on {', '.join(hosts)} can't be seen from here"
    if any(rank.pid is not None for rank in ranks):
        return RunState.FAILED, "its processes are gone and left no outcome: they were ended from outside"
    return RunState.PREPARED, ""


def _process(paths: RunPaths, rank: int) -> RankProcess:
    pid, host = _text(paths.pid(rank)), _text(paths.host(rank))
    if not pid.isdigit():
        return RankProcess(rank, host, None, None)
    if host and host != socket.gethostname():
        return RankProcess(rank, host, int(pid), None)
    return RankProcess(rank, host, int(pid), works_on(int(pid), paths.root))


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    return ""


def _last_logged(metrics: Path) -> dict[str, Any]:
    """The last step that was logged, and the last loss."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        for logged in read_lines(metrics):
            found |= {key: logged[key] for key in ("step", "loss") if key in logged}
    return found


def unrecorded_outcome(paths: RunPaths, order: WorkerOrder) -> WorkerOutcome | None:
    """How a run ended that nobody has reconciled since; None when there is nothing new to say."""
    files = [paths.outcome(rank) for rank in range(order.plan.world_size)]
    ended = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    if paths.record.exists() and paths.record.stat().st_mtime >= ended:
        return None
    return deciding_outcome(read_outcomes(paths, order.plan.world_size), order.plan.world_size)
