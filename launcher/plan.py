"""The plan: one complete set of decisions, and the choice among them with its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job import Attention, Checkpointing, Loss, Method, Optimizer, Precision
from launcher.memory import MemoryEstimate


@dataclass(frozen=True)
class Plan:
    """Every knob that decides memory, with its value.

    Raises:
        ValueError: When the batch arithmetic does not hold.
    """

    method: Method
    """`full`, `lora` or `qlora`."""
    rank: int
    """LoRA rank; 0 for full fine-tuning."""
    max_length: int
    """Tokens per sequence."""
    micro_batch_size: int
    """Sequences per forward pass and device."""
    gradient_accumulation_steps: int
    """Forward and backward passes per optimizer step."""
    activation_checkpointing: Checkpointing
    """What the backward pass recomputes."""
    attention: Attention
    """Attention implementation."""
    loss: Loss
    """Loss kernel."""
    optimizer: Optimizer
    """Optimizer implementation."""
    precision: Precision
    """Bytes of weights and computation."""
    zero_stage: int = 0
    """ZeRO stage; 0 on one device."""
    offload_optimizer: bool = False
    """Whether optimizer states live in host memory."""
    offload_parameters: bool = False
    """Whether parameters live in host memory."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.gradient_accumulation_steps < 1 or self.max_length < 1:
            raise ValueError(
                f"micro batch {self.micro_batch_size} x accumulation {self.gradient_accumulation_steps} "
                f"x length {self.max_length}: each must be at least 1"
            )
        if (self.method is Method.FULL) == (self.rank > 0):
            raise ValueError(f"method {self.method} with rank {self.rank}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step and device, padding included."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.max_length


@dataclass(frozen=True)
class Rejection:
    """A plan that was considered and not taken."""

    plan: Plan
    """What was considered."""
    reason: str
    """Why not, with figures."""
    short_by_bytes: int
    """Bytes by which it exceeds the budget, at least; 0 for a plan that is merely not the best."""
    peak_bytes: int
    """Predicted device peak, bytes, at least; 0 for a plan that was not priced."""


@dataclass(frozen=True)
class PlanChoice:
    """The outcome of a search.

    `plan`, `estimate` and `runner_up` are None when nothing fits.
    """

    plan: Plan | None
    """The plan taken."""
    reason: str
    """Why this plan, or why none."""
    estimate: MemoryEstimate | None
    """Its memory, traced at its true shape."""
    runner_up: Plan | None
    """The next best plan that fits."""
    runner_up_estimate: MemoryEstimate | None
    """Its memory, traced at its true shape."""
    rejected: tuple[Rejection, ...]
    """Every other plan considered, nearest to fitting first."""
    capacity_bytes: int
    """Usable bytes of the device."""
    headroom_bytes: int
    """Bytes of the capacity that a plan must leave free."""
    num_considered: int
    """Plans priced."""
    notes: tuple[str, ...] = ()
    """What a person should know about this choice."""

    @property
    def feasible(self) -> bool:
        """Whether a plan was found."""
        return self.plan is not None
