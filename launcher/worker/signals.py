"""Whose termination signal counts: where a scheduler sends it to every process, the parent's alone does."""

from __future__ import annotations

import os
import signal
import threading
from typing import Final

TERMINATION: Final = {signal.SIGTERM}


def heed_parent_alone() -> None:
    """Where the launcher started this process with terminations blocked, obeys those that its parent sends.

    Slurm sends one to every process of a job that it stops. The launcher gets it too, and has the workers save; torchrun,
    the parent, sends another one when a process has failed, and the others must end.
    """
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        threading.Thread(target=_heed, name="terminations", daemon=True).start()


def _heed() -> None:
    while signal.sigwaitinfo(TERMINATION).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATION)
    os.kill(os.getpid(), signal.SIGTERM)  # to this thread: the only one that takes it
