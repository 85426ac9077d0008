"""How several ranks ended, as one answer: which rank failed first, on which host, and why.

One failure draws others after it: ranks that lose a peer fail too, and torchrun ends the rest. torchrun says in the log
which processes it saw fail first (torch 2.9 to 2.13, distributed/elastic/multiprocessing/errors), and each rank that
could leaves an outcome of its own.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from launcher.documents import read_document
from launcher.memory import Phase
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOutcome

FAILURE: Final = re.compile(
    r"host\s+: (?P<host>\S+)\s+rank\s+: (?P<rank>\d+) \(local_rank: \d+\)\s+exitcode\s+: (?P<code>-?\d+) \(pid: \d+\)"
)
"""How torchrun words a process that failed."""
RANK_LOG_BYTES: Final = 1 << 20
"""How much of a log's end is searched for the lines of one rank."""
TAIL_LINES: Final = 20
PRECEDENCE: Final = (Status.OUT_OF_MEMORY, Status.DATA_ERROR, Status.FAILED, Status.INTERRUPTED)
"""Which end tells most about a run, of those that its ranks had."""


@dataclass(frozen=True)
class KilledRank:
    """A rank that ended before it could say anything."""

    rank: int
    """Which one."""
    host: str
    """Its machine."""
    how: str
    """What ended it: `signal SIGKILL`, `exit code 1`."""


def read_outcomes(paths: RunPaths, world_size: int) -> tuple[WorkerOutcome, ...]:
    """The outcomes that ranks left, in order."""
    files = [paths.outcome(rank) for rank in range(world_size)]
    return tuple(read_document(file, WorkerOutcome) for file in files if file.exists())


def noted_phase(paths: RunPaths, rank: int) -> Phase | None:
    """The phase that a rank was in last; None where it noted none."""
    with suppress(OSError, ValueError):
        return Phase(paths.phase(rank).read_text(encoding="ascii"))
    return None


def deciding_outcome(outcomes: Sequence[WorkerOutcome], world_size: int) -> WorkerOutcome | None:
    """The outcome that stands for the run: the earliest of the worst kind; None when no rank left a bad one.

    All ranks done: that of rank 0. A failure's message names its rank and host.
    """
    for status in PRECEDENCE:
        found = [outcome for outcome in outcomes if outcome.status is status]
        if found:
            first = min(found, key=lambda outcome: outcome.ended_at_seconds)
            return replace(first, message=f"rank {first.rank} on host {first.host}: {first.message}")
    return outcomes[0] if len(outcomes) == world_size else None


def killed_rank(logs: Sequence[Path], outcomes: Sequence[WorkerOutcome], begins_at: int) -> KilledRank | None:
    """The first rank that ended and left no outcome; None when there is none.

    SIGTERM doesn't count: that is how torchrun ends the others. Where a library's C code calls `exit` there is no signal.

    Args:
        logs: Logs of the machines.
        outcomes: What the ranks left.
        begins_at: Offset in bytes before which the first log is of an earlier run.
    """
    spoke = {outcome.rank for outcome in outcomes}
    for log in logs:
        for failure in reversed(list(FAILURE.finditer(_end_of(log, begins_at)))):  # the root cause comes last
            code, rank = int(failure["code"]), int(failure["rank"])
            if code and -code != signal.SIGTERM and rank not in spoke:
                return KilledRank(rank, failure["host"], _worded(code))
    return None


def _worded(code: int) -> str:
    with suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def rank_tail(logs: Sequence[Path], rank: int, begins_at: int) -> tuple[str, ...]:
    """The last lines that one rank printed, of a progress bar what was last seen of it."""
    mark = f"[rank {rank}] "
    for log in logs:
        lines = (line.rstrip("\r").rpartition("\r")[2] for line in _end_of(log, begins_at).split("\n"))
        own = [line.partition(mark)[2] for line in lines if mark in line]
        kept = [line for line in own if line.strip()]
        if kept:
            return tuple(kept[-TAIL_LINES:])
    return ()


def _end_of(log: Path, begins_at: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(min(begins_at, log.stat().st_size), log.stat().st_size - RANK_LOG_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def redact_rank_logs(paths: RunPaths, secrets: Mapping[str, str]) -> None:
    """Strikes secrets out of the files that torchrun keeps of each rank's output, which pass by the launcher.

    In place and at their length: other machines may still write into theirs.

    Args:
        paths: The run directory.
        secrets: As `launcher.redaction.secrets_of` gives them.
    """
    for file in paths.logs.rglob("*.log"):
        with suppress(OSError):
            text = bytearray(file.read_bytes())
            for value in sorted((secret.encode() for secret in secrets), key=len, reverse=True):
                mask = f"[{secrets[value.decode()]}]".encode()[: len(value)].ljust(len(value), b"*")
                while (at := text.find(value)) >= 0:
                    text[at : at + len(value)] = mask
                    with file.open("r+b") as stream:
                        stream.seek(at)
                        stream.write(mask)
