"""The optimisation, and what is looked at meanwhile: evaluation and generation. Part of the schema in job.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Final, Literal

from annotated_types import Ge, Gt, Le


class Precision(StrEnum):
    """Which bytes weights and computations have.

    `bf16` computes in the weights' own dtypes: in bf16, and in fp32 where adapters are. `bf16_autocast` has the same
    weights, and multiplies all matrices in bf16: what other trainers do with `bf16: true` and a model loaded in bf16.
    `bf16_mixed` and `fp16_mixed` do that over weights in fp32.
    """

    BF16 = "bf16"
    BF16_AUTOCAST = "bf16_autocast"
    BF16_MIXED = "bf16_mixed"
    FP16_MIXED = "fp16_mixed"
    FP32 = "fp32"


BF16_WEIGHTS = frozenset((Precision.BF16, Precision.BF16_AUTOCAST))
"""Precisions whose weights are bf16."""
IN_BF16 = BF16_WEIGHTS | {Precision.BF16_MIXED}
"""Precisions that compute in bf16."""
AUTOCAST = frozenset((Precision.BF16_AUTOCAST, Precision.BF16_MIXED))
"""Precisions with torch's autocast to bf16."""


class Optimizer(StrEnum):
    """Optimizer, by its transformers name."""

    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_TORCH = "adamw_torch"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    LION_32BIT = "lion_32bit"
    LION_8BIT = "lion_8bit"
    PAGED_LION_32BIT = "paged_lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    ADAFACTOR = "adafactor"
    SGD = "sgd"
    GALORE_ADAMW = "galore_adamw"
    GALORE_ADAFACTOR = "galore_adafactor"
    APOLLO_ADAMW = "apollo_adamw"


class Schedule(StrEnum):
    """Learning-rate schedule, by its transformers name: those that follow from the step alone.

    Of transformers' others some need a number that no key gives (`cosine_with_min_lr`, `cosine_warmup_with_min_lr`,
    `warmup_stable_decay`), and some the evaluations' losses (`reduce_lr_on_plateau`, `greedy`), which they miss where an
    engine wraps them.
    """

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"


class Integration(StrEnum):
    """Where transformers' Trainer can report metrics to, by its names (transformers 5.24)."""

    AZURE_ML = "azure_ml"
    CLEARML = "clearml"
    CODECARBON = "codecarbon"
    COMET_ML = "comet_ml"
    DAGSHUB = "dagshub"
    DVCLIVE = "dvclive"
    FLYTE = "flyte"
    KUBEFLOW = "kubeflow"
    MLFLOW = "mlflow"
    NEPTUNE = "neptune"
    SWANLAB = "swanlab"
    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"
    WANDB = "wandb"


IMPLEMENTATIONS = (
    (Optimizer.ADAMW_TORCH_FUSED, Optimizer.ADAMW_TORCH),
    (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT),
    (Optimizer.LION_32BIT, Optimizer.PAGED_LION_32BIT),
    (Optimizer.LION_8BIT, Optimizer.PAGED_LION_8BIT),
)
"""Optimizers that make the same update: in one kernel or in several, with states on the device or in pages that go to
host memory where the device is full. `paged_adamw_32bit` is alone: of bf16 weights torch's AdamW has states in bf16."""
BITSANDBYTES_OPTIMIZERS = tuple(name for name in Optimizer if name.value.endswith(("_8bit", "_32bit")))
"""Optimizers of bitsandbytes."""
PAGED_OPTIMIZERS = tuple(name for name in Optimizer if name.value.startswith("paged_"))
"""Optimizers of bitsandbytes whose states go to host memory where the device is full."""


