"""The door to the training process: writes its files, starts it, listens, and leaves nothing running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from launcher.documents import read_document, write_document, write_text
from launcher.errors import DataError, Interrupted, LauncherError, LaunchError, WorkerOutOfMemory
from launcher.run.render import accelerate_config, command_script, worker_command, worker_environment
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, Status, WorkerOrder, WorkerOutcome

SAVE_GRACE_SECONDS = 120.0
"""How long an interrupted worker may take to finish its micro batch and save."""
TERM_GRACE_SECONDS = 5.0
LOG_TAIL_LINES = 20


def prepare_run(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes a run directory: all of it or nothing.

    Raises:
        LaunchError: When the directory exists and is not empty.
    """
    root = paths.root
    if root.exists() and any(root.iterdir()):
        raise LaunchError(
            f"`{root}` exists and is not empty", "choose another `run_dir`, or continue it with `resume=<run dir>`"
        )
    partial = RunPaths(root.with_name(f".{root.name}.{os.getpid()}.partial"))
    partial.root.mkdir(parents=True)
    try:
        environment = worker_environment(order.job.hardware, os.environ)
        write_document(partial.job, order.job)
        write_document(partial.worker, order)
        write_text(partial.plan, json.dumps(document, indent=2) + "\n")
        write_text(partial.accelerate_config, accelerate_config(order.job.hardware))
        write_text(partial.command, command_script(worker_command(paths), environment, os.getcwd()))
        partial.command.chmod(0o755)
        if root.exists():
            root.rmdir()
        partial.root.rename(root)
    except OSError as failure:
        shutil.rmtree(partial.root, ignore_errors=True)
        raise LaunchError(f"`{root}` can't be written: {failure}", "choose another `run_dir`") from failure


def launch_worker(paths: RunPaths, order: WorkerOrder, show: Callable[[str], None]) -> WorkerOutcome:
    """Runs the worker of a prepared run to its end.

    Args:
        paths: The run directory.
        order: What the worker does.
        show: Called with every line that the worker reports.

    Raises:
        LaunchError: When the worker ends without saying how.
    """
    environment = {**os.environ, **worker_environment(order.job.hardware, os.environ)}
    for leftover in (paths.outcome(0), paths.measured(0), paths.pid(0)):
        leftover.unlink(missing_ok=True)
    return supervise(paths, worker_command(paths), environment, show)


def supervise(
    paths: RunPaths,
    command: Sequence[str],
    environment: Mapping[str, str],
    show: Callable[[str], None],
) -> WorkerOutcome:
    """Starts a command in a process group of its own, follows it, and ends the whole group with it."""
    with paths.log.open("ab") as log:
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as failure:
            raise LaunchError(f"`{command[0]}` can't be started: {failure}") from failure
        try:
            _follow(child, paths, log, show)
        finally:
            end_group(child.pid)
            child.wait()
    return _outcome(paths, child.returncode)


def _follow(
    child: subprocess.Popen[bytes], paths: RunPaths, log: IO[bytes], show: Callable[[str], None]
) -> None:
    """Reads the child's output until it ends; a first interrupt lets it save, a second one ends it."""
    interrupted = False
    deadline: float | None = None
    while True:
        try:
            _relay(child, log, show)
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            deadline = time.monotonic() + SAVE_GRACE_SECONDS
            _interrupt(child, paths)
        if deadline is not None and not _ends_before(child, log, show, deadline):
            return


def _ends_before(
    child: subprocess.Popen[bytes], log: IO[bytes], show: Callable[[str], None], deadline: float
) -> bool:
    """Follows an interrupted child; a timer ends it if it does not save in time."""
    previous = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, deadline - time.monotonic()))
    try:
        _relay(child, log, show)
    except (KeyboardInterrupt, TimeoutError):
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return False


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError


def _relay(child: subprocess.Popen[bytes], log: IO[bytes], show: Callable[[str], None]) -> None:
    stream = child.stdout
    if stream is None:
        return
    for raw in stream:
        log.write(raw)
        log.flush()
        line = raw.decode("utf-8", errors="replace").rstrip("\n")
        if line.startswith(WORKER_MARK):
            show(line.removeprefix(WORKER_MARK))
    child.wait()


def _interrupt(child: subprocess.Popen[bytes], paths: RunPaths) -> None:
    """Asks the worker itself to stop; its parents in the group end when it does."""
    with suppress(OSError, ValueError):
        os.kill(int(paths.pid(0).read_text()), signal.SIGINT)
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)


def end_group(group: int) -> None:
    """Ends every process of a group, gently at first; returns when none is left."""
    for number, patience in ((signal.SIGTERM, TERM_GRACE_SECONDS), (signal.SIGKILL, TERM_GRACE_SECONDS)):
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(group, os.WNOHANG)
            try:
                os.killpg(group, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)


def _outcome(paths: RunPaths, returncode: int) -> WorkerOutcome:
    if paths.outcome(0).exists():
        return read_document(paths.outcome(0), WorkerOutcome)
    how = f"exit code {returncode}"
    hint = f"the whole log is `{paths.log}`"
    if returncode < 0 or returncode > 128:
        number = -returncode if returncode < 0 else returncode - 128
        with suppress(ValueError):
            how = f"signal {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            hint = f"the kernel's out-of-memory killer ends processes so; {hint}"
        if number == signal.SIGINT:
            raise Interrupted("stopped before the training began; there is nothing to save")
    raise LaunchError(f"the worker ended with {how} and left no outcome\n{log_tail(paths.log)}", hint)


def log_tail(log: Path) -> str:
    """The last lines of a log."""
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:])


def raise_for_outcome(outcome: WorkerOutcome, paths: RunPaths, world_size: int = 1) -> None:
    """Turns an end that is not a good one into the error with its exit code.

    Raises:
        LauncherError: Of the kind that the outcome names.
    """
    if outcome.status is Status.DONE:
        if outcome.world_size != world_size:
            raise LaunchError(
                f"{outcome.world_size} processes ran, the plan has {world_size}",
                "accelerate chose another way to launch; see the log",
            )
        return
    kinds: Mapping[Status, type[LauncherError]] = {
        Status.INTERRUPTED: Interrupted,
        Status.OUT_OF_MEMORY: WorkerOutOfMemory,
        Status.DATA_ERROR: DataError,
        Status.FAILED: LaunchError,
    }
    hint = f"the whole log is `{paths.log}`"
    if outcome.status is Status.INTERRUPTED:
        hint = f"`launch resume={paths.root}` continues"
    message, _, own_hint = outcome.message.partition("\n\nhint: ")
    raise kinds[outcome.status](message, own_hint or hint)
