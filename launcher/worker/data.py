"""Training examples: read, recognised, checked, and laid out as TRL's SFTTrainer takes them.

    path --> SourceRow (one object, and where it came from) --> Layout --> Dataset

What becomes of a row is in layouts.py. A data set holds no places; where an example came from is found by reading again,
which only an error does.
"""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from datasets import Dataset, Features, Value, concatenate_datasets

from launcher.errors import DataError
from launcher.job import DataSpec, EvaluationSpec
from launcher.worker.layouts import lay_out, layout_of
from launcher.worker.source_rows import read_rows

ROWS_PER_CHUNK: Final = 10_000
"""Rows turned into Arrow at a time: what is held as Python objects when a file has one object a line."""


class HasChatTemplate(Protocol):
    """The part of a tokenizer that decides whether conversations can be rendered."""

    chat_template: Any


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
    return _as_dataset(fields for _, fields in placed_examples(data))


def placed_examples(data: DataSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of `load_examples`, one at a time, each with its place: the file, the row and the line.

    Raises:
        ConfigError: As `load_examples`.
        DataError: As `load_examples`.
    """
    rows = read_rows(data)
    first = next(rows, None)
    if first is None:
        raise DataError(
            f"{data.path} holds no examples", hint="it must hold one row at least; see `data.split`"
        )
    layout = layout_of(data.format, first)
    return lay_out(itertools.islice(itertools.chain([first], rows), data.num_examples), layout)


def place_of(data: DataSpec, index: int) -> str:
    """Where an example of `load_examples(data)` came from; counts from 0."""
    return next(itertools.islice((where for where, _ in placed_examples(data)), index, None), data.path)


def elsewhere(data: DataSpec, evaluation: EvaluationSpec) -> DataSpec:
    """How the held-out examples are read that have a path of their own."""
    return replace(data, path=evaluation.path, num_examples=evaluation.num_examples)


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
        return examples, load_examples(elsewhere(data, evaluation))
    num_trained = len(examples) - evaluation.num_examples
    if num_trained < 1:
        raise DataError(
            f"holding out {evaluation.num_examples} of the {len(examples)} examples of {data.path} leaves none to "
            "train on",
            hint=f"set evaluation.num_examples below {len(examples)}, or give evaluation.path",
        )
    return examples.select(range(num_trained)), examples.select(range(num_trained, len(examples)))


def require_chat_template(tokenizer: HasChatTemplate, dataset: Dataset, path: str, model: str) -> None:
    """Raises DataError when examples are conversations and the tokenizer can't render them.

    Args:
        tokenizer: Any transformers tokenizer or processor.
        dataset: What `load_examples` gave.
        path: Where that came from, for the error.
        model: Where the tokenizer came from, for the error.
    """
    first = dataset[0]
    is_conversational = "messages" in first or isinstance(first.get("prompt"), list)
    if is_conversational and not tokenizer.chat_template:
        raise DataError(
            f"the examples of {path} are conversations, and the tokenizer of `{model}` has no chat template to render "
            "them with",
            hint="take the instruction-tuned variant of the model, put a chat_template.jinja into its folder, or give "
            "data in the layout `text` or `prompt_completion` with plain strings",
        )


def _as_dataset(examples: Iterator[dict[str, Any]]) -> Dataset:
    """Gathers examples (at least one) chunk by chunk, so that memory holds Arrow and one chunk of objects."""
    chunks: list[Dataset] = []
    while chunk := list(itertools.islice(examples, ROWS_PER_CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=_features(chunk[0])))
    return concatenate_datasets(chunks)


def _features(example: Mapping[str, Any]) -> Features:
    """Arrow types of a normalised example: text, or a list of role and content."""
    turns = [{"role": Value("string"), "content": Value("string")}]
    kinds = {list: turns, int: Value("int64"), str: Value("string")}
    features = {name: kinds[type(value)] for name, value in example.items()}
    return Features({**features, "images": [Value("string")]} if "images" in features else features)
