"""The ledger's SQLite file: one row per run that has ended. Run directories are the truth; this is their memory.

A run's record lies in its own directory too, so a lost or damaged ledger is made anew from those that are still there;
what only the ledger still knows are runs whose directories were removed.

It is written ahead (WAL) where the file system is known to be this machine's own. SQLite's readers and writers of such a
file share memory, which those of two machines can't (sqlite.org/wal.html); elsewhere it has a rollback journal, which
needs nothing but the file system's locks.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import psutil

NAME: Final = "ledger.sqlite"
VERSION: Final = 1
"""Of the schema; in SQLite's `user_version`. Rows of an older one are read and written anew."""
PRIVATE: Final = 0o600
"""Mode of a ledger that is made: records tell of their user's data and models."""
BUSY_SECONDS: Final = 60.0
"""How long a writer waits for others."""
LOCAL: Final = frozenset(
    (
        "apfs",
        "bcachefs",
        "btrfs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "hfs",
        "overlay",
        "tmpfs",
        "ufs",
        "xfs",
        "zfs",
    )
)
"""File systems that one machine alone writes."""
DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
UNWRITABLE: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
"""What SQLite says of a file in a folder that can't be written: it keeps its journal there, even to read."""
SCHEMA: Final = """
create table runs (
    run_dir text primary key,
    changed_ns integer not null,
    record text not null
) without rowid
"""


@dataclass(frozen=True)
class Row:
    """One run, as the ledger keeps it."""

    run_dir: str
    """Its directory, absolute."""
    changed_ns: int
    """When the record in that directory was last changed."""
    record: str
    """The record, as JSON."""


class LeftAlone(Exception):
    """A ledger that this process must not touch, and why."""


class NewerLedger(LeftAlone):
    """The file was written by a later version of this package."""


class OthersLedger(LeftAlone):
    """The file is another user's."""


def read_rows(folder: Path) -> tuple[Row, ...]:
    """All rows of a folder's ledger; none where there is no ledger.

    Raises:
        LeftAlone: When it can't be read by this version, or this user.
        sqlite3.Error: When it can't be read at all.
    """
    if not (folder / NAME).is_file():
        return ()
    try:
        with _connected(folder) as connection:
            return _rows(connection)
    except sqlite3.Error as failure:
        if _code(failure) not in UNWRITABLE:
            raise
    # what a killed writer has left in its journal is not read so; the run's directory has it too
    address = f"file:{quote(str((folder / NAME).resolve()))}?mode=ro&immutable=1"
    with closing(sqlite3.connect(address, uri=True)) as connection:
        return _rows(connection)


def _rows(connection: sqlite3.Connection) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in connection.execute("select run_dir, changed_ns, record from runs"))


def is_damage(failure: sqlite3.Error) -> bool:
    """Whether a file that can't be read is damaged; else it is locked, or may not be opened, or its disk fails."""
    return _code(failure) in DAMAGED


def _code(failure: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None where it was not SQLite that failed."""
    code: int | None = getattr(failure, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a folder's ledger, or replaces them; all or none.

    Raises:
        NewerLedger: When it can't be written by this version.
        OthersLedger: When it can't be written by this user.
        OSError: When it can't be made.
        sqlite3.Error: When it can't be written at all.
    """
    values = [(row.run_dir, row.changed_ns, row.record) for row in rows]
    if (folder / NAME).exists() and not os.access(folder / NAME, os.W_OK):
        raise OthersLedger("this user may not write it")
    with _connected(folder) as connection:
        connection.execute("begin immediate")
        connection.executemany("insert or replace into runs values (?, ?, ?)", values)
        connection.execute("commit")


def set_aside(folder: Path) -> Path:
    """Renames a ledger that can't be read, with its journal; returns its new place."""
    aside = folder / f"{NAME}.damaged-{time.time_ns()}"
    for ending in ("", "-wal", "-shm"):
        file = folder / f"{NAME}{ending}"
        if file.exists():
            file.rename(aside.with_name(aside.name + ending))
    return aside


@contextmanager
def _connected(folder: Path) -> Iterator[sqlite3.Connection]:
    file = folder / NAME
    with suppress(FileExistsError):  # SQLite gives the files beside it the same mode
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, PRIVATE))
    if not os.access(file, os.R_OK):
        raise OthersLedger("this user may not read it")
    # autocommit: transactions begin where the code says so
    connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)
    with closing(connection):
        (version,) = connection.execute("pragma user_version").fetchone()
        if version > VERSION:
            raise NewerLedger(f"it has schema {version}, this version knows {VERSION}")
        _set_journal(connection, journal_mode(folder))
        connection.execute("pragma synchronous=full")
        if version < VERSION:
            _migrate(connection)
        yield connection


def journal_mode(folder: Path) -> str:
    """How the ledger of a folder is kept safe: `wal` on file systems of this machine alone, else `delete`."""
    return "wal" if file_system(folder) in LOCAL else "delete"


def file_system(folder: Path) -> str:
    """Type of the file system that a folder lies in, as the mount table words it; empty where there is none."""
    place = folder.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[above] for above in (place, *place.parents) if above in mounts), "")


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """Sets the journal's kind: written ahead, readers and a writer don't wait for each other."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute(f"pragma journal_mode={mode}")
            return
        except sqlite3.OperationalError as failure:
            # SQLite does not wait by itself here
            if "locked" not in str(failure) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection) -> None:
    """Makes the table, or makes it anew with the rows of an older one."""
    connection.execute("begin immediate")
    (version,) = connection.execute("pragma user_version").fetchone()
    if version < VERSION:  # nobody else did it meanwhile
        known = connection.execute(
            "select count(*) from sqlite_master where type='table' and name='runs'"
        ).fetchone()[0]
        old = connection.execute("select run_dir, record from runs").fetchall() if known else []
        connection.execute("drop table if exists runs")
        connection.execute(SCHEMA)
        connection.executemany(
            "insert into runs values (?, 0, ?)", old
        )  # 0: compared with the directory again
        connection.execute(f"pragma user_version={VERSION}")
    connection.execute("commit")
