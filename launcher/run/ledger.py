"""The ledger: run directories, their records, and the way back into an unfinished run."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from launcher.checkpoints import last_checkpoint
from launcher.documents import from_json, read_document, write_document
from launcher.errors import ConfigError, LaunchError
from launcher.run.ledger_file import NAME, LeftAlone, Row, is_damage, read_rows, set_aside, write_rows
from launcher.run_paths import RunPaths, run_of
from launcher.run_record import Replan, RunRecord, Status, WorkerOrder


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
    """Writes the record of a run into its directory, and into the ledger of the folder that this lies in.

    A ledger that can't be written is no reason to fail: it takes the record from the directory later.
    """
    write_document(paths.record, record)
    with suppress(sqlite3.Error, LeftAlone, OSError):
        write_rows(paths.root.parent, [_row_of(paths)])


def find_records(root: Path) -> Ledger:
    """Reads the record of a run directory, or those of all runs in a folder: of its ledger, and of its directories.

    A run without a readable record is left out and noted. A folder that does not exist holds no runs.
    """
    if _is_run_dir(root):
        return _parsed([_row_of(RunPaths(root))] if RunPaths(root).record.exists() else [], _unended([root]))
    found = [paths for paths in _run_dirs(root) if paths.record.exists()]
    notes = _unended(paths.root for paths in _run_dirs(root) if not paths.record.exists())
    rows: dict[str, Row] = {}
    try:
        rows = {row.run_dir: row for row in read_rows(root)}
    except LeftAlone as failure:
        notes.append(f"`{root / NAME}` is left alone: {failure}")
        return _parsed([_row_of(paths) for paths in found], notes)
    except sqlite3.Error as failure:
        notes.append(_unreadable(root, failure))
    fresh = []
    for paths in found:
        known = rows.get(str(paths.root.resolve()))
        if known is None or known.changed_ns != paths.record.stat().st_mtime_ns:
            fresh.append(_row_of(paths))
    if fresh:
        rows |= {row.run_dir: row for row in fresh}
        with suppress(sqlite3.Error, LeftAlone, OSError):  # what can't be written is still read
            write_rows(root, fresh)
    return _parsed(rows.values(), notes)


def _unreadable(root: Path, failure: sqlite3.Error) -> str:
    """What became of a ledger that can't be read: a damaged one is set aside, any other is left alone."""
    note = f"`{root / NAME}` can't be read ({failure})"
    if is_damage(failure):
        with suppress(OSError):  # a folder that can't be written
            return f"{note}; it is set aside as `{set_aside(root).name}`"
    return f"{note}; only runs whose directories are there are listed"


def _row_of(paths: RunPaths) -> Row:
    root = paths.root.resolve()
    return Row(str(root), paths.record.stat().st_mtime_ns, paths.record.read_text("utf-8", "replace"))


def _unended(roots: Iterable[Path]) -> list[str]:
    return [
        f"`{root}` has no record: the run has not ended, or was ended from outside"
        for root in roots
        if not RunPaths(root).record.exists()
    ]


def _parsed(rows: Iterable[Row], notes: list[str]) -> Ledger:
    records: list[tuple[datetime, RunRecord]] = []
    for row in rows:
        try:
            record = from_json(RunRecord, row.record)
            records.append((_start_of(record), record))
        except ValueError as failure:
            notes.append(f"`{RunPaths(Path(row.run_dir)).record}` can't be read: {_first_cause(failure)}")
    records.sort(key=lambda item: item[0], reverse=True)
    return Ledger(tuple(record for _, record in records), tuple(notes))


def previous_run(root: Path) -> WorkerOrder:
    """The order of a run that is to be continued: from its last whole checkpoint, or from the beginning.

    Raises:
        ConfigError: When the folder is no run directory, its order can't be read, or the run is done and left nothing
            to continue from.
    """
    paths = run_of("resume", root)
    order = read_order(paths)
    if _is_done(paths) and last_checkpoint(paths.checkpoints) is None:
        raise ConfigError(
            f"`resume={root}` is done, and holds no whole checkpoint to continue from",
            "set `training.save_steps` so that a run leaves some",
        )
    return order


def read_order(paths: RunPaths) -> WorkerOrder:
    """What the workers of a run do.

    Raises:
        ConfigError: When the file does not say.
    """
    try:
        return read_document(paths.worker, WorkerOrder)
    except LaunchError as failure:
        last = last_checkpoint(paths.checkpoints)
        kept = "" if last is None else f"; {last.name} is whole, and is left as it is"
        raise ConfigError(
            f"`{paths.worker}` can't be read: {_first_cause(failure)}{kept}",
            f"put a copy of it back, or start the job, which `{paths.job.name}` beside it holds, in another `run_dir`",
        ) from failure


def _is_done(paths: RunPaths) -> bool:
    """Whether a record says so; one that can't be read is no reason not to go on."""
    with suppress(LaunchError):
        return read_document(paths.record, RunRecord).outcome.status is Status.DONE
    return False


def read_replans(paths: RunPaths) -> tuple[Replan, ...]:
    """The changes of plan of a run so far, oldest first; none where the file is not there, or is damaged."""
    with suppress(LaunchError):
        return read_document(paths.replans, tuple[Replan, ...])
    return ()


def note_replan(paths: RunPaths, replan: Replan) -> None:
    """Adds one to the changes of plan of a run.

    Raises:
        LaunchError: When it can't be written.
    """
    try:
        write_document(paths.replans, (*read_replans(paths), replan))
    except OSError as failure:
        raise LaunchError(
            f"`{paths.replans}` can't be written: {failure}", "see that its disk has room"
        ) from failure


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
