"""Sequence classification: the trainer whose `train()` is both traced and run when a text is to get a label.

transformers' Trainer, because TRL's SFTTrainer is made for causal language models. What TRL does for its own tasks
is done here in the libraries' usual way: texts become tokens, batches are padded, PEFT trains the new head whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Encoding
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from launcher.trainers import Cut, cut_of, num_tokens_of

LOST = "num_lost_tokens"
"""Column: tokens of a text that were cut off."""


class ClassifierTrainer(Trainer):
    """transformers' trainer, which knows in `cuts` what was cut of the texts."""

    cuts: Mapping[str, Cut]


def build_classifier_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    max_length: int,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Builds the trainer of a model with a classification head.

    Args:
        model: From `AutoModelForSequenceClassification`, with or without adapters.
        arguments: The trainer's arguments.
        max_length: Tokens to which a text is cut.
        train_dataset: Rows with `text` and `label`, or with `input_ids` and `label`.
        eval_dataset: The same, held out; None when evaluation is off.
        tokenizer: Its padding token becomes the model's: the head looks for the last token that is none.
        callbacks: What listens to the loop.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rows = {"train": tokenized(train_dataset, tokenizer, max_length)}
    if eval_dataset is not None:
        rows["eval"] = tokenized(eval_dataset, tokenizer, max_length)
    trainer = ClassifierTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        compute_loss_func=mean_loss,
        compute_metrics=accuracy if eval_dataset is not None else None,
        callbacks=list(callbacks),
    )
    trainer.cuts = {name: _cut(some, max_length) for name, some in rows.items() if LOST in some.column_names}
    return trainer


def _cut(rows: Dataset, max_length: int) -> Cut:
    lost = list(rows[LOST])
    kept = num_tokens_of(rows)
    return cut_of([sum(both) for both in zip(kept, lost, strict=True)], lost, max_length)


def mean_loss(
    outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Cross entropy over the examples of an optimizer step.

    Models differ in whether their own loss heeds gradient accumulation, and the trainer believes that all do.

    Args:
        outputs: Of the model; `logits` has shape (batch, labels).
        labels: Shape (batch,).
        num_items_in_batch: Examples of all micro batches of the step; None: of this one.
    """
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of held-out examples whose label has the highest score."""
    chosen = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float(np.mean(chosen == prediction.label_ids))}


def tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of token ids, cut to a length, with how many each lost where the tokenizer says so.

    Rows that are no text any more are left as they are.
    """
    if "text" not in rows.column_names:
        return rows

    def tokenize(batch: Mapping[str, list[str]]) -> Mapping[str, Any]:
        tokens: Any = tokenizer(batch["text"], truncation=True, max_length=max_length)
        if tokens.encodings is None:  # tokenizers that are written in Python keep nothing of what they cut
            return dict(tokens)
        return {**tokens, LOST: [_num_lost(encoding) for encoding in tokens.encodings]}

    return rows.map(tokenize, batched=True, remove_columns=["text"])


def _num_lost(encoding: Encoding) -> int:
    """Tokens that were cut off a text; those that end each piece of it are none of its own."""
    return sum(len(piece.ids) - sum(piece.special_tokens_mask) for piece in encoding.overflowing)
