"""What `accelerate launch` starts: leaves word where this rank runs, and trains.

Nothing heavy is imported before it is known what the plan calls: the optional libraries that it doesn't are hidden.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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
        train = import_for_good(TRAIN_MODULE)
        return int(train.EXIT_CODES[train.run(order, paths)])


def import_for_good(name: str) -> Any:
    """Imports a module, and leaves what that made out of garbage collection.

    Nothing that an import makes is garbage: looking for some costs a fifth of the time. Half a million objects stay, and
    each later search of them, for garbage or for tensors, would take a third of a second.
    """
    gc.disable()
    module = importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return module


def leave(exit_code: int) -> NoReturn:
    """Ends the process as it stands: what it had to say is written.

    Taking the interpreter apart takes a second, and libraries' threads are not made for it: gloo's, which live on after
    their group is destroyed, abort the process when they release a tensor meanwhile (torch 2.13).
    """
    # as the interpreter begins its end; neither has a public name (CPython 3.11 to 3.14, Py_FinalizeEx)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, after telling pools of them
    atexit._run_exitfuncs()  # multiprocessing's children, logs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main(sys.argv))
