"""Rows as they are found: in files, in folders of files, on the hub, or built in; unchecked but for their JSON."""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Final

import datasets

from launcher.errors import ConfigError, DataError
from launcher.job import DataSpec
from launcher.units import format_bytes
from launcher.worker.python_docs import PYTHON_DOCS, SourceRow, rows_of_python_docs

BUILTIN_PREFIX: Final = "builtin:"
FILE_SUFFIXES: Final = (".json", ".jsonl")
LEGAL_SUFFIXES: Final = " or ".join(FILE_SUFFIXES)
FILE_HINT: Final = "the file must hold a JSON array, or one JSON object a line"
READ_HINT: Final = "give a path that this user may read"
LONGEST_ROW_BYTES: Final = 64 << 20
"""No example is so long: no model has a context of millions of tokens, and a tokenizer takes minutes for it, and many
times its size in memory."""
TOO_LONG_HINT: Final = "end each example with a line break, and cut long texts into several examples"
HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_rows(data: DataSpec) -> Iterator[SourceRow]:
    """Finds out what `data.path` is and reads it, lazily where it can be.

    Raises:
        ConfigError: When it is empty, or names a built-in data set that there is not.
        DataError: When nothing is there, or what is there can't be read.
    """
    if not data.path:
        raise ConfigError("data.path is empty", hint=f"give a file, a folder, a hub id, or `{PYTHON_DOCS}`")
    if data.path.startswith(BUILTIN_PREFIX):
        if data.path != PYTHON_DOCS:
            raise ConfigError(f"there is no built-in data set `{data.path}`; there is `{PYTHON_DOCS}`")
        return rows_of_python_docs()
    local = Path(data.path)
    try:
        local = local.expanduser()
        if local.is_dir():
            return itertools.chain.from_iterable(map(_rows_of_file, _files_of(local)))
        if local.is_file():
            return _rows_of_file(local)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        raise DataError(f"can't read {local}: {error}", hint=READ_HINT) from error
    if HUB_ID.fullmatch(data.path) and local.suffix.lower() not in FILE_SUFFIXES:
        return _rows_of_hub(data.path, data.split)
    raise DataError(
        f"there is no file or folder {local}",
        hint=f"legal: a {LEGAL_SUFFIXES} file, a folder of them, a hub id, or `{PYTHON_DOCS}`",
    )


def _files_of(folder: Path) -> list[Path]:
    """The data files right inside a folder, by name; DataError when there are none."""
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in FILE_SUFFIXES and file.is_file()
    )
    if not files:
        raise DataError(
            f"folder {folder} holds no {LEGAL_SUFFIXES} files",
            hint="name the folder that they lie in: folders below it are not read",
        )
    return files


def _rows_of_file(file: Path) -> Iterator[SourceRow]:
    """Reads a JSON array, or one JSON object a line, whichever the first character announces."""
    if file.suffix.lower() not in FILE_SUFFIXES:
        raise DataError(f"{file} is no {LEGAL_SUFFIXES} file", hint="convert it to one object a line")
    number = 0
    try:
        with file.open("rb") as stream:
            read_values = _values_of_array if _opens_array(stream) else _values_of_lines
            values = read_values(file, stream)
            for number, (line, value) in enumerate(values, start=1):
                where = f"{file}, row {number}" + (f" (line {line})" if line else "")
                if not isinstance(value, dict):
                    raise DataError(f"{where}: expected an object, found {kind_of(value)}", hint=FILE_HINT)
                yield SourceRow(where, value)
    except OSError as error:
        raise DataError(f"can't read {file}: {error}", hint=READ_HINT) from error
    if number == 0:
        raise DataError(f"{file} holds no examples", hint=FILE_HINT)


def _opens_array(stream: IO[bytes]) -> bool:
    """Whether the first character that is no white space opens an array.

    Leaves the stream at its beginning, or behind the byte order mark that Windows programs put there.
    """
    start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stream.seek(start)
    opening = next(filter(None, map(bytes.strip, iter(lambda: stream.read(1 << 16), b""))), b"")
    stream.seek(start)
    return opening.startswith(b"[")


def _values_of_array(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Parses a whole file as one JSON array; line numbers are unknown (0)."""
    values = _parsed(stream.read().rstrip(), file, first_line=1)
    if isinstance(values, list):
        yield from ((0, value) for value in values)


def _values_of_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Parses one JSON value a line; blank lines are skipped. Lines count from 1."""
    read_line = partial(stream.readline, LONGEST_ROW_BYTES + 1)
    for line_number, line in enumerate(iter(read_line, b""), start=1):
        if len(line) > LONGEST_ROW_BYTES:
            raise DataError(
                f"{file}, line {line_number}: longer than {format_bytes(LONGEST_ROW_BYTES)}",
                hint=TOO_LONG_HINT,
            )
        if line.strip():
            yield line_number, _parsed(line.rstrip(), file, first_line=line_number)


def _parsed(encoded: bytes, file: Path, first_line: int) -> object:
    """Parses JSON that begins at a line of a file; DataError names the line that is malformed."""
    if (place := encoded.find(0)) >= 0 and not encoded.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        line = first_line + encoded.count(b"\n", 0, place)
        raise DataError(
            f"{file}, line {line}: a NUL byte, which no text has",
            hint="the file was damaged, say by a full disk or a lost connection, or is UTF-16: make it again, as UTF-8",
        )
    try:
        parsed: object = json.loads(encoded.decode())
    except UnicodeDecodeError as error:
        line = first_line + encoded.count(b"\n", 0, error.start)
        raise DataError(f"{file}, line {line}: not UTF-8 text", hint="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{file}, line {line}: malformed JSON: {error.msg}", hint=FILE_HINT) from error
    except (ValueError, RecursionError) as error:  # thousands of digits in a number, thousands of brackets
        raise DataError(f"{file}, line {first_line}: unreadable JSON: {error}", hint=FILE_HINT) from error
    return parsed


def _rows_of_hub(hub_id: str, split: str) -> Iterator[SourceRow]:
    """Loads one split of a hub data set; every failure of the hub or its files is a DataError."""
    try:
        loaded = datasets.load_dataset(hub_id, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"can't load split `{split}` of the hub data set `{hub_id}`: {error}",
            hint=f"check the id, the split and the network; there is no local file or folder {hub_id} either",
        ) from error
    return (SourceRow(f"{hub_id} [{split}], row {number}", row) for number, row in enumerate(loaded, start=1))


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    words = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else words.get(type(value), type(value).__name__)
