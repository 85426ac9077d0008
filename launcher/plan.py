"""The plan: one complete set of decisions, and the choice among them with its reasons."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.job import (
    Attention,
    Checkpointing,
    Engine,
    Loss,
    Method,
    OffloadDevice,
    Optimizer,
    Precision,
)
from launcher.job import Grade as Grade
from launcher.memory import MemoryEstimate
from launcher.optimisation import PAGED_OPTIMIZERS
from launcher.step_time import StepTime


@dataclass(frozen=True)
class Buckets:
    """How much of the model an engine moves at a time, in elements: DeepSpeed's names in DeepSpeed's unit.

    A bucket is a buffer of so many elements, whatever the model's size: DeepSpeed's default of 5e8 may be what does not
    fit. DDP and FSDP2 know only the first one (FSDP2 not even that: it moves a layer at a time).
    """

    reduce_bucket_elements: int
    """`reduce_bucket_size`: gradients reduced at a time (DDP: `bucket_cap_mb`)."""
    allgather_bucket_elements: int
    """`allgather_bucket_size`: updated parameters gathered at a time, ZeRO 1 and 2."""
    prefetch_bucket_elements: int = 0
    """`stage3_prefetch_bucket_size`: parameters fetched ahead."""
    persistence_threshold_elements: int = 0
    """`stage3_param_persistence_threshold`: smaller parameters are not sharded."""
    max_live_elements: int = 0
    """`stage3_max_live_parameters`: gathered parameters that may wait for their next use."""
    max_reuse_distance_elements: int = 0
    """`stage3_max_reuse_distance`: a parameter waits only for a use that is nearer."""
    sub_group_elements: int = 1_000_000_000
    """`sub_group_size`: elements of a rank that ZeRO 3 updates at a time, each with a gradient in fp32."""
    overlap_exchange: bool = True
    """`overlap_comm`: whether ranks exchange while they compute. Small buckets don't: what is larger than a bucket would
    be exchanged from its own memory, by another stream than the one that lets go of it."""


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
    engine: Engine = Engine.NONE
    """What trains on several devices together; `none` on one."""
    num_devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Nodes."""
    zero_stage: int = 0
    """What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too; FSDP2 shards all three."""
    offload_optimizer: bool = False
    """Whether optimizer states live off the device."""
    offload_parameters: bool = False
    """Whether parameters live off the device."""
    offload_device: OffloadDevice = OffloadDevice.CPU
    """Where they live then."""
    shard_within_node: bool = False
    """FSDP2: sharded over the devices of a node, repeated over nodes."""
    buckets: Buckets | None = None
    """How much the engine moves at a time; None on one device."""

    def __post_init__(self) -> None:
        if (self.engine is Engine.NONE) != (self.world_size == 1 and not self.uses_offload):
            raise ValueError(
                f"engine {self.engine} for {self.num_nodes} x {self.num_devices} devices, offload {self.uses_offload}"
            )
        if self.zero_stage and self.engine not in (Engine.DEEPSPEED, Engine.FSDP2):
            raise ValueError(f"ZeRO stage {self.zero_stage} with engine {self.engine}")
        if self.engine is Engine.FSDP2 and self.zero_stage != 3:
            raise ValueError(f"fsdp2 shards parameters, gradients and states: stage 3, not {self.zero_stage}")
        if self.micro_batch_size < 1 or self.gradient_accumulation_steps < 1 or self.max_length < 1:
            raise ValueError(
                f"micro batch {self.micro_batch_size} x accumulation {self.gradient_accumulation_steps} "
                f"x length {self.max_length}: each must be at least 1"
            )
        if (self.method is Method.FULL) == (self.rank > 0):
            raise ValueError(f"method {self.method} with rank {self.rank}")

    @property
    def world_size(self) -> int:
        """Devices over all nodes, one process each."""
        return self.num_devices * self.num_nodes

    @property
    def uses_offload(self) -> bool:
        """Whether anything of the model lives off the device."""
        return self.offload_optimizer or self.offload_parameters

    @property
    def swaps(self) -> bool:
        """Whether optimizer states live on NVMe."""
        return self.offload_optimizer and self.offload_device is OffloadDevice.NVME

    @property
    def uses_pages(self) -> bool:
        """Whether optimizer states go to host memory where the device is full."""
        return self.optimizer in PAGED_OPTIMIZERS

    @property
    def has_small_buckets(self) -> bool:
        """Whether its engine does with small buckets, and exchanges nothing while it computes."""
        return self.buckets is not None and not self.buckets.overlap_exchange

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all devices."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step and device, padding included."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.max_length


