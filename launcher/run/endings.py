"""How a run ended: the outcome that its workers left, or what the log says where they left none."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from launcher.checkpoints import FULL_BYTES, last_checkpoint
from launcher.errors import DataError, Interrupted, LauncherError, LaunchError, Terminated, WorkerOutOfMemory
from launcher.plan import Plan
from launcher.run.ranks import KilledRank, deciding_outcome, killed_rank, rank_tail, read_outcomes
from launcher.run.supervise import Ending
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, Status, WorkerOutcome

LOG_TAIL_LINES: Final = 20
LOG_TAIL_BYTES: Final = 1 << 16
"""How much of the log's end is read."""
LONGEST_LINE: Final = 400
"""Characters shown of a line of the log."""
KILLED_BELOW: Final = re.compile(r"died with <Signals\.(\w+): \d+>")
"""How Python words it in the log when a signal ends accelerate's child; accelerate itself exits with 1."""
ABORTED: Final = re.compile(r"std::bad_alloc|memory allocation of \d+ bytes failed")
"""What C++ (libstdc++, where no one catches the exception, as in a thread of gloo's) and Rust (alloc's
`handle_alloc_error`, in safetensors and tokenizers) say when an allocation failed, before they abort the process."""
EXITED: Final = re.compile(r"Error out of memory at line \d+ in file ")
"""What bitsandbytes' C++ says (csrc/ops.cuh, `CUDA_CHECK_RETURN`; 0.39 to 0.50) before it calls `exit(1)`."""
ERRORS: Final[Mapping[Status, type[LauncherError]]] = {
    Status.INTERRUPTED: Interrupted,
    Status.TERMINATED: Terminated,
    Status.OUT_OF_MEMORY: WorkerOutOfMemory,
    Status.DATA_ERROR: DataError,
    Status.FAILED: LaunchError,
}


def read_outcome(paths: RunPaths, plan: Plan, ending: Ending) -> WorkerOutcome:
    """What the workers left of how they ended.

    Raises:
        Interrupted: When they were stopped before they could say how they ended.
        LaunchError: When they ended without saying how.
        WorkerOutOfMemory: When the kernel ended one of them for want of memory, or it aborted.
    """
    outcome = _read_outcome(paths, plan, ending)
    if outcome.status is Status.INTERRUPTED and ending.terminated:
        return replace(outcome, status=Status.TERMINATED)
    return outcome


def _read_outcome(paths: RunPaths, plan: Plan, ending: Ending) -> WorkerOutcome:
    outcomes = read_outcomes(paths, plan.world_size)
    if plan.world_size == 1 and outcomes:
        return outcomes[0]
    logs = [paths.node_log(node) for node in range(plan.num_nodes)]
    if (killed := killed_rank(logs, outcomes, ending.log_begins_at)) and not ending.interrupted:
        _raise_killed(killed, rank_tail(logs, killed.rank, ending.log_begins_at), paths, ending)
    decided = deciding_outcome(outcomes, plan.world_size)
    if ending.stopped_because and (decided is None or decided.status in (Status.FAILED, Status.DONE)):
        raise LaunchError(ending.stopped_because, f"the whole log is `{paths.log}`")
    if decided is not None:
        if decided.status is Status.FAILED:
            last_words = _quoted(rank_tail(logs, decided.rank, ending.log_begins_at))
            return replace(decided, message=f"{decided.message}\n{last_words}")
        return decided
    tail = log_tail(paths.log, ending.log_begins_at)
    killed_by = _signal_name(ending.exit_code, tail)
    hint = f"the whole log is `{paths.log}`"
    if ending.interrupted or killed_by == "SIGINT":
        raise (Terminated if ending.terminated else Interrupted)(
            "stopped before the worker had saved anything of its last steps", _resume_hint(paths)
        )
    how = f"signal {killed_by}" if killed_by else f"exit code {ending.exit_code}"
    if plan.world_size > 1:
        silent = sorted(set(range(plan.world_size)) - {outcome.rank for outcome in outcomes})
        how += f"; nothing is known of ranks {', '.join(map(str, silent[:8]))}"
    message = f"the worker ended with {how} and left no outcome\n{_quoted(tail)}".rstrip()
    if killed_by == "SIGKILL":
        _raise_for_kill(message, hint, ending)
    if _lacked_memory(how, _lines_of(paths.log, ending.log_begins_at)):
        raise WorkerOutOfMemory(message, hint)
    if shutil.disk_usage(paths.root).free < FULL_BYTES:
        hint = f"the file system of `{paths.root}` is full: make room, then `launch resume={paths.root}`"
    raise LaunchError(message, hint)


