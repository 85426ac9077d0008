"""Examples of the tasks that are no plain language modelling: their layout, and whether they fit the model."""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
)

from launcher.errors import DataError
from launcher.job import DataFormat, DataSpec, JobSpec, ModelSpec, Task
from launcher.vision import image_shape, require_shape
from launcher.worker.data import elsewhere, load_examples, place_of, require_chat_template, split_examples
from launcher.worker.weights import convert_gguf

FORMATS = {
    Task.SEQUENCE_CLASSIFICATION: DataFormat.LABELED,
    Task.IMAGE_TEXT_TO_TEXT: DataFormat.IMAGES,
}
"""The one layout of a task; a task that is not here has several, recognised by their keys."""

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What transformers was seen to raise on damaged tokenizers, configs and weights; a missing package is none of them."""


def source_of(weights: str, converted: str) -> str:
    """Where weights and tokenizer are: a folder or hub id, or what a packaged model is converted to, once.

    Args:
        weights: Folder or hub id; for a packaged model the folder of its GGUF file.
        converted: Where that is converted to; empty for any other.
    """
    return str(convert_gguf(Path(weights), Path(converted))) if converted else weights


def tokenizer_of(job: JobSpec, weights: str, converted: str) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of a job's model; of one that sees images its processor.

    Raises:
        DataError: When it can't be had or read.
    """
    source = source_of(weights, converted)
    sees = job.model.task is Task.IMAGE_TEXT_TO_TEXT
    processing_class = AutoProcessor if sees else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin = processing_class.from_pretrained(
            source, revision=job.model.revision, trust_remote_code=job.model.trust_remote_code
        )
    except UNREADABLE as failure:
        raise unreadable_model(source, failure) from failure
    return tokenizer


def unreadable_model(source: str, failure: Exception) -> DataError:
    """What to say of a model that can't be read."""
    return DataError(
        f"the model at `{source}` can't be read: {failure}",
        "check `model.path`; a hub id needs the network (and, for gated models, an accepted licence)",
    )


def examples_of(
    job: JobSpec, tokenizer: PreTrainedTokenizerBase | ProcessorMixin
) -> tuple[Dataset, Dataset | None]:
    """A job's training examples, and those held out; checked against model and tokenizer.

    Raises:
        ConfigError: A path names no built-in data set.
        DataError: When they can't be read, or don't fit.
    """
    data = data_of_task(job.data, job.model)
    trained, held_out = split_examples(load_examples(data), data, job.evaluation)
    checked = fitted(trained, job, data)
    require_chat_template(tokenizer, checked, data.path, job.model.path)
    if held_out is None:
        return checked, None
    if job.evaluation.path:
        return checked, fitted(held_out, job, elsewhere(data, job.evaluation))
    return checked, fitted(held_out, job, data, len(trained))


def sources_of(job: JobSpec) -> tuple[DataSpec, ...]:
    """Where a job's examples are read from: those trained on first."""
    data = data_of_task(job.data, job.model)
    has_own = job.evaluation.enabled and job.evaluation.path
    return (data, elsewhere(data, job.evaluation)) if has_own else (data,)


def data_of_task(data: DataSpec, model: ModelSpec) -> DataSpec:
    """The data of a job, with the layout that its task asks for."""
    return replace(data, format=FORMATS.get(model.task, data.format))


def fitted(rows: Dataset, job: JobSpec, data: DataSpec, begins_at: int = 0) -> Dataset:
    """The examples, checked against the model; image files are found, and read when their row is used.

    Args:
        rows: What `load_examples(data)` gave, from some row on.
        job: The job.
        data: Where the rows came from; image files are named relative to its folder.
        begins_at: Rows of `data` before the first of `rows`.

    Raises:
        DataError: When an example has a label that the model does not have, or other images than planned.
    """
    if job.model.task is Task.CAUSAL_LM:
        return rows
    if job.model.task is Task.IMAGE_TEXT_TO_TEXT:
        return _with_images(rows, job.data.images_per_example, data, begins_at)
    labels = list(rows["label"])
    highest = max(labels)
    if highest >= job.model.num_labels:
        raise DataError(
            f"{place_of(data, begins_at + labels.index(highest))} has label {highest}; "
            f"model.num_labels={job.model.num_labels} has 0 to {job.model.num_labels - 1}",
            f"model.num_labels={highest + 1}",
        )
    return rows


def check_images(trainer: Trainer, job: JobSpec) -> None:
    """Lets the trainer's collator check that every batch has the pixels that the plan was made for."""
    if job.model.task is not Task.IMAGE_TEXT_TO_TEXT:
        return
    collate = trainer.data_collator
    model: Any = trainer.model
    shape = image_shape(model.config)

    def collate_and_check(examples: list[Any]) -> Any:
        batch = collate(examples)
        require_shape(batch, shape, job.data.images_per_example)
        return batch

    trainer.data_collator = collate_and_check


def _with_images(rows: Dataset, images_per_example: int, data: DataSpec, begins_at: int) -> Dataset:
    path = Path(data.path).expanduser()
    folder = path if path.is_dir() else path.parent
    files = [[str(folder / name) for name in names] for names in rows["images"]]
    for index, names in enumerate(files, begins_at):
        if len(names) != images_per_example:
            raise DataError(
                f"{place_of(data, index)} has {len(names)} images; data.images_per_example={images_per_example}",
                "give every example as many, and set data.images_per_example to it",
            )
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise DataError(
                f"{place_of(data, index)}: there is no image file {missing[0]}",
                "`images` lists image files, relative to the folder of the examples",
            )
    return rows.remove_columns("images").add_column("images", files).cast_column("images", List(Image()))
