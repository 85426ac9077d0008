"""The rows as the trainer laid them out: whether there is a batch to train on, and whether the model knows the tokens.

What a template or a truncation makes of an example is seen here first, before the first step.
"""

# mypy: disable-error-code="import-untyped"
# datasets has no type information

from __future__ import annotations

from typing import Any

import pyarrow.compute
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, Trainer

from launcher.errors import DataError
from launcher.job import JobSpec
from launcher.plan import Plan
from launcher.trainers import Cut, cuts_of
from launcher.worker.data import placed_examples
from launcher.worker.tasks import sources_of
from launcher.workload import evaluation_batch_size


def require_known_ids(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, config: PretrainedConfig, source: str
) -> None:
    """Makes sure that the tokens that end and fill every row have a place in the embedding.

    A tokenizer may have more tokens than the embedding, as that of Gemma 3 1B has one that no text makes; the ids of
    the data are checked when they are known.

    Raises:
        DataError: When one has not.
    """
    inner: Any = getattr(tokenizer, "tokenizer", tokenizer)
    size = config.get_text_config().vocab_size
    for name in ("eos_token", "pad_token", "bos_token"):
        number = getattr(inner, f"{name}_id", None)
        if isinstance(number, int) and number >= size:
            raise DataError(
                f"the tokenizer at `{source}` has {name} {getattr(inner, name)!r} with id {number}; the model's "
                f"embedding has {size} rows (vocab_size in config.json)",
                "take the tokenizer that belongs to the model, or resize the model's embedding and save it",
            )


def check_laid_out(trainer: Trainer, job: JobSpec, plan: Plan, num_given: int) -> tuple[str, ...]:
    """Makes sure that a trainer has a batch to train and to evaluate on, of tokens that the model knows.

    Args:
        trainer: A trainer that has tokenised its rows, unless its collator does that.
        job: The job.
        plan: The plan.
        num_given: Training examples that the trainer was given.

    Returns:
        What there is to say of the rows.

    Raises:
        DataError: Naming the data set, and what to change.
    """
    held: Any = trainer
    notes: list[str] = []
    rows = held.train_dataset
    cuts = cuts_of(trainer)
    notes += _cut_note(cuts.get("train"), "examples")
    notes += _require_batch(rows, job.data.path, job, plan, num_given)
    _require_ids(rows, held.model.config, job.data.path)
    if held.eval_dataset is not None:
        path = job.evaluation.path or job.data.path
        notes += _cut_note(cuts.get("eval"), "held-out examples")
        batch = evaluation_batch_size(job, plan)
        if len(held.eval_dataset) == 0:
            raise DataError(f"no held-out example of {path} {_to_learn(plan)}", _longer(plan))
        if len(held.eval_dataset) < batch:  # the loader drops what fills no batch
            raise DataError(
                f"{path} makes {len(held.eval_dataset)} rows to evaluate on, and a batch has {batch}",
                "a smaller evaluation.batch_size, or a larger evaluation.num_examples",
            )
        _require_ids(held.eval_dataset, held.model.config, path)
    return tuple(notes)


def require_longest(trainer: Trainer, job: JobSpec, plan: Plan, num_given: int) -> None:
    """Makes sure that a rehearsal's trainer has rows to choose its worst batches from.

    Args:
        trainer: A trainer that has tokenised the longest examples.
        job: The job.
        plan: The plan.
        num_given: Training examples that the trainer was given.

    Raises:
        DataError: When none of the longest examples has a token to learn.
    """
    held: Any = trainer
    named = [(held.train_dataset, job.data.path, f"{num_given} longest")]
    if held.eval_dataset is not None:
        named.append((held.eval_dataset, job.evaluation.path or job.data.path, "longest held-out"))
    for rows, path, which in named:
        if len(rows) == 0:
            raise DataError(
                f"none of the {which} examples of {path} {_to_learn(plan)}",
                f"{_longer(plan)}; `launch.rehearse=false` trains on those that are shorter",
            )


def blamed_template(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, job: JobSpec, failure: TemplateError
) -> DataError:
    """The error of a chat template that objects to an example, which is found and named.

    The examples are read again, with their places: those at hand may be a choice of them, in another order.

    Args:
        tokenizer: Its template is meant.
        job: Says where the examples are.
        failure: What the template raised.
    """
    template: Any = tokenizer
    for data in sources_of(job):
        for where, row in placed_examples(data):
            prompt = row.get("prompt", [])
            turns = row.get("messages") or [*prompt, *row.get("completion", ())]
            try:
                template.apply_chat_template(turns, tokenize=False)
                if prompt:
                    template.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            except TemplateError as found:
                roles = ", ".join(turn["role"] for turn in turns)
                return DataError(
                    f"{where}: the chat template of `{job.model.path}` refuses it ({found}); its roles are {roles}",
                    "change the example to what the template takes, or the template in the model's folder",
                )
    return DataError(
        f"the chat template of `{job.model.path}` fails: {failure}",
        "correct the template in the model's folder",
    )


def _require_batch(rows: Dataset, path: str, job: JobSpec, plan: Plan, num_given: int) -> tuple[str, ...]:
    needed, unit = plan.micro_batch_size * plan.world_size, "rows" if job.data.packing else "examples"
    if len(rows) == 0 and num_given:
        raise DataError(f"none of the {num_given} examples of {path} {_to_learn(plan)}", _longer(plan))
    if len(rows) < needed:
        raise DataError(
            f"{path} makes {len(rows)} {unit} of up to {plan.max_length} tokens, and the first batch needs {needed} "
            f"(micro batch {plan.micro_batch_size} on {plan.world_size} devices)",
            "more examples"
            + (", a shorter data.max_length" if job.data.packing else "")
            + ", or a smaller planner.pin.micro_batch_size",
        )
    if not job.data.packing and len(rows) < num_given:
        return (f"{num_given - len(rows)} of {num_given} examples are left out: none {_to_learn(plan)}",)
    return ()


def _cut_note(cut: Cut | None, which: str) -> tuple[str, ...]:
    """How many examples are longer than the length, and what they lose; nothing where none is."""
    if cut is None or not cut.num_cut:
        return ()
    share = 100.0 * cut.num_lost / cut.num_tokens
    return (
        f"{cut.num_cut} of {cut.num_examples} {which} are cut to {cut.max_length} tokens: {cut.num_lost} of "
        f"{cut.num_tokens} tokens ({share:.1f} %) are lost; the longest has {cut.longest}",
    )


def _to_learn(plan: Plan) -> str:
    return f"has a token to learn within {plan.max_length} tokens"


def _longer(plan: Plan) -> str:
    return f"a data.max_length above {plan.max_length}, or shorter prompts"


def _require_ids(rows: Dataset, config: PretrainedConfig, path: str) -> None:
    """Makes sure that every token has a row in the embedding."""
    if "input_ids" not in rows.column_names or len(rows) == 0:
        return
    size = config.get_text_config().vocab_size
    column = rows.with_format("arrow")
    for start in range(0, len(rows), 1000):
        ids = column[start : start + 1000]["input_ids"].combine_chunks()
        highest = pyarrow.compute.max(pyarrow.compute.list_flatten(ids)).as_py()
        if highest is not None and highest >= size:
            raise DataError(
                f"the tokenizer makes token {highest} of {path}, and the model's embedding has {size} rows "
                "(vocab_size in config.json)",
                "take the tokenizer that belongs to the model, or resize the model's embedding and save it",
            )
