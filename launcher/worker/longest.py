"""The worst batches of the examples with the most text: what a rehearsal trains and evaluates on."""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from launcher.job import JobSpec
from launcher.memory import MemoryMeasurement
from launcher.plan import Plan
from launcher.trainers import num_tokens_of
from launcher.workload import evaluation_batch_size

CANDIDATES = 256
"""Examples with the most text that are tokenised to find those with the most tokens: text and tokens don't rank alike,
and to tokenise a whole data set takes minutes."""
CHARACTERS_PER_TOKEN = 8
"""More than texts have: so much text per token fills packed rows."""
ROWS_AT_ONCE = 1000


def most_text(rows: Dataset, num_rows: int, num_tokens: int) -> Dataset:
    """The examples with the most text, longest first.

    Args:
        rows: Examples, as `launcher.worker.data` lays them out.
        num_rows: How many are needed; `CANDIDATES` are taken at least, if there are as many.
        num_tokens: How many tokens they must have together, if there are as many.
    """
    columns = [name for name in rows.column_names if name != "images"]
    lengths: list[int] = []
    for batch in rows.select_columns(columns).iter(ROWS_AT_ONCE):
        lengths += [sum(map(num_characters, values)) for values in zip(*batch.values(), strict=True)]
    ranked = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sums = accumulate(lengths[index] for index in ranked)
    short = sum(1 for total in sums if total < num_tokens * CHARACTERS_PER_TOKEN)
    return rows.select(ranked[: max(CANDIDATES, num_rows, short + 1)])


def num_characters(value: object) -> int:
    """Characters of all texts in a value."""
    return sum(map(len, texts_in(value)))


def texts_in(value: object) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def lengths_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How long examples are, as they compare: in tokens, where the trainer's collator makes them those of their texts.

    What is left out then is the same in each: its template, and its images, of which every example has as many, and each
    is as many tokens (vision.py).

    Args:
        rows: Examples as the trainer holds them.
        tokenizer: Of texts.
    """
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    texts = rows.select_columns([name for name in rows.column_names if name != "images"])
    return [sum(len(tokenizer(text)["input_ids"]) for text in texts_in(row)) for row in texts]


def worst_batches(rows: Dataset, batch_size: int, num_batches: int, lengths: Sequence[int]) -> Dataset:
    """The batch of the longest examples, again and again; to be taken in this order.

    Its last example is shorter than the first if any is: then the batch is padded, and has a mask.

    Args:
        rows: Examples as the trainer holds them.
        batch_size: Examples in a batch; some of them more than once where there are fewer.
        num_batches: How many batches.
        lengths: How long each is.
    """
    ranked = sorted(range(len(rows)), key=lambda index: -lengths[index])
    chosen = [ranked[number % len(ranked)] for number in range(batch_size)]
    shorter = [index for index in ranked if lengths[index] < lengths[ranked[0]]]
    if shorter and batch_size > 1 and lengths[chosen[-1]] == lengths[chosen[0]]:
        chosen[-1] = shorter[0]
    return rows.select(chosen * num_batches)


def num_batches_trained(job: JobSpec, plan: Plan) -> int:
    """Micro batches that the steps of a rehearsal take, on all ranks."""
    assert job.training.max_steps is not None  # a rehearsal's job says so
    return job.training.max_steps * plan.gradient_accumulation_steps * plan.world_size


def keep_longest(trainer: Trainer, job: JobSpec, plan: Plan) -> None:
    """Leaves a trainer the worst batches that it holds: those of a few steps, and one of evaluation per rank.

    Where an evaluation keeps the logits of all examples, all are kept.
    """
    held: Any = trainer
    held.args.train_sampling_strategy = "sequential"
    tokenizer = getattr(held.processing_class, "tokenizer", held.processing_class)  # a processor has one

    def worst(rows: Dataset, batch_size: int, num_batches: int) -> Dataset:
        return worst_batches(rows, batch_size, num_batches, lengths_of(rows, tokenizer))

    held.train_dataset = worst(held.train_dataset, plan.micro_batch_size, num_batches_trained(job, plan))
    if held.eval_dataset is not None and not job.evaluation.keep_logits:
        held.eval_dataset = worst(held.eval_dataset, evaluation_batch_size(job, plan), plan.world_size)


def beyond_rehearsal(trainer: Trainer, rehearsed: MemoryMeasurement) -> tuple[str, ...]:
    """What there is to say where a trainer's longest row is longer than any that the rehearsal looked at.

    Args:
        trainer: A trainer that holds all rows.
        rehearsed: What the rehearsal's meter saw.
    """
    held: Any = trainer
    if "input_ids" not in held.train_dataset.column_names or not rehearsed.shapes:
        return ()
    longest = max(num_tokens_of(held.train_dataset), default=0)
    highest = max(shape.length for shape in rehearsed.shapes)
    if longest <= highest:
        return ()
    return (
        f"the longest example has {longest} tokens, the rehearsal's longest had {highest}: it looks at those with the "
        "most characters only",
    )