def _raise_killed(killed: KilledRank, tail: tuple[str, ...], paths: RunPaths, ending: Ending) -> NoReturn:
    message = (
        f"rank {killed.rank} on host {killed.host} ended with {killed.how} and left no outcome; "
        f"the other ranks were ended\n{_quoted(tail)}"
    ).rstrip()
    hint = f"the whole log is `{paths.log}`"
    if killed.how == "signal SIGKILL":
        _raise_for_kill(message, hint, ending, killed.rank)
    if _lacked_memory(killed.how, tail):
        raise WorkerOutOfMemory(message, hint, killed.rank)
    raise LaunchError(message, hint)


def _raise_for_kill(message: str, hint: str, ending: Ending, rank: int = 0) -> NoReturn:
    """A kill is for want of memory when the kernel counted one on this machine meanwhile."""
    if ending.memory_kills:
        why = f"the kernel ended {ending.memory_kills} processes for want of memory meanwhile"
        raise WorkerOutOfMemory(message, f"{why}; {hint}", rank)
    raise LaunchError(message, f"the kernel's out-of-memory killer ends processes so; {hint}")


def raise_for_outcome(outcome: WorkerOutcome, paths: RunPaths, world_size: int = 1) -> None:
    """Turns an end that is not a good one into the error with its exit code.

    Raises:
        LauncherError: Of the kind that the outcome names, as DataError; LaunchError when not as many processes took part
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
    if outcome.status in (Status.INTERRUPTED, Status.TERMINATED):
        own_hint = _resume_hint(paths)
    elif outcome.status is Status.DATA_ERROR and own_hint:
        raise DataError(message, own_hint)  # the log says no more, and may be gone with the run directory
    elif outcome.status is Status.OUT_OF_MEMORY:
        own_hint = own_hint or "a higher `planner.headroom` plans with more room"
    raise ERRORS[outcome.status](message, f"{own_hint}; {hint}" if own_hint else hint)


def left_nothing(outcome: WorkerOutcome, paths: RunPaths) -> bool:
    """Whether a run ended at its data before it had trained a step: then nothing in its directory is worth keeping."""
    if outcome.status is not Status.DATA_ERROR or outcome.steps:
        return False
    return not paths.metrics.exists() and last_checkpoint(paths.checkpoints) is None


def log_tail(log: Path, begins_at: int = 0) -> tuple[str, ...]:
    """The last lines of a log, of a progress bar what was last seen of it.

    Args:
        log: The log; one that does not exist has no lines.
        begins_at: Offset in bytes before which lines are of an earlier run.
    """
    return _lines_of(log, begins_at)[-LOG_TAIL_LINES:]


def _lines_of(log: Path, begins_at: int) -> tuple[str, ...]:
    """The lines of a log's last `LOG_TAIL_BYTES`."""
    if not log.exists():
        return ()
    with log.open("rb") as stream:
        stream.seek(max(begins_at, log.stat().st_size - LOG_TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n"))
    return tuple(line for line in lines if line.strip())


def _lacked_memory(how: str, lines: Iterable[str]) -> bool:
    """Whether a process said that it ends for want of memory; accelerate's own traceback may come after that."""
    said = ABORTED if how.startswith("signal SIGABRT") else EXITED
    return any(said.search(line) for line in lines)


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
    if last_checkpoint(paths.checkpoints) is not None:
        return f"`launch resume={paths.root}` continues from the last checkpoint"
    return f"there is no checkpoint yet: `launch resume={paths.root}` begins anew"
