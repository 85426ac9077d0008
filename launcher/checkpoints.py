"""Checkpoints on disk: written aside, sealed with a list of their files, renamed; torn ones are told from whole ones.

checkpoints/.partial/checkpoint-12/      being written
checkpoints/checkpoint-12/seal.json      whole: every file with its size and digest
checkpoints/torn-checkpoint-9/           does not match its seal; never read again, and gone when there is a newer one
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launcher.documents import read_document, sync_folder, write_document
from launcher.errors import LaunchError

CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")
"""Name of a checkpoint folder, as transformers' `get_last_checkpoint` recognises it."""
PARTIAL: Final = ".partial"
"""Folder in which checkpoints are written."""
REPLACED: Final = "replaced-"
"""What the name begins with of a checkpoint that gives its place to another one of the same step."""
SEAL: Final = "seal.json"
FULL_BYTES: Final = 1 << 20
"""A file system with less than this is full."""
TORN: Final = "torn-"
"""What the name of a checkpoint begins with that does not match its seal."""


@dataclass(frozen=True)
class SealedFile:
    """One file of a checkpoint."""

    num_bytes: int
    """Its size."""
    sha256: str
    """Its digest."""


@dataclass(frozen=True)
class Seal:
    """What a checkpoint consists of, written when all of it was."""

    files: Mapping[str, SealedFile]
    """By path below the checkpoint's folder."""


def seal(folder: Path) -> None:
    """Makes sure that all of a checkpoint is on disk, and writes down what it is.

    Raises:
        OSError: When it can't be.
    """
    files, found = {}, _files(folder)
    for file in found:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[file.relative_to(folder).as_posix()] = SealedFile(file.stat().st_size, digest)
    for below in {file.parent for file in found} - {folder}:
        sync_folder(below)
    write_document(folder / SEAL, Seal(files))


def publish(partial: Path, folder: Path) -> Path:
    """Gives a sealed checkpoint its place beside the others, at once or not at all; returns the place."""
    place, before = folder / partial.name, partial.with_name(REPLACED + partial.name)
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():  # of the same step: the run went back, and came here again
        place.rename(before)
    partial.rename(place)
    sync_folder(folder)
    shutil.rmtree(before, ignore_errors=True)
    return place


def damage(folder: Path, *, digests: bool = True) -> str:
    """What is wrong with a checkpoint; empty when it is whole.

    Args:
        folder: The checkpoint.
        digests: Whether to read the files; else their sizes have to do.
    """
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}: it was not written to the end"
    try:
        sealed = read_document(folder / SEAL, Seal)
    except LaunchError:
        return f"its {SEAL} can't be read"
    for name, known in sealed.files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known.num_bytes:
            return f"{name} has {file.stat().st_size} bytes, not {known.num_bytes}"
        if digests:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != known.sha256:
                    return f"{name} does not match its digest"
    return ""


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, by the sizes of its files; None when there is none.

    Args:
        folder: Where checkpoints lie.
    """
    return next(whole_checkpoints(folder), None)


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The whole checkpoints by the sizes of their files, that with the most steps first.

    Args:
        folder: Where checkpoints lie.
    """
    found = sorted(_checkpoints(folder), key=step_of, reverse=True)
    return (path for path in found if not damage(path, digests=False))


def set_torn_aside(folder: Path) -> tuple[str, ...]:
    """Renames checkpoints that are not whole, from the newest to the first whole one; returns what was wrong.

    What was being written when a run ended is removed; what was sealed by then, and had no place yet, gets it. Of all
    that were ever set aside the one with the most steps stays, to be looked at: each is as large as a whole one.

    Args:
        folder: Where checkpoints lie.
    """
    _place_sealed(folder)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    notes = []
    for path in sorted(_checkpoints(folder), key=step_of, reverse=True):
        wrong = damage(path)
        if not wrong:
            break
        aside = path.with_name(TORN + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        notes.append(f"passing over {path.name}: {wrong}")
    torn = [path for path in folder.glob(f"{TORN}*") if CHECKPOINT.fullmatch(path.name.removeprefix(TORN))]
    for path in sorted(torn, key=step_of)[:-1]:
        shutil.rmtree(path, ignore_errors=True)
        notes.append(f"removed {path.name}: the newest torn checkpoint is kept")
    return tuple(notes)


def _place_sealed(folder: Path) -> None:
    """Between a seal and its checkpoint's place a run may have been ended; and while one took the place of another."""
    for prefix in ("", REPLACED):
        for path in (folder / PARTIAL).glob(f"{prefix}checkpoint-*"):
            place = folder / path.name.removeprefix(prefix)
            if CHECKPOINT.fullmatch(place.name) and not place.exists() and not damage(path):
                path.rename(place)
                sync_folder(folder)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint holds, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