def varied(plan: Plan, **changes: Any) -> Plan:
    """`dataclasses.replace` without its checks, in a tenth of its time: for values that are legal where the plan is.

    Args:
        plan: A plan.
        changes: Kernels, checkpointing, or a split of the batch, by field.
    """
    other = object.__new__(Plan)
    vars(other).update(vars(plan), **changes)
    return other


SMALL_BUCKETS = ", small buckets"
"""How words of a plan, or of its arrangement, end where its buckets are small."""


def offload_words(optimizer: bool, parameters: bool, *, swaps: bool = False) -> str:
    """What lives off the device, `, optimizer states offloaded`; empty when nothing does.

    Args:
        optimizer: Whether optimizer states do.
        parameters: Whether parameters do, in host memory.
        swaps: Whether states are on NVMe.
    """
    if swaps:
        return f", optimizer states on NVMe{' and parameters offloaded' if parameters else ''}"
    what = [name for name, is_so in (("optimizer states", optimizer), ("parameters", parameters)) if is_so]
    return f", {' and '.join(what)} offloaded" if what else ""


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
    step_seconds: float | None = None
    """Predicted time of an optimizer step; None where it is unknown, or does not matter."""
    is_refused: bool = False
    """Whether it fits, and its grade is refused; `short_by_bytes` are then the bytes less with which it is not."""
    is_unexplored: bool = False
    """Whether it exceeds the budget, nobody knows by how much, and its like with the first choice of loss is priced."""
    is_host_short: bool = False
    """Whether it is host memory that `short_by_bytes` is about; of the device's it may need too much besides."""
    is_nvme_short: bool = False
    """The same of NVMe."""

    @property
    def is_off_device(self) -> bool:
        """Whether it is not the device's memory that it lacks."""
        return self.is_host_short or self.is_nvme_short


class ManyRejections(Sequence[Rejection]):
    """Rejections that are written out when somebody looks at them."""

    @abstractmethod
    def nearest(self) -> Rejection | None:
        """The one that exceeds its budget by least; see `nearest`."""


def nearest(rejected: Iterable[Rejection]) -> Rejection | None:
    """Of plans that exceed their budget, the one that does by least; None where none does.

    Those that fit and are refused for their grade come before those that exceed the budget, and those that exceed host
    memory or NVMe come last. What no engine can carry out, and what merely isn't the best, is short of nothing.
    Unexplored ones are left out.
    """
    if isinstance(rejected, ManyRejections):
        return rejected.nearest()
    return min(
        (item for item in rejected if item.short_by_bytes > 0 and not item.is_unexplored),
        key=lambda item: (not item.is_refused, item.is_off_device, item.short_by_bytes),
        default=None,
    )


@dataclass(frozen=True)
class Squeeze:
    """How tight a plan is, and what to change for a job that must run for weeks."""

    grade: Grade
    """In one word."""
    free_bytes: int
    """What the device has left at the highest moment, at the upper end of what is expected."""
    free_share: float
    """The same, of what is usable."""
    savers: tuple[str, ...]
    """Memory savers that the plan needs."""
    advice: str = ""
    """What to change; empty when nothing has to be, or nobody asked."""


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
    """Its memory, as the trace of its regime has it."""
    rejected: Sequence[Rejection]
    """Every other plan considered, nearest to fitting first. Thousands are written out when they are looked at."""
    capacity_bytes: int
    """Usable bytes of the device."""
    headroom_bytes: int
    """Bytes of the capacity that a plan must leave free."""
    num_considered: int
    """Plans considered."""
    step: StepTime | None = None
    """Predicted time of the plan's optimizer step; None where nobody knows how fast the device is."""
    runner_up_step: StepTime | None = None
    """The same of the runner-up."""
    notes: tuple[str, ...] = ()
    """What a person should know about this choice."""
    squeeze: Squeeze | None = None
    """How tight the plan is; None when nothing fits, or nobody asked."""

    @property
    def nearest(self) -> Rejection | None:
        """The rejected plan that exceeds its budget by least; None where none does."""
        return nearest(self.rejected)

    @property
    def feasible(self) -> bool:
        """Whether a plan was found."""
        return self.plan is not None
