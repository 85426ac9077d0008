"""Training examples: read, recognised, checked, and laid out as TRL's SFTTrainer takes them.

    path --> SourceRow (one object, and where it came from) --> Layout --> Dataset

The chat layouts (`messages`, `alpaca`, `sharegpt`) become one column `messages`; `prompt_completion` and
`text` keep their columns. Other fields are dropped; those that would change what a row means (tools, images,
earlier turns) are an error.
"""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

import codecs
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, Protocol

import datasets
from datasets import Dataset, Features, Value, concatenate_datasets

from launcher.errors import ConfigError, DataError
from launcher.job import DataFormat, DataSpec, EvaluationSpec

BUILTIN_PREFIX: Final = "builtin:"
PYTHON_DOCS: Final = "builtin:python_docs"
FILE_SUFFIXES: Final = (".json", ".jsonl")
LEGAL_SUFFIXES: Final = " or ".join(FILE_SUFFIXES)
FILE_HINT: Final = "the file must hold a JSON array, or one JSON object a line"
HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ROWS_PER_CHUNK: Final = 10_000
"""Rows turned into Arrow at a time: what is held as Python objects when a file has one object a line."""


@dataclass(frozen=True)
class SourceRow:
    """One example as it was found."""

    where: str
    """File or data set, row counted from 1, and the line where lines count."""
    fields: Mapping[str, object]
    """The row's keys and values, unchecked."""


@dataclass(frozen=True)
class TurnKeys:
    """How a list of turns spells speaker, text and roles."""

    role: str
    """Key of the speaker."""
    text: str
    """Key of what was said."""
    roles: Mapping[str, str]
    """Legal speakers, and the role that each becomes."""


@dataclass(frozen=True)
class Layout:
    """One legal layout of a row."""

    name: DataFormat
    """Its name in the job."""
    required: tuple[str, ...]
    """Keys by which it is recognised."""
    described: str
    """Its keys, for error messages."""
    normalise: Callable[[SourceRow], dict[str, Any]]
    """Checks a row and lays it out for training; DataError names row and field."""


@dataclass(frozen=True)
class Elided:
    """Stands in a signature for a default that is not shown."""

    def __repr__(self) -> str:
        """The sign that Python's own stubs use."""
        return "..."


class HasChatTemplate(Protocol):
    """The part of a tokenizer that decides whether conversations can be rendered."""

    chat_template: Any


