"""What `accelerate launch` starts: leaves word where this rank runs, and trains.

Nothing heavy is imported before it is known what the plan calls: the optional libraries that it doesn't are hidden.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.documents import read_document
from launcher.libraries import hide_libraries, unneeded_libraries
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from launcher.stored_secrets import known_secrets
from launcher.worker.output import redacted_output
from launcher.worker.ranks import rank
from launcher.worker.signals import heed_parent_alone

TRAIN_MODULE = "launcher.worker.train"


def main(argv: Sequence[str]) -> int:
    """Entry point: `python -m launcher.worker <run directory>`."""
    heed_parent_alone()
    paths = RunPaths(Path(argv[1]))
    paths.host(rank()).write_text(socket.gethostname())
    paths.pid(rank()).write_text(str(os.getpid()))
    order = read_document(paths.worker, WorkerOrder)
    hide_libraries(unneeded_libraries(order.plan))
    with redacted_output(known_secrets(os.environ)):
        train = importlib.import_module(TRAIN_MODULE)
        return int(train.EXIT_CODES[train.run(order, paths)])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
