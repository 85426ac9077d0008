"""The legal layouts of a row: how each is recognised, checked, and laid out for training.

The chat layouts (`messages`, `alpaca`, `sharegpt`) become one column `messages`; `prompt_completion` and `text` keep
their columns. Other fields are dropped; those that would change what a row means (tools, images, earlier turns) are an
error. Every error names the row, the field and the cure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from launcher.errors import DataError
from launcher.job import DataFormat
from launcher.worker.python_docs import SourceRow
from launcher.worker.source_rows import LONGEST_ROW_BYTES, TOO_LONG_HINT, kind_of


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


MESSAGE_KEYS: Final = TurnKeys("role", "content", {role: role for role in ("system", "user", "assistant")})
SHAREGPT_KEYS: Final = TurnKeys(
    "from",
    "value",
    {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
)
MORE_THAN_TEXT: Final = ("history", "tools", "tool_calls", "images", "videos", "audios")
"""Fields that change what a row means; a row that uses one is refused rather than half learnt."""


REMOVE: Final = "or remove the row"


def lay_out(rows: Iterator[SourceRow], layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Checks rows and lays them out, one at a time; each comes with its place.

    Raises:
        DataError: When a row is malformed, or text and message lists alternate, which no column can hold.
    """
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
        yield row.where, example


def layout_of(name: DataFormat, first: SourceRow) -> Layout:
    """The layout that a job names, or the one that its first row has.

    Raises:
        DataError: When none or several are recognised.
    """
    if name is DataFormat.AUTO:
        return _recognised(first)
    return next(layout for layout in (*LAYOUTS, *LAYOUTS_OF_TASKS) if layout.name is name)


# ------------------------------------------------------------------------------------ checking and laying out


def _from_messages(row: SourceRow) -> dict[str, Any]:
    """{messages: [{role, content}, ...]} as it is."""
    return {"messages": _turns(_required(row, "messages"), row.where, "messages", MESSAGE_KEYS)}


def _from_sharegpt(row: SourceRow) -> dict[str, Any]:
    """{conversations: [{from, value}, ...], system?} as messages."""
    turns = _turns(_required(row, "conversations"), row.where, "conversations", SHAREGPT_KEYS)
    system = _optional_text(row, "system")
    if system and turns[0]["role"] == "system":
        raise DataError(
            f"{row.where}: `system` is given, and `conversations[0]` is from the system as well",
            hint="keep one of the two",
        )
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
        raise DataError(
            f"{row.where}: `images` must be a list of image files, found {kind_of(images)}",
            hint='list their names: {"images": ["cat.png"], "messages": [..]}',
        )
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
    shape = f'`{field}` is a list of {{"{keys.role}": .., "{keys.text}": ..}}: correct it, {REMOVE}'
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{field}` must be a list of turns, found {kind_of(value)}", hint=shape)
    turns = []
    for index, turn in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: `{at}` must be an object with `{keys.role}` and `{keys.text}`, found {kind_of(turn)}",
                hint=shape,
            )
        _require_text_only(turn, where, f"{at}.")
        spelt = {key: _text(turn.get(key), where, f"{at}.{key}") for key in (keys.role, keys.text)}
        role = keys.roles.get(spelt[keys.role])
        if role is None:
            raise DataError(
                f"{where}: `{at}.{keys.role}` is `{spelt[keys.role]}`; legal: {_listed(keys.roles)}",
                hint=f"rename the speaker to a legal one, {REMOVE}",
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
        raise DataError(
            f"{row.where}: `{field}` is missing; found {_listed(row.fields)}",
            hint=f"give the row a `{field}`, {REMOVE}; `data.format` chooses another layout for all rows",
        )
    return value


def _optional_text(row: SourceRow, field: str) -> str:
    """A text field, empty when it is missing or null."""
    value = row.fields.get(field)
    return "" if value is None else _text(value, row.where, field)


def _text(value: object, where: str, field: str) -> str:
    """Checks that a value is text that can be stored; half of a surrogate pair can't."""
    if value is None:
        raise DataError(f"{where}: `{field}` is missing", hint=f"fill it in, {REMOVE}")
    if not isinstance(value, str):
        raise DataError(
            f"{where}: `{field}` must be text, found {kind_of(value)}",
            hint=f"write its text in quotes, {REMOVE}",
        )
    if len(value) > LONGEST_ROW_BYTES:
        raise DataError(
            f"{where}: `{field}` has {len(value)} characters; legal: up to {LONGEST_ROW_BYTES}",
            hint=TOO_LONG_HINT,
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{field}` holds half a character at position {error.start}",
            hint="cut the text between characters, not between the two halves (\\ud83d\\ude42) of one",
        ) from error
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