MESSAGE_KEYS: Final = TurnKeys("role", "content", {role: role for role in ("system", "user", "assistant")})
SHAREGPT_KEYS: Final = TurnKeys(
    "from",
    "value",
    {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
)
MORE_THAN_TEXT: Final = ("history", "tools", "tool_calls", "images", "videos", "audios")
"""Fields that change what a row means; a row that uses one is refused rather than half learnt."""


# -------------------------------------------------------------------------------------------- the two entries


def load_examples(data: DataSpec) -> Dataset:
    """Loads training examples in one of the layouts that TRL 1.16's SFTTrainer takes as they are.

    Args:
        data: Where the examples are and how they are laid out. `num_examples` keeps the first so many; rows
            after them are not even read.

    Returns:
        A data set with the columns `messages` (a list of `role` and `content`), or `prompt` and `completion`
        (both text, or both such lists), or `text`; at least one row.

    Raises:
        ConfigError: The path is empty, or names no built-in data set.
        DataError: The examples can't be found or read, their layout is not recognised, or a row is malformed.
    """
    rows = _read_rows(data)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{data.path} holds no examples")
    layout = _recognised(first) if data.format is DataFormat.AUTO else _layout_named(data.format)
    kept = itertools.islice(itertools.chain([first], rows), data.num_examples)
    return _as_dataset(kept, layout)


def split_examples(
    examples: Dataset, data: DataSpec, evaluation: EvaluationSpec
) -> tuple[Dataset, Dataset | None]:
    """Divides examples into those trained on and those held out.

    Args:
        examples: What `load_examples(data)` gave, in that order.
        data: How `evaluation.path`, where there is one, is read: same `format` and, on a hub, same `split`.
        evaluation: Whether and what to hold out. Without a path, the last `num_examples` of the training
            data; with one, the first `num_examples` there.

    Returns:
        The training examples, and the held-out ones or None when evaluation is off.

    Raises:
        ConfigError: `evaluation.path` names no built-in data set.
        DataError: Nothing would be left to train on, or `evaluation.path` can't be loaded.
    """
    if not evaluation.enabled:
        return examples, None
    if evaluation.path:
        elsewhere = replace(data, path=evaluation.path, num_examples=evaluation.num_examples)
        return examples, load_examples(elsewhere)
    num_trained = len(examples) - evaluation.num_examples
    if num_trained < 1:
        raise DataError(
            f"holding out {evaluation.num_examples} of {len(examples)} examples leaves none to train on",
            hint=f"set evaluation.num_examples below {len(examples)}, or give evaluation.path",
        )
    return examples.select(range(num_trained)), examples.select(range(num_trained, len(examples)))


def require_chat_template(tokenizer: HasChatTemplate, dataset: Dataset) -> None:
    """Raises DataError when examples are conversations and the tokenizer can't render them.

    Args:
        tokenizer: Any transformers tokenizer or processor.
        dataset: What `load_examples` gave.
    """
    first = dataset[0]
    is_conversational = "messages" in first or isinstance(first.get("prompt"), list)
    if is_conversational and not tokenizer.chat_template:
        raise DataError(
            "the examples are conversations, and the tokenizer has no chat template to render them with",
            hint="take the instruction-tuned variant of the model, or data in the layout `text` or "
            "`prompt_completion` with plain strings",
        )


def _as_dataset(rows: Iterator[SourceRow], layout: Layout) -> Dataset:
    """Normalises rows (at least one) chunk by chunk, so that memory holds Arrow and one chunk of objects."""
    examples = _normalised(rows, layout)
    chunks: list[Dataset] = []
    while chunk := list(itertools.islice(examples, ROWS_PER_CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=_features(chunk[0])))
    return concatenate_datasets(chunks)


def _normalised(rows: Iterator[SourceRow], layout: Layout) -> Iterator[dict[str, Any]]:
    """Normalises each row; DataError when text and message lists alternate, which no column can hold."""
    kinds: dict[str, str] = {}
    for row in rows:
        _require_text_only(row.fields, row.where)
        example = layout.normalise(row)
        for field, value in example.items():
            if kinds.setdefault(field, _kind(value)) != _kind(value):
                raise DataError(
                    f"{row.where}: `{field}` is {_kind(value)}, but was {kinds[field]} in the rows before",
                    hint="give all rows the same layout",
                )
        yield example


def _features(example: Mapping[str, Any]) -> Features:
    """Arrow types of a normalised example: text, or a list of role and content."""
    turns = [{"role": Value("string"), "content": Value("string")}]
    return Features(
        {name: turns if isinstance(value, list) else Value("string") for name, value in example.items()}
    )


# ------------------------------------------------------------------------------------------- reading the rows


def _read_rows(data: DataSpec) -> Iterator[SourceRow]:
    """Finds out what `data.path` is and reads it, lazily where it can be."""
    if not data.path:
        raise ConfigError("data.path is empty", hint=f"give a file, a folder, a hub id, or `{PYTHON_DOCS}`")
    if data.path.startswith(BUILTIN_PREFIX):
        if data.path != PYTHON_DOCS:
            raise ConfigError(f"there is no built-in data set `{data.path}`; there is `{PYTHON_DOCS}`")
        return _rows_of_python_docs()
    local = Path(data.path)
    try:
        local = local.expanduser()
        if local.is_dir():
            return itertools.chain.from_iterable(map(_rows_of_file, _files_of(local)))
        if local.is_file():
            return _rows_of_file(local)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        raise DataError(f"can't read {local}: {error}") from error
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
        raise DataError(f"folder {folder} holds no {LEGAL_SUFFIXES} files")
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
                    raise DataError(f"{where}: expected an object, found {_kind(value)}")
                yield SourceRow(where, value)
    except OSError as error:
        raise DataError(f"can't read {file}: {error}") from error
    if number == 0:
        raise DataError(f"{file} holds no examples", hint=FILE_HINT)


def _opens_array(stream: IO[bytes]) -> bool:
    """Whether the first character that is no white space opens an array.

    Leaves the stream at its beginning, or behind the byte order mark that Windows programs put there.
    """
    start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stream.seek(start)
    opening = next(filter(None, map(bytes.strip, stream)), b"")
    stream.seek(start)
    return opening.startswith(b"[")


def _values_of_array(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Parses a whole file as one JSON array; line numbers are unknown (0)."""
    values = _parsed(stream.read().rstrip(), file, first_line=1)
    if isinstance(values, list):
        yield from ((0, value) for value in values)


def _values_of_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Parses one JSON value a line; blank lines are skipped. Lines count from 1."""
    for line_number, line in enumerate(stream, start=1):
        if line.strip():
            yield line_number, _parsed(line.rstrip(), file, first_line=line_number)


def _parsed(encoded: bytes, file: Path, first_line: int) -> object:
    """Parses JSON that begins at a line of a file; DataError names the line that is malformed."""
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


# ------------------------------------------------------------------------------------ checking and laying out


def _from_messages(row: SourceRow) -> dict[str, Any]:
    """{messages: [{role, content}, ...]} as it is."""
    return {"messages": _turns(_required(row, "messages"), row.where, "messages", MESSAGE_KEYS)}


def _from_sharegpt(row: SourceRow) -> dict[str, Any]:
    """{conversations: [{from, value}, ...], system?} as messages."""
    turns = _turns(_required(row, "conversations"), row.where, "conversations", SHAREGPT_KEYS)
    system = _optional_text(row, "system")
    if system and turns[0]["role"] == "system":
        raise DataError(f"{row.where}: `system` is given, and `conversations[0]` is from the system as well")
    return {"messages": [*_system_turn(system), *turns]}


def _from_alpaca(row: SourceRow) -> dict[str, Any]:
    """{instruction, input?, output, system?} as messages; a blank line precedes the input."""
    instruction = _text(_required(row, "instruction"), row.where, "instruction")
    given = _optional_text(row, "input")
    user = f"{instruction}\n\n{given}" if given else instruction
    output = _text(_required(row, "output"), row.where, "output")
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    return {"messages": [*_system_turn(_optional_text(row, "system")), *turns]}


def _from_prompt_completion(row: SourceRow) -> dict[str, Any]:
    """{prompt, completion}, both text or both lists of messages."""
    pair = {field: _required(row, field) for field in ("prompt", "completion")}
    if any(isinstance(value, list) for value in pair.values()):
        return {field: _turns(value, row.where, field, MESSAGE_KEYS) for field, value in pair.items()}
    return {field: _text(value, row.where, field) for field, value in pair.items()}


def _from_text(row: SourceRow) -> dict[str, Any]:
    """{text} as it is."""
    return {"text": _text(_required(row, "text"), row.where, "text")}


LAYOUTS: Final = (
    Layout(DataFormat.MESSAGES, ("messages",), "messages: [{role, content}, ..]", _from_messages),
    Layout(
        DataFormat.ALPACA, ("instruction", "output"), "instruction, input, output[, system]", _from_alpaca
    ),
    Layout(
        DataFormat.SHAREGPT,
        ("conversations",),
        "conversations: [{from, value}, ..][, system]",
        _from_sharegpt,
    ),
    Layout(
        DataFormat.PROMPT_COMPLETION, ("prompt", "completion"), "prompt, completion", _from_prompt_completion
    ),
    Layout(DataFormat.TEXT, ("text",), "text", _from_text),
)


def _layout_named(name: DataFormat) -> Layout:
    """The layout that a job names."""
    return next(layout for layout in LAYOUTS if layout.name is name)


def _recognised(row: SourceRow) -> Layout:
    """The one layout whose required keys a row has; DataError when there are none or several."""
    present = {key for key, value in row.fields.items() if value is not None}
    fitting = [layout for layout in LAYOUTS if present.issuperset(layout.required)]
    if len(fitting) == 1:
        return fitting[0]
    legal = "\n".join(f"  {layout.name:<18} {layout.described}" for layout in LAYOUTS)
    verdict = " and ".join(f"`{layout.name}`" for layout in fitting) or "no known layout"
    raise DataError(
        f"{row.where}: the keys {_listed(row.fields)} fit {verdict}; legal layouts:\n{legal}",
        hint="set data.format to the layout that is meant"
        if fitting
        else "rename the keys to one of the layouts",
    )


def _turns(value: object, where: str, field: str, keys: TurnKeys) -> list[dict[str, str]]:
    """Checks a list of turns and gives each a role and a content."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{field}` must be a list of turns, found {_kind(value)}")
    turns = []
    for index, turn in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: `{at}` must be an object with `{keys.role}` and `{keys.text}`, found {_kind(turn)}"
            )
        _require_text_only(turn, where, f"{at}.")
        spelt = {key: _text(turn.get(key), where, f"{at}.{key}") for key in (keys.role, keys.text)}
        role = keys.roles.get(spelt[keys.role])
        if role is None:
            raise DataError(
                f"{where}: `{at}.{keys.role}` is `{spelt[keys.role]}`; legal: {_listed(keys.roles)}"
            )
        turns.append({"role": role, "content": spelt[keys.text]})
    return turns


def _system_turn(system: str) -> list[dict[str, str]]:
    """The system turn that opens a conversation, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def _required(row: SourceRow, field: str) -> object:
    """A field that a row must have; null counts as missing."""
    value = row.fields.get(field)
    if value is None:
        raise DataError(f"{row.where}: `{field}` is missing; found {_listed(row.fields)}")
    return value


def _optional_text(row: SourceRow, field: str) -> str:
    """A text field, empty when it is missing or null."""
    value = row.fields.get(field)
    return "" if value is None else _text(value, row.where, field)


def _text(value: object, where: str, field: str) -> str:
    """Checks that a value is text that can be stored; half of a surrogate pair can't."""
    if value is None:
        raise DataError(f"{where}: `{field}` is missing")
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: `{field}` holds half a character at position {error.start}") from error
    return value


def _require_text_only(fields: Mapping[str, object], where: str, prefix: str = "") -> None:
    """Raises DataError when a field is filled that changes what the row means."""
    for field in MORE_THAN_TEXT:
        if fields.get(field):
            raise DataError(
                f"{where}: `{prefix}{field}` is not supported",
                hint="remove the field, or the rows that use it",
            )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    words = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else words.get(type(value), type(value).__name__)


def _listed(names: Mapping[str, object]) -> str:
    """Names as one line."""
    return ", ".join(f"`{name}`" for name in names) or "none"


# --------------------------------------------------------------------------- the built-in data: Python's docs

SHUFFLE_SEED: Final = 20_260
"""Fixed, so that neighbouring pairs come from different modules, and always in the same order."""
LONGEST_DOCSTRING: Final = 2_000
"""Characters of a docstring that are kept."""
LITERAL_TYPES: Final = (bool, int, float, complex, bytes)
"""Types of defaults, besides text, that are shown in a signature."""
SUBMODULES: Final = (
    "collections.abc",
    "concurrent.futures",
    "email.message",
    "http.client",
    "importlib.metadata",
    "importlib.resources",
    "logging.handlers",
    "os.path",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "xml.etree.ElementTree",
)
"""Documented modules inside packages; the top level is taken from the interpreter."""
NOT_IMPORTED: Final = frozenset(
    {
        "antigravity",
        "idlelib",
        "lib2to3",
        "readline",
        "rlcompleter",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
    }
)
"""Modules that open a browser or a window, print, or touch the terminal when they are imported."""


def _rows_of_python_docs() -> Iterator[SourceRow]:
    """Question and answer pairs about the standard library of the interpreter that runs.

    The same Python on the same platform gives the same rows in the same order: about 3,700 in a second.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules say so when they are imported
        documented = sorted(_documented_objects())
    random.Random(SHUFFLE_SEED).shuffle(documented)
    for number, (name, signature, docstring) in enumerate(documented, start=1):
        question = f"What does `{name}` do in Python, and what is its signature?"
        answer = f"`{name}{signature}`\n\n{docstring}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield SourceRow(f"{PYTHON_DOCS}, row {number}", {"messages": turns})


def _documented_objects() -> Iterator[tuple[str, str, str]]:
    """Name, signature and docstring of public functions, classes and methods, each object once."""
    public_names = {name for name in sys.stdlib_module_names if not name.startswith("_")} - NOT_IMPORTED
    seen: dict[int, object] = {}  # by identity; the objects are kept, so that no id is used twice
    for module_name in sorted(public_names.union(SUBMODULES)):
        for name, member in _members_of(module_name):
            signature, docstring = _described(member)
            if docstring and id(member) not in seen:
                seen[id(member)] = member
                yield name, signature, docstring


def _members_of(module_name: str) -> Iterator[tuple[str, object]]:
    """Public functions and classes of a module, and the classes' own public methods, by qualified name."""
    members: Sequence[tuple[str, object]] = ()
    with contextlib.suppress(Exception):  # a module that this platform or build lacks fails in many ways
        if _is_standard(module_name):
            module = importlib.import_module(module_name)
            names = getattr(module, "__all__", None) or _own_names(module)
            members = [(name, getattr(module, name)) for name in sorted(names) if hasattr(module, name)]
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, member in members:
        if name.startswith("_") or not (inspect.isroutine(member) or inspect.isclass(member)):
            continue
        yield f"{prefix}{name}", member
        if inspect.isclass(member):
            for method_name, method in sorted(vars(member).items()):
                if inspect.isroutine(method) and not method_name.startswith("_"):
                    yield f"{prefix}{name}.{method_name}", method


def _own_names(module: object) -> list[str]:
    """Names that a module without `__all__` defines itself, as opposed to those it imported."""
    own = getattr(module, "__name__", "")
    return [name for name, member in vars(module).items() if getattr(member, "__module__", None) == own]


def _is_standard(module_name: str) -> bool:
    """Whether a name leads into the standard library, and not to a user's file of the same name."""
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    origin = Path(spec.origin).resolve()
    folders = {Path(os.__file__).parent.resolve(), Path(sysconfig.get_path("platstdlib")).resolve()}
    return "site-packages" not in origin.parts and not folders.isdisjoint(origin.parents)


def _described(member: object) -> tuple[str, str]:
    """Signature and cleaned docstring of a function, class or method; both empty when one is lacking."""
    documented = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
    docstring = documented.__doc__
    if not isinstance(docstring, str) or not docstring.strip() or not callable(documented):
        return "", ""
    try:
        signature = _portable(inspect.signature(documented))
    except (TypeError, ValueError):
        return "", ""
    cleaned = inspect.cleandoc(docstring)
    if len(cleaned) > LONGEST_DOCSTRING:
        cleaned = cleaned[:LONGEST_DOCSTRING].rpartition("\n")[0] or cleaned[:LONGEST_DOCSTRING]
    return signature, cleaned


def _portable(signature: inspect.Signature) -> str:
    """Writes a signature with `...` for each default that is no literal.

    Such defaults hold what belongs to one process or one machine: memory addresses, paths, and even the whole
    environment with its secrets, which no model may learn.
    """
    parameters = [
        parameter if _is_literal(parameter.default) else parameter.replace(default=Elided())
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters))


def _is_literal(default: object) -> bool:
    """Whether a default (or its absence) reads the same on every machine."""
    if type(default) is tuple:
        return all(map(_is_literal, default))
    if isinstance(default, str):
        return not Path(default).is_absolute()
    return default is None or default is inspect.Parameter.empty or type(default) in LITERAL_TYPES
