"""Training examples: read, recognised, checked, and laid out as TRL's SFTTrainer takes them.

    path --> SourceRow (one object, and where it came from) --> Layout --> Dataset

The chat layouts (`messages`, `alpaca`, `sharegpt`) become one column `messages`; `prompt_completion` and
`text` keep their columns. Other fields are dropped; those that would change what a row means (tools, images,
earlier turns) are an error.
"""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from datasets import Dataset, Features, Value, concatenate_datasets

from launcher.errors import DataError
from launcher.job import DataFormat, DataSpec, EvaluationSpec
from launcher.worker.python_docs import SourceRow
from launcher.worker.source_rows import LONGEST_ROW_BYTES, TOO_LONG_HINT, kind_of, read_rows

ROWS_PER_CHUNK: Final = 10_000
"""Rows turned into Arrow at a time: what is held as Python objects when a file has one object a line."""


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
    more: tuple[str, ...] = ()
    """Fields beyond text that it has."""


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
        (both text, or both such lists), or `text`, or `text` and `label`, or `messages` and `images`
        (names of files); at least one row.

    Raises:
        ConfigError: The path is empty, or names no built-in data set.
        DataError: The examples can't be found or read, their layout is not recognised, or a row is malformed.
    """
    rows = read_rows(data)
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
        _require_text_only({k: v for k, v in row.fields.items() if k not in layout.more}, row.where)
        example = layout.normalise(row)
        for field, value in example.items():
            if kinds.setdefault(field, kind_of(value)) != kind_of(value):
                raise DataError(
                    f"{row.where}: `{field}` is {kind_of(value)}, but was {kinds[field]} in the rows before",
                    hint="give all rows the same layout",
                )
        yield example


def _features(example: Mapping[str, Any]) -> Features:
    """Arrow types of a normalised example: text, or a list of role and content."""
    turns = [{"role": Value("string"), "content": Value("string")}]
    kinds = {list: turns, int: Value("int64"), str: Value("string")}
    features = {name: kinds[type(value)] for name, value in example.items()}
    return Features({**features, "images": [Value("string")]} if "images" in features else features)


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


def _from_labeled(row: SourceRow) -> dict[str, Any]:
    """{text, label} as it is; the label is a whole number from 0."""
    label = _required(row, "label")
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(
            f"{row.where}: `label` must be a whole number from 0, found {kind_of(label)} ({label!r})",
            hint="number the labels 0, 1, .. and set model.num_labels",
        )
    return {"text": _text(_required(row, "text"), row.where, "text"), "label": label}


def _from_images(row: SourceRow) -> dict[str, Any]:
    """{images, messages}: image files, and a conversation about them; TRL puts them before the first question."""
    images = _required(row, "images")
    if not isinstance(images, list) or not images:
        raise DataError(f"{row.where}: `images` must be a list of image files, found {kind_of(images)}")
    files = [_text(image, row.where, f"images[{index}]") for index, image in enumerate(images)]
    return {**_from_messages(row), "images": files}


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


LAYOUTS_OF_TASKS: Final = (
    Layout(DataFormat.LABELED, ("text", "label"), "text, label", _from_labeled),
    Layout(DataFormat.IMAGES, ("images", "messages"), "images, messages", _from_images, ("images",)),
)
"""Layouts that a task asks for: never recognised by their keys, for other texts may have labels or pictures too."""


def _layout_named(name: DataFormat) -> Layout:
    """The layout that a job names."""
    return next(layout for layout in (*LAYOUTS, *LAYOUTS_OF_TASKS) if layout.name is name)


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
        raise DataError(f"{where}: `{field}` must be a list of turns, found {kind_of(value)}")
    turns = []
    for index, turn in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: `{at}` must be an object with `{keys.role}` and `{keys.text}`, found {kind_of(turn)}"
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
        raise DataError(f"{where}: `{field}` must be text, found {kind_of(value)}")
    if len(value) > LONGEST_ROW_BYTES:
        raise DataError(
            f"{where}: `{field}` has {len(value)} characters; legal: up to {LONGEST_ROW_BYTES}",
            hint=TOO_LONG_HINT,
        )
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


def _listed(names: Mapping[str, object]) -> str:
    """Names as one line."""
    return ", ".join(f"`{name}`" for name in names) or "none"
