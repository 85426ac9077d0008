"""The ledger: run directories, their records, and the way back into an unfinished run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from launcher.checkpoints import last_checkpoint
from launcher.documents import read_document, write_document
from launcher.errors import ConfigError, LaunchError
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, WorkerOrder


@dataclass(frozen=True)
class Ledger:
    """The runs below a folder."""

    records: tuple[RunRecord, ...]
    """Newest first."""
    notes: tuple[str, ...]
    """Run directories without a record that can be read, and why."""


def new_run_dir(root: Path, recipe: str, now: datetime) -> Path:
    """A run directory that does not exist yet: `<root>/<UTC time>-<recipe>`; it is not made.

    Args:
        root: Folder of run directories.
        recipe: Name of the recipe; what no file name should hold becomes `-`.
        now: The time, with its zone.
    """
    name = re.sub(r"[^\w.]+", "-", recipe).strip("-.") or "job"
    stem = f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{name}"
    candidates = (root / (stem if n == 1 else f"{stem}-{n}") for n in count(1))
    return next(path for path in candidates if not path.exists())


def write_record(paths: RunPaths, record: RunRecord) -> None:
    """Writes the record of a run."""
    write_document(paths.record, record)


def find_records(root: Path) -> Ledger:
    """Reads the record of a run directory, or those of all run directories in a folder.

    A run without a readable record is left out and noted. A folder that does not exist holds no runs.
    """
    records: list[tuple[datetime, RunRecord]] = []
    notes: list[str] = []
    for paths in _run_dirs(root):
        if not paths.record.exists():
            notes.append(f"`{paths.root}` has no record: the run has not ended, or was ended from outside")
            continue
        try:
            record = read_document(paths.record, RunRecord)
            records.append((_start_of(record), record))
        except (LaunchError, OSError, ValueError) as failure:
            notes.append(f"`{paths.record}` can't be read: {_first_cause(failure)}")
    records.sort(key=lambda item: item[0], reverse=True)
    return Ledger(tuple(record for _, record in records), tuple(notes))


def previous_run(root: Path) -> WorkerOrder:
    """The order of a run that is to be continued.

    Raises:
        ConfigError: When the folder is no run directory, or holds no whole checkpoint.
        LaunchError: When its order can't be read.
    """
    paths = RunPaths(root)
    if not paths.worker.is_file():
        raise ConfigError(f"`resume={root}` is not a run directory", "it must hold worker.json")
    if last_checkpoint(paths.checkpoints) is None:
        raise ConfigError(
            f"`resume={root}` holds no whole checkpoint",
            "set `training.save_steps` so that a run leaves some; an interrupted run saves one by itself",
        )
    return read_document(paths.worker, WorkerOrder)


def _run_dirs(root: Path) -> list[RunPaths]:
    """The run directory itself, or those in a folder; hidden ones are still being written."""
    if _is_run_dir(root):
        return [RunPaths(root)]
    below = sorted(root.iterdir()) if root.is_dir() else []
    return [RunPaths(path) for path in below if not path.name.startswith(".") and _is_run_dir(path)]


def _is_run_dir(path: Path) -> bool:
    paths = RunPaths(path)
    return paths.record.exists() or paths.worker.exists()


def _start_of(record: RunRecord) -> datetime:
    """Start time of a run; ValueError when it is none."""
    started = datetime.fromisoformat(record.started)
    return started if started.tzinfo else started.replace(tzinfo=UTC)


def _first_cause(failure: Exception) -> str:
    """One line of what went wrong; for a document, what its reader said first."""
    cause = failure.__cause__ or failure
    return " ".join(line.strip() for line in str(cause).splitlines()[:3])
