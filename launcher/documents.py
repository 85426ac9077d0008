"""Typed documents on disk: frozen dataclasses to JSON and back, written whole or not at all. Lines that are appended."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from launcher.errors import LaunchError

T = TypeVar("T")


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """Reads and writes a dataclass; made once per class, because that takes longer than a use of it."""
    return _adapter(kind)  # type: ignore[arg-type]  # every class can be hashed; mypy doubts it of type[T]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(value: object, indent: int | None = 2) -> str:
    """JSON text of a dataclass."""
    return adapter(type(value)).dump_json(value, indent=indent).decode()


def from_json(kind: type[T], text: str) -> T:
    """The dataclass that a JSON text describes.

    Raises:
        ValueError: When the text does not describe one.
    """
    return adapter(kind).validate_json(text)


def write_document(path: Path, value: object) -> None:
    """Writes a dataclass as JSON; a reader sees all of it or nothing, after a power loss too."""
    write_text(path, to_json(value) + "\n")


def write_text(path: Path, text: str, *, is_synced: bool = True) -> None:
    """Writes a text file; a reader sees all of it or nothing. See `write_bytes`."""
    write_bytes(path, text.encode(), is_synced=is_synced)


def write_bytes(path: Path, content: bytes, *, is_synced: bool = True) -> None:
    """Writes a file under a temporary name, then renames it.

    Args:
        path: The file; folders above it are made.
        content: All of it.
        is_synced: Whether it must outlive a power loss, after which a file that was renamed before its content was on
            disk can be empty. What is only kept to save time needs not, and syncing takes milliseconds.

    Raises:
        OSError: When it can't be; then nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if is_synced:
                os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if is_synced:
        sync_folder(path.parent)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON objects to a file, one a line; the line that a kill left torn is ended first.

    Raises:
        OSError: When it can't be.
    """
    with path.open("a+b") as stream:
        is_torn = stream.tell() > 0 and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        stream.write(b"\n" * is_torn + text.encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file to which they are appended, but those that are torn; none where there is no file."""
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # one that is being written, or in which a writer was killed
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on disk; some network file systems can't, and are let off."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_document(path: Path, kind: type[T]) -> T:
    """Reads a dataclass from JSON.

    Raises:
        LaunchError: When the file is missing or does not hold one.
    """
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise LaunchError(f"`{path}` does not exist", "is this a run directory?") from failure
    except (ValidationError, ValueError) as failure:
        raise LaunchError(f"`{path}` can't be read: {failure}", "remove it, or run again") from failure