def implementations(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Optimizers that make the same update as one, itself among them."""
    return next((same for same in IMPLEMENTATIONS if optimizer in same), (optimizer,))


AUTO_SAVE_STEPS: Final = 500
"""Steps between checkpoints where nobody says how many: transformers' own default (5.24, TrainingArguments)."""
LOW_RANK_OPTIMIZERS = (Optimizer.GALORE_ADAMW, Optimizer.GALORE_ADAFACTOR, Optimizer.APOLLO_ADAMW)
"""Optimizers whose states belong to projected gradients."""


@dataclass(frozen=True)
class TrainingSpec:
    """The optimisation: everything that changes the result belongs here."""

    global_batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 16
    """Sequences per optimizer step, over all devices; the planner splits it, never changes it."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps; unset: `num_epochs` decides."""
    num_epochs: Annotated[float, Gt(0)] = 1.0
    """Passes over the data, when `max_steps` is unset."""
    save_steps: Annotated[int, Ge(1)] | Literal["auto"] | None = None
    """A checkpoint every so many optimizer steps; null: none. `auto`, as every command line has it: every 500, of which
    the newest is kept, where there may be more steps than that, and where what is saved can be resumed."""
    save_total_limit: Annotated[int, Ge(1)] | None = None
    """Checkpoints kept, the newest; unset: all, with `save_steps=auto` one."""
    learning_rate: Annotated[float, Gt(0)] | None = None
    """Peak learning rate; unset: 2e-4 with adapters, 2e-5 for full fine-tuning."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps over which the learning rate rises."""
    schedule: Schedule = Schedule.COSINE
    """Learning-rate schedule, by its transformers name."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""
    optimizer: Optimizer = Optimizer.ADAMW_TORCH_FUSED
    """Optimizer, by its transformers name. Of those that make the same update the planner takes fused for `adamw_torch`,
    and pages (`paged_*`) only where nothing fits otherwise; `planner.pin.optimizer` keeps one."""
    optimizer_rank: Annotated[int, Ge(1)] = 128
    """Rank of the projected gradients; GaLore and APOLLO only."""
    optimizer_target_modules: str | tuple[str, ...] = "all-linear"
    """Modules whose gradients are projected, `all-linear` or names; GaLore and APOLLO only."""
    precision: Precision = Precision.BF16
    """`bf16`: weights and computation; `*_mixed`: fp32 weights under autocast; `fp32`."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    """Seed of data order, adapters and dropout; NumPy takes none of more than 32 bits."""
    logging_steps: Annotated[int, Ge(1)] = 1
    """Metrics every so many optimizer steps."""
    report_to: tuple[Integration, ...] = (Integration.TENSORBOARD,)
    """Where the Trainer reports metrics besides metrics.jsonl; `[]` turns it off."""

    @property
    def steps_between_saves(self) -> int | None:
        """`save_steps`, settled.

        Raises:
            ValueError: While it is `auto`.
        """
        if isinstance(self.save_steps, str):
            raise ValueError(f"training.save_steps={self.save_steps} is not settled")
        return self.save_steps

    def with_saves_settled(self, can_resume: bool) -> TrainingSpec:
        """The same with numbers in the place of `save_steps=auto`.

        A run of no more steps than there would be between two checkpoints has none. Their disk is bounded, because nobody
        asked for them: a new one is written before the old one is removed, so there are two at most.

        Args:
            can_resume: Whether the job could go on from a checkpoint, as far as the optimizer does not decide that.
        """
        if self.save_steps != "auto":
            return self
        is_short = self.max_steps is not None and self.max_steps <= AUTO_SAVE_STEPS
        # states of the first can't be read back, and those of the others only onto the device, which may have no room
        unresumed = (*LOW_RANK_OPTIMIZERS, *PAGED_OPTIMIZERS)
        if is_short or not can_resume or self.optimizer in unresumed:
            return replace(self, save_steps=None)
        return replace(self, save_steps=AUTO_SAVE_STEPS, save_total_limit=self.save_total_limit or 1)


@dataclass(frozen=True)
class EvaluationSpec:
    """Loss on held-out examples; its batch has a peak of its own."""

    enabled: bool = False
    """Hold examples out and evaluate on them."""
    path: str = ""
    """Held-out examples, as `data.path`; empty: the last `num_examples` of the training data."""
    num_examples: Annotated[int, Ge(1)] = 64
    """Examples evaluated on."""
    batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per evaluation batch; unset: the micro batch of training."""
    steps: Annotated[int, Ge(1)] | None = None
    """Evaluate every so many optimizer steps; unset: once at the end of each epoch."""
    keep_logits: bool = False
    """Keep the logits of all held-out examples, as transformers does for a `compute_metrics`; here for the share of
    tokens that are predicted right. Takes examples x length x vocabulary on the device, twice while they are joined."""
    accumulation_steps: Annotated[int, Ge(1)] | None = None
    """Move kept logits to host memory every so many batches; unset: all of them at the end."""


@dataclass(frozen=True)
class GenerationSpec:
    """Text generated while training, to look at; its cache of keys and values has a peak of its own."""

    enabled: bool = False
    """Generate after each evaluation, and at the end of training."""
    num_prompts: Annotated[int, Ge(1)] = 4
    """Prompts: the beginnings of held-out examples (of training examples, when none are held out)."""
    batch_size: Annotated[int, Ge(1)] = 4
    """Prompts per batch."""
    prompt_length: Annotated[int, Ge(2)] = 256
    """Tokens per prompt at most; of longer ones the last tokens are kept."""
    max_new_tokens: Annotated[int, Ge(2)] = 128
    """Tokens generated per prompt at most."""
