"""After a machine's workers ran out of memory: the next plan of a run that nobody waits for who could plan."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from launcher.cluster import Cluster, Node
from launcher.errors import Interrupted, LaunchError, Terminated
from launcher.run.secret import with_secret
from launcher.run.supervise import TERM_GRACE_SECONDS, Ending, supervise
from launcher.run.waiting_room import is_called_back, waiting_room
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder

NEXT_PLAN_MODULE: Final = "launcher.next_plan"
"""Plans anew; it is above this folder's layer, and so a process."""
BILL: Final = "--bill"
"""What tells it that no more plans are tried: it says what memory was needed for."""
STOPPED: Final = "stopped before there was a next plan"


def has_another_plan(paths: RunPaths, order: WorkerOrder, node: Node, show: Callable[[str], None]) -> bool:
    """Whether a run that ended for want of memory has another plan now: machine 0 makes it, the others wait for it.

    Raises:
        Interrupted: When this process is asked to stop meanwhile.
    """
    try:
        node = with_secret(node, paths.secret, 0.0)  # it is there: they have met
        if node.rank:
            with _ended_by_termination():
                return is_called_back(node, paths.worker)
    except LaunchError as failure:
        show(f"no next plan: {failure.message}")
        return False
    with _ended_by_termination(), waiting_room(node, order.plan.num_nodes) as room:
        if room.missing:
            show(f"no next plan: {room.missing}")
            plan_anew(paths, order, node, show, BILL)
            return False
        ending = plan_anew(paths, order, node, show)
        if ending.interrupted:
            raise (Terminated if ending.terminated else Interrupted)(STOPPED)
        is_made = ending.exit_code == 0
        if is_made:
            room.call_back(paths.worker)
        return is_made


def plan_anew(
    paths: RunPaths, order: WorkerOrder, node: Node, show: Callable[[str], None], *words: str
) -> Ending:
    """Plans, or with `BILL` says what memory was needed for; without another plan it says that by itself."""
    command = [sys.executable, "-m", NEXT_PLAN_MODULE, str(paths.root), *words]
    log, pid = paths.node_log(node.rank), paths.pid(node.rank)
    is_slurm = order.job.launch.cluster is Cluster.SLURM
    return supervise(command, os.environ, log, pid, show, TERM_GRACE_SECONDS, shields=is_slurm)


@contextmanager
def _ended_by_termination() -> Iterator[None]:
    """While this process waits, SIGTERM ends it in words.

    Raises:
        Terminated: When it comes.
    """

    def end(number: int, frame: object) -> None:
        raise Terminated(STOPPED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
