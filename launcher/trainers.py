"""The trainer classes: TRL's, and what another loss changes in it. Traced AND run, like the rest of the workload."""

# mypy: disable-error-code="import-untyped"
# pyarrow has no type information

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from launcher.errors import ConfigError
from launcher.job import Loss
from launcher.plan import Plan

ROWS_AT_ONCE = 1000
"""Rows whose lengths are read at a time."""
LIGER_PARTS = (
    "rope",
    "rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "relu_squared",
    "cross_entropy",
)
"""What liger-kernel 0.8.5 would replace besides the loss (transformers/monkey_patch.py). The loss is the loss alone: TRL
1.16 calls the layers' kernels deprecated, and they would be replaced for every model of the process."""


@dataclass(frozen=True)
class Cut:
    """What a length does to a set of examples."""

    max_length: int
    """Tokens that an example may have."""
    num_examples: int
    """All examples."""
    num_cut: int
    """Those that are longer."""
    num_tokens: int
    """Tokens of all examples, before they are cut."""
    num_lost: int
    """Tokens beyond the length."""
    longest: int
    """Tokens of the longest example."""


class CountingTrainer(SFTTrainer):
    """TRL's trainer, which knows in `cuts` what it cut of the examples: those of "train" and those of "eval"."""

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Has TRL tokenise whole examples, counts them, and has it cut them; it would do both in one go."""
        prepare, others = super()._prepare_dataset, (formatting_func, dataset_name)
        if packing or args.max_length is None or "input_ids" in dataset.column_names:
            return prepare(dataset, processing_class, args, packing, *others)
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        whole = prepare(dataset, processing_class, uncut, packing, *others)
        lengths = num_tokens_of(whole)
        excess = [max(0, length - args.max_length) for length in lengths]
        self.cuts = {**cuts_of(self), dataset_name: cut_of(lengths, excess, args.max_length)}
        return prepare(whole, processing_class, args, packing, *others)


def num_tokens_of(rows: Dataset) -> list[int]:
    """Tokens of each row, without making Python objects of them."""
    counted = rows.select_columns(["input_ids"]).with_format("arrow")
    return [
        length
        for batch in counted.iter(ROWS_AT_ONCE)
        for length in pyarrow.compute.list_value_length(batch["input_ids"]).to_pylist()
    ]


def cut_of(lengths: Sequence[int], excess: Sequence[int], max_length: int) -> Cut:
    """What is cut of examples.

    Args:
        lengths: Tokens of each, before it is cut.
        excess: Tokens that each loses.
        max_length: Tokens that each may have.
    """
    return Cut(
        max_length,
        len(lengths),
        sum(1 for lost in excess if lost),
        sum(lengths),
        sum(excess),
        max(lengths, default=0),
    )


def cuts_of(trainer: Trainer) -> Mapping[str, Cut]:
    """What a trainer cut, by "train" and "eval"; nothing of examples that it did not count."""
    cuts: Mapping[str, Cut] = getattr(trainer, "cuts", {})
    return cuts


class PlainLossTrainer(CountingTrainer):
    """TRL's trainer with the model's own loss: all logits at once, as transformers' Trainer computes it."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.compute_loss`."""
        return Trainer.compute_loss(self, *args, **kwargs)


class LigerLossTrainer(PlainLossTrainer):
    """TRL's trainer with Liger's fused linear cross-entropy, put in place by transformers' `use_liger_kernel`.

    TRL turns that one kernel off, because it takes the place of the forward pass that TRL's own loss patches; the loss
    here is the model's, and doesn't call TRL's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.liger_kernel_config = {
            "fused_linear_cross_entropy": True,
            **dict.fromkeys(LIGER_PARTS, False),
        }

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **options: Any
    ) -> Any:
        """See `transformers.Trainer.prediction_step`: it asks Liger for a loss without logits, and TRL's does not."""
        step = Trainer.prediction_step if prediction_loss_only else SFTTrainer.prediction_step
        return step(self, model, inputs, prediction_loss_only, *args, **options)


class RowPreparation(SFTTrainer):
    """TRL's own preparation of rows (templates, end of text, tokens, labels) without a model to train.

    TRL's constructor wants a model, and settles three things that the preparation asks for; here they are settled as it
    does for the arguments that a job has (trl 1.16, sft_trainer.py). Nothing else of the trainer works.

    Args:
        tokenizer: The model's tokenizer.
        is_paired: Whether rows have a prompt and a completion, of which the prompt is not learnt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, is_paired: bool) -> None:
        self._tokenizer = tokenizer
        self.chat_template = None
        self.completion_only_loss = is_paired

    def prepared(self, rows: Dataset, output_dir: Path) -> Dataset:
        """Rows as token ids and labels, neither cut nor packed."""
        arguments = SFTConfig(str(output_dir), max_length=None, use_cpu=True, bf16=False, report_to=[])
        ready: Dataset = self._prepare_dataset(rows, self._tokenizer, arguments, False, None, "train")
        return ready


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of tokens that are predicted right, over all held-out examples.

    Args:
        prediction: Logits, shape (rows, length, vocabulary), and labels, shape (rows, length), -100 where none counts.
    """
    labels = np.asarray(prediction.label_ids)[:, 1:]
    guesses = np.asarray(prediction.predictions)[:, :-1].argmax(axis=-1)
    counted = labels != -100
    return {"accuracy_of_kept_logits": float((guesses == labels)[counted].mean())}


def trainer_class(plan: Plan) -> type[SFTTrainer]:
    """The trainer of a plan's loss."""
    classes = {Loss.PLAIN: PlainLossTrainer, Loss.LIGER: LigerLossTrainer}
    return classes.get(plan.loss, CountingTrainer)


def require_liger_loss(model: Any) -> None:
    """Makes sure that Liger's loss does what was asked; where it can't, transformers trains on without a word.

    Args:
        model: A model of transformers, with or without adapters.

    Raises:
        ConfigError: When Liger has no fused loss for the model, or would leave an adapter out.
    """
    model_type = model.config.model_type
    patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
    known = {
        name
        for name, function in patches.MODEL_TYPE_TO_APPLY_LIGER_FN.items()
        if "fused_linear_cross_entropy" in inspect.signature(function).parameters
    }
    if model_type not in known:
        raise ConfigError(
            f"loss=liger: liger-kernel has no fused loss for {model_type}; it has one for "
            f"{', '.join(sorted(known))}",
            "planner.pin.loss=chunked, which keeps no whole logits either",
        )
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise ConfigError(
            "loss=liger: the head has an adapter (method.target_modules), and Liger reads the head's own "
            "weight only",
            "planner.pin.loss=chunked, or no adapter on the head",
        )
