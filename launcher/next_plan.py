"""The next plan of a run on a cluster: `python -m launcher.next_plan <run directory>`, on machine 0.

Nobody waits there who could plan. So the launcher of machine 0 starts this when its workers ran out of memory: a
process of its own, which holds the run directory and leaves the next plan in it, or says what memory was needed for. It
is interrupted as workers are. With `--bill`, when no more plans may be tried, it says that alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from launcher.errors import Interrupted, LauncherError, WorkerOutOfMemory
from launcher.recovery import ended_without_memory, go_on_with_less, left_without_memory
from launcher.redaction import redacted
from launcher.report.rehearsal import bill_at_failure
from launcher.run.another_plan import BILL
from launcher.run.ledger import read_order
from launcher.run.lock import sole_launcher
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, WorkerOrder
from launcher.stored_secrets import known_secrets
from launcher.workflow import described, kept_document


def main(argv: Sequence[str]) -> int:
    """Entry point; 0 where the run has another plan now, 4 where none needs less or only the bill was asked for, 6 where
    another launcher is in it.

    The job's file asked for the memory that the first plan takes on the host: the next one may take no more.
    """

    def show(line: str) -> None:
        for part in redacted(line, known_secrets(os.environ)).splitlines():
            sys.stderr.write(f"{WORKER_MARK}{part}\n")

    paths = RunPaths(Path(argv[1]).resolve())
    try:
        order = read_order(paths)
        ended = ended_without_memory(order, paths)
        if BILL not in argv:
            with sole_launcher(paths):
                if _goes_on(order, paths, show):
                    return 0
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except LauncherError as failure:
        show(f"no next plan: {failure.message}")
        return failure.exit_code
    if ended is not None:
        show(bill_at_failure(order.predicted, ended))
    return WorkerOutOfMemory.exit_code


def _goes_on(order: WorkerOrder, paths: RunPaths, show: Callable[[str], None]) -> bool:
    """Whether a run that ran out of memory has another plan now."""
    outcome = left_without_memory(order, paths)
    if outcome is None:
        return False
    document = kept_document(order, paths, show)
    host = order.predicted.host
    limit = 0 if host is None else host.peak_bytes
    try:
        following = go_on_with_less(order, paths, outcome, show, partial(described, document), limit)
    except LauncherError as failure:
        show(f"no next plan: {failure.message}")
        return False
    return following is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
