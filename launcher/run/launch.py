"""The door to the training process: writes its run directory, has it run, and reads how it ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from launcher.documents import read_document, write_document, write_text
from launcher.errors import DataError, Interrupted, LauncherError, LaunchError, WorkerOutOfMemory
from launcher.run.render import accelerate_config, command_script, worker_command, worker_environment
from launcher.run.supervise import SAVE_GRACE_SECONDS, Ending, supervise
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, Status, WorkerOrder, WorkerOutcome
from launcher.units import format_bytes

LOG_TAIL_LINES: Final = 20
LOG_TAIL_BYTES: Final = 1 << 16
"""How much of the log's end is read."""
LONGEST_LINE: Final = 400
"""Characters shown of a line of the log."""
KILLED_BELOW: Final = re.compile(r"died with <Signals\.(\w+): \d+>")
"""How Python words it in the log when a signal ends accelerate's child; accelerate itself exits with 1."""
ERRORS: Final[Mapping[Status, type[LauncherError]]] = {
    Status.INTERRUPTED: Interrupted,
    Status.OUT_OF_MEMORY: WorkerOutOfMemory,
    Status.DATA_ERROR: DataError,
    Status.FAILED: LaunchError,
}


def prepare_run(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes a run directory: all of it or nothing.

    It is made under another name and renamed. An empty folder that is there already (it may be a mount, or in
    a folder that can't be written) is filled instead, worker.json last.

    Raises:
        LaunchError: When the directory exists and is not empty, or can't be written.
    """
    root = paths.root
    partial = RunPaths(root.with_name(f".{root.name}.{os.getpid()}.partial"))
    try:
        if root.exists() and any(root.iterdir()):
            raise LaunchError(
                f"`{root}` exists and is not empty",
                "choose another `run_dir`, or continue it with `resume=<run dir>`",
            )
        if root.exists():
            _write_run_files(paths, paths, order, document)
        else:
            _write_run_files(partial, paths, order, document)
            partial.root.rename(root)
    except OSError as failure:
        raise LaunchError(f"`{root}` can't be written: {failure}", "choose another `run_dir`") from failure
    finally:
        shutil.rmtree(partial.root, ignore_errors=True)


def require_disk(root: Path, needed_bytes: int) -> None:
    """Checks that the file system of a run directory has room for what the run leaves there.

    Args:
        root: The run directory; it need not exist yet.
        needed_bytes: What the run writes.

    Raises:
        LaunchError: When it has not.
    """
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise LaunchError(
            f"`{root}` needs {needed_bytes} bytes ({format_bytes(needed_bytes)}) for checkpoints and models; its file "
            f"system has {free_bytes} bytes ({format_bytes(free_bytes)}) free",
            "another `run_dir`, a lower `training.save_total_limit`, or a higher `training.save_steps`",
        )


def _write_run_files(at: RunPaths, paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes the files of the run directory `paths` into the folder `at`; takes them back if one can't be."""
    hardware = order.job.hardware
    script = command_script(worker_command(paths), worker_environment(hardware, os.environ), os.getcwd())
    try:
        write_document(at.job, order.job)
        write_text(at.plan, json.dumps(document, indent=2) + "\n")
        write_text(at.accelerate_config, accelerate_config(hardware))
        write_text(at.command, script)
        at.command.chmod(_executable(at.command.stat().st_mode))
        write_document(at.worker, order)
    except BaseException:
        for file in (at.job, at.plan, at.accelerate_config, at.command, at.worker):
            file.unlink(missing_ok=True)
        raise


def _executable(mode: int) -> int:
    """Lets those run a file who may read it."""
    return mode | (mode & 0o444) >> 2


def launch_worker(
    paths: RunPaths,
    order: WorkerOrder,
    show: Callable[[str], None],
    grace_seconds: float = SAVE_GRACE_SECONDS,
) -> WorkerOutcome:
    """Runs the worker of a prepared run to its end.

    Args:
        paths: The run directory.
        order: What the worker does.
        show: Called with every line that the worker reports.
        grace_seconds: How long an interrupted worker may take to save.

    Raises:
        Interrupted: When it was stopped before it could say how it ended.
        LaunchError: When it ended without saying how.
    """
    environment = {**os.environ, **worker_environment(order.job.hardware, os.environ)}
    for leftover in (paths.outcome(0), paths.measured(0), paths.pid(0)):
        leftover.unlink(missing_ok=True)
    ending = supervise(worker_command(paths), environment, paths.log, paths.pid(0), show, grace_seconds)
    return read_outcome(paths, ending)


def read_outcome(paths: RunPaths, ending: Ending) -> WorkerOutcome:
    """What the worker left of how it ended.

    Raises:
        Interrupted: When it was stopped before it could say how it ended.
        LaunchError: When it ended without saying how.
    """
    if paths.outcome(0).exists():
        return read_document(paths.outcome(0), WorkerOutcome)
    tail = log_tail(paths.log, ending.log_begins_at)
    killed_by = _signal_name(ending.exit_code, tail)
    hint = f"the whole log is `{paths.log}`"
    if ending.interrupted or killed_by == "SIGINT":
        raise Interrupted(
            "stopped before the worker had saved anything of its last steps", _resume_hint(paths)
        )
    if killed_by == "SIGKILL":
        hint = f"the kernel's out-of-memory killer ends processes so; {hint}"
    how = f"signal {killed_by}" if killed_by else f"exit code {ending.exit_code}"
    raise LaunchError(f"the worker ended with {how} and left no outcome\n{_quoted(tail)}".rstrip(), hint)


def raise_for_outcome(outcome: WorkerOutcome, paths: RunPaths, world_size: int = 1) -> None:
    """Turns an end that is not a good one into the error with its exit code.

    Raises:
        LauncherError: Of the kind that the outcome names; LaunchError when not as many processes took part
            as were planned, because then the steps were not those of the plan.
    """
    hint = f"the whole log is `{paths.log}`"
    if outcome.status is Status.DONE:
        if outcome.world_size != world_size:
            raise LaunchError(
                f"{outcome.world_size} processes took part in the training, the plan has {world_size}",
                f"accelerate chose another way to launch; {hint}",
            )
        return
    message, _, own_hint = outcome.message.partition("\n\nhint: ")
    if outcome.status is Status.INTERRUPTED:
        own_hint = _resume_hint(paths)
    elif outcome.status is Status.OUT_OF_MEMORY:
        own_hint = own_hint or "a higher `planner.headroom` plans with more room"
    raise ERRORS[outcome.status](message, f"{own_hint}; {hint}" if own_hint else hint)


def log_tail(log: Path, begins_at: int = 0) -> tuple[str, ...]:
    """The last lines of a log, of a progress bar what was last seen of it.

    Args:
        log: The log; one that does not exist has no lines.
        begins_at: Offset in bytes before which lines are of an earlier run.
    """
    if not log.exists():
        return ()
    with log.open("rb") as stream:
        stream.seek(max(begins_at, log.stat().st_size - LOG_TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n"))
    return tuple(line for line in lines if line.strip())[-LOG_TAIL_LINES:]


def _quoted(lines: tuple[str, ...]) -> str:
    return "\n".join(f"  | {line.removeprefix(WORKER_MARK)[:LONGEST_LINE]}" for line in lines)


def _signal_name(exit_code: int, tail: tuple[str, ...]) -> str:
    """The signal that ended the worker, or empty: by the exit code, or by what the log says."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    with suppress(ValueError):
        return signal.Signals(number).name
    found = [match[1] for line in tail if (match := KILLED_BELOW.search(line))]
    return found[-1] if found else ""


def _resume_hint(paths: RunPaths) -> str:
    if any(paths.checkpoints.glob("checkpoint-*/trainer_state.json")):
        return f"`launch resume={paths.root}` continues from the last checkpoint"
    return "there is no checkpoint to continue from"
