"""One launcher per run directory: a lock that ends with its process, and no workers of launchers that are gone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from launcher.errors import LaunchError
from launcher.run_paths import RunPaths

END_SECONDS: Final = 10.0
"""How long the kernel may take to end a killed process."""


@contextmanager
def sole_launcher(paths: RunPaths) -> Iterator[None]:
    """Holds the run directory for this process; the kernel lets go of it however the process ends.

    Raises:
        LaunchError: When another process holds it, or it can't be held.
    """
    try:
        opened = paths.lock.open("a+", encoding="ascii")
    except OSError as failure:
        raise LaunchError(
            f"`{paths.lock}` can't be written: {failure}",
            "a run writes into its directory; choose another `run_dir`",
        ) from failure
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise LaunchError(
                f"`{paths.root}` is in use: another launch, process {holder}, runs in it",
                "wait for its end, or choose another `run_dir`",
            ) from failure
        except OSError as failure:
            raise LaunchError(
                f"`{paths.lock}` can't be locked: {failure}",
                "choose a `run_dir` on a file system that has locks",
            ) from failure
        with suppress(OSError):  # a full disk: who holds it is said to people only
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), str(os.getpid()).encode())
        yield


def end_orphans(paths: RunPaths, world_size: int, show: Callable[[str], None]) -> None:
    """Ends workers that a launcher left behind when it was killed; to be called by who holds the run directory.

    Args:
        paths: The run directory, and its rehearsal's.
        world_size: Ranks.
        show: Called with a line for each.

    Raises:
        LaunchError: When one doesn't end.
    """
    for act in (paths.rehearsal, paths):
        for rank in range(world_size):
            with suppress(OSError, ValueError, psutil.Error):
                pid = int(act.pid(rank).read_text(encoding="ascii"))
                if works_on(pid, act.root):
                    show(f"ending process {pid}: the launcher that started it is gone")
                    _end(psutil.Process(pid))


def _end(process: psutil.Process) -> None:
    process.kill()
    try:
        process.wait(END_SECONDS)
    except psutil.TimeoutExpired as failure:
        raise LaunchError(
            f"process {process.pid} of an earlier launch does not end", "the kernel waits for its device"
        ) from failure


def works_on(pid: int, root: Path) -> bool:
    """Whether a process runs and is of this run: numbers are given again."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(root) in process.cmdline()
    return False
