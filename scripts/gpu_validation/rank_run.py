"""Runs one job's ranks on one card, each started as a node of its own.

NCCL refuses two ranks of one host on one device, and tells hosts apart by a name that NCCL_HOSTID gives: with a name
for each rank they pass for two machines of one card each. Between machines there is neither NVLink nor shared memory:
what they exchange goes through sockets, which costs time and changes nothing of what torch's allocator holds.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from launcher.cluster import Node
from launcher.documents import read_document
from launcher.errors import LauncherError
from launcher.hardware import DeviceKind
from launcher.memory import MemoryMeasurement
from launcher.run.render import ALLOCATOR_SETTINGS, LINE_PREFIX, worker_command, worker_environment
from launcher.run.supervise import Ending, supervise
from launcher.run_paths import RunPaths
from launcher.run_record import Status as WorkerStatus
from launcher.run_record import WorkerOrder, WorkerOutcome
from scripts.gpu_validation.rank_jobs import ADDRESS
from scripts.gpu_validation.results import Status

T = TypeVar("T")

LAST_WORDS = 1500
"""Characters kept of each rank's log when a job did not end well."""
FOLLOW_SECONDS = 5.0
"""How long a rank may go on after another one has failed: it waits for it in vain."""
SETTINGS: Mapping[str, str] = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_DEBUG": "WARN",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
"""What every rank's environment has beyond what the launcher gives it."""
CARD_THREADS = "4"
"""OMP_NUM_THREADS beside a card, unless it is set: ranks of several jobs share the machine's cores."""


@dataclass(frozen=True)
class RankRun:
    """How one job's ranks ended."""

    status: Status
    message: str = ""
    """The ends of the logs, unless all went well."""
    seconds: float = 0.0
    """From the start to the end of the last process."""
    measured: tuple[MemoryMeasurement, ...] = ()
    """Ranks that came so far, in order."""
    outcomes: tuple[WorkerOutcome, ...] = ()
    """The same."""


@dataclass
class _Watch:
    """Says when a rank is ended: the time is up, another rank has failed, or all is to stop."""

    limit_seconds: float
    stop: threading.Event
    began_at: float = field(default_factory=time.monotonic)
    failed_at: float | None = None
    timed_out: bool = False

    def reason_to_stop(self) -> str:
        """Why; empty: go on."""
        now = time.monotonic()
        if self.stop.is_set():
            return "all is to stop"
        if self.failed_at is not None and now > self.failed_at + FOLLOW_SECONDS:
            return "another rank has failed"
        if now > self.began_at + self.limit_seconds:
            self.timed_out = True
            return f"not done after {self.limit_seconds:.0f} s"
        return ""


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def rank_environment(
    order: WorkerOrder, name: str, rank: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of one rank.

    Args:
        order: What it does.
        name: The job's name, unique among those that run at the same time.
        rank: Which rank.
        inherited: Our own environment.
    """
    environment = {key: value for key, value in inherited.items() if key not in ALLOCATOR_SETTINGS}
    environment |= {**SETTINGS, "NCCL_HOSTID": f"{name}-rank-{rank}"}
    if order.job.hardware.kind is not DeviceKind.CPU:
        environment.setdefault("OMP_NUM_THREADS", CARD_THREADS)
    return environment | worker_environment(order.job.hardware, environment, order.plan)


def run_ranks(
    paths: RunPaths,
    order: WorkerOrder,
    name: str,
    limit_seconds: float,
    inherited: Mapping[str, str],
    stop: threading.Event,
) -> RankRun:
    """Runs all ranks of a prepared run, and ends them with all that descends from them when the time is up.

    Args:
        paths: The run directory.
        order: What the ranks do.
        name: See `rank_environment`.
        limit_seconds: How long they may take.
        inherited: Our own environment.
        stop: Ends them at once when set.
    """
    watch = _Watch(limit_seconds, stop)

    def run(rank: int) -> Ending:
        ending = supervise(
            worker_command(paths, order.plan, Node(rank, ADDRESS, order.job.launch.main_port)),
            rank_environment(order, name, rank, inherited),
            paths.node_log(rank),
            paths.pid(rank),
            _ignore,
            should_stop=watch.reason_to_stop,
        )
        if ending.exit_code != 0 and watch.failed_at is None:
            watch.failed_at = time.monotonic()
        return ending

    ranks = range(order.plan.world_size)
    with ThreadPoolExecutor(len(ranks)) as pool:
        endings = list(pool.map(run, ranks))
    return _gathered(paths, endings, watch)


def _ignore(line: str) -> None:
    """All of it is in the log."""


def _gathered(paths: RunPaths, endings: list[Ending], watch: _Watch) -> RankRun:
    """Reads what the ranks left in the run directory."""
    ranks = range(len(endings))
    measured = _found(lambda rank: read_document(paths.measured(rank), MemoryMeasurement), ranks)
    outcomes = _found(lambda rank: read_document(paths.outcome(rank), WorkerOutcome), ranks)
    status = _status(outcomes, len(measured) == len(endings), watch)
    words = (
        [] if status is Status.DONE else [_last_words(paths, rank, endings[rank], outcomes) for rank in ranks]
    )
    seconds = round(time.monotonic() - watch.began_at, 1)
    return RankRun(status, "\n".join(words), seconds, tuple(measured), tuple(outcomes))


def _found(read: Callable[[int], T], ranks: range) -> list[T]:
    found = []
    for rank in ranks:
        try:
            found.append(read(rank))
        except LauncherError:  # it did not come so far
            continue
    return found


def _status(outcomes: list[WorkerOutcome], all_measured: bool, watch: _Watch) -> Status:
    ends = [outcome.status for outcome in outcomes]
    if all_measured and all(end is WorkerStatus.DONE for end in ends):
        return Status.DONE
    if WorkerStatus.OUT_OF_MEMORY in ends:
        return Status.OUT_OF_MEMORY
    return Status.TIMED_OUT if watch.timed_out else Status.FAILED


def _last_words(paths: RunPaths, rank: int, ending: Ending, outcomes: list[WorkerOutcome]) -> str:
    """How a rank ended, and the end of what it printed itself: torchrun's own words come after it, and are many."""
    log = paths.node_log(rank)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    mark = LINE_PREFIX.replace("${rank}", str(rank))
    own = [line.removeprefix(mark) for line in lines if line.startswith(mark)] or lines
    said = [outcome.message for outcome in outcomes if outcome.rank == rank and outcome.message]
    reason = "; ".join([ending.stopped_because or f"exit code {ending.exit_code}", *said])
    return f"[rank {rank}: {reason}]\n" + "\n".join(own)[-LAST_WORDS:].strip()
