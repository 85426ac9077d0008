"""The ledger: run directories, their records, and the way back into an unfinished run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

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
    """Run directories whose record can't be read, and why."""


def new_run_dir(root: Path, recipe: str, now: datetime) -> Path:
    """A run directory that does not exist yet: `<root>/<time>-<recipe>`."""
    stem = f"{now:%Y%m%d-%H%M%S}-{recipe}"
    candidates = (root / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def write_record(paths: RunPaths, record: RunRecord) -> None:
    """Writes the record of a run."""
    write_document(paths.record, record)


def find_records(root: Path) -> Ledger:
    """Reads the records of a run directory, or of all run directories in a folder."""
    records, notes = [], []
    files = [root / "record.json"] if (root / "record.json").exists() else sorted(root.glob("*/record.json"))
    for file in files:
        try:
            records.append(read_document(file, RunRecord))
        except LaunchError as failure:
            notes.append(failure.message.splitlines()[0])
    records.sort(key=lambda record: record.started, reverse=True)
    return Ledger(tuple(records), tuple(notes))


def previous_run(root: Path) -> WorkerOrder:
    """The order of a run that is to be continued.

    Raises:
        ConfigError: When the folder is no run directory, or holds no checkpoint.
    """
    paths = RunPaths(root)
    if not paths.worker.exists():
        raise ConfigError(f"`resume={root}` is not a run directory", "it must hold worker.json")
    if not any(paths.checkpoints.glob("checkpoint-*/trainer_state.json")):
        raise ConfigError(
            f"`resume={root}` holds no checkpoint",
            "set `training.save_steps` so that a run leaves some; an interrupted run saves one by itself",
        )
    return read_document(paths.worker, WorkerOrder)
