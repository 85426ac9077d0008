"""The space that is searched: the job's ordered lists, the splits of its batch, and the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.errors import ConfigError
from launcher.hardware import DeviceKind
from launcher.job import Attention, Checkpointing, JobSpec, Loss, Method, Optimizer, OptionalKernel, Task
from launcher.optimisation import PAGED_OPTIMIZERS, implementations
from launcher.plan import Plan
from launcher.planner.interval import CONVENTION


def semantic_plans(job: JobSpec) -> Iterator[Plan]:
    """One plan per acceptable combination of the knobs that change the result, best first.

    Method comes before length, and length before rank; free knobs have their first value.

    Raises:
        ConfigError: When a rank is pinned and no method has one.
    """
    pin, choices = job.planner.pin, job.planner.choices
    methods = (pin.method,) if pin.method else choices.method or (job.method.name,)
    lengths = (pin.max_length,) if pin.max_length else choices.max_length or (job.data.length,)
    ranks = (pin.rank,) if pin.rank else choices.rank or (job.method.rank,)
    loss = losses(job)[0]
    if pin.rank and set(methods) == {Method.FULL}:
        raise ConfigError(
            f"planner.pin.rank={pin.rank} is a LoRA rank, and the job's only method is {Method.FULL.value}",
            "unpin the rank, or allow method lora or qlora",
        )
    for method in dict.fromkeys(methods):
        for length in dict.fromkeys(lengths):
            for rank in (0,) if method is Method.FULL else dict.fromkeys(ranks):
                yield Plan(
                    method=method,
                    rank=rank,
                    max_length=length,
                    micro_batch_size=1,
                    gradient_accumulation_steps=job.training.global_batch_size,
                    activation_checkpointing=pin.activation_checkpointing or Checkpointing.NONE,
                    attention=attentions(job)[0],
                    loss=loss,
                    optimizer=optimizers(job)[0],
                    precision=job.training.precision,
                )


def optimizers(job: JobSpec) -> tuple[Optimizer, ...]:
    """Implementations of the optimizer that a job can choose from; a later one is taken only where nothing fits before.

    torch's fused kernel does in one pass what foreach does in a dozen, whose temporaries are as large as the gradients;
    it is never the slower or the larger one. Pages are for states that don't fit; a CPU has no other memory.
    """
    own, pinned = job.training.optimizer, job.planner.pin.optimizer
    same = implementations(own)
    if pinned:
        return (pinned,)
    if not any(name in PAGED_OPTIMIZERS for name in same):
        return same[:1]
    return same if job.hardware.kind is DeviceKind.CUDA else (own,)


def losses(job: JobSpec) -> tuple[Loss, ...]:
    """Kernels of the loss that a job can choose from; the first one is taken unless another is better.

    Liger's needs a package, and is weighed where the job says that the machines have it.
    """
    if job.model.task is Task.SEQUENCE_CLASSIFICATION:
        return (Loss.PLAIN,)  # a classifier has a few scores per text, and nothing to cut into tiles
    if job.planner.pin.loss:
        return (job.planner.pin.loss,)
    liger = (Loss.LIGER,) if OptionalKernel.LIGER in job.planner.kernels else ()
    return (Loss.CHUNKED, Loss.PLAIN, *liger)


def attentions(job: JobSpec) -> tuple[Attention, ...]:
    """Kernels of attention that a job can choose from; the first one is taken unless another is better.

    Eager attention holds all scores, and is neither faster nor smaller than torch's on a GPU.
    """
    if job.planner.pin.attention:
        return (job.planner.pin.attention,)
    has_flash = OptionalKernel.FLASH_ATTENTION_2 in job.planner.kernels
    return (Attention.SDPA, Attention.FLASH_ATTENTION_2) if has_flash else (Attention.SDPA,)


def batch_splits(job: JobSpec) -> tuple[tuple[int, int], ...]:
    """Every (micro batch, accumulation) whose product is a device's share of the global batch, smallest first.

    Raises:
        ConfigError: When pinned values do not divide the global batch.
    """
    pin, devices = job.planner.pin, job.hardware.world_size
    total, rest = divmod(job.training.global_batch_size, devices)
    if rest:
        raise ConfigError(
            f"training.global_batch_size={job.training.global_batch_size} can't be split over {devices} devices",
            f"a multiple of {devices}, or fewer devices",
        )
    splits = tuple(
        (micro, total // micro)
        for micro in divisors(total)
        if pin.micro_batch_size in (None, micro) and pin.gradient_accumulation_steps in (None, total // micro)
    )
    if not splits:
        raise ConfigError(
            f"micro batch {pin.micro_batch_size or 'any'} x accumulation "
            f"{pin.gradient_accumulation_steps or 'any'} can't make training.global_batch_size="
            f"{job.training.global_batch_size}" + (f" on {devices} devices" if devices > 1 else ""),
            f"the product must be {total}: set training.global_batch_size, or unpin one of the two",
        )
    return splits


def divisors(number: int) -> tuple[int, ...]:
    """What divides a number from 1, smallest first."""
    small = [item for item in range(1, math.isqrt(number) + 1) if number % item == 0]
    return tuple(dict.fromkeys([*small, *(number // item for item in reversed(small))]))


def checkpointing_modes(job: JobSpec) -> tuple[Checkpointing, ...]:
    """Checkpointing modes that a job can choose from, from nothing recomputed to everything."""
    pin = job.planner.pin
    if pin.activation_checkpointing:
        return (pin.activation_checkpointing,)
    impossible = set()
    if job.hardware.kind is DeviceKind.CPU:
        impossible.add(Checkpointing.OFFLOAD)  # there is no other memory
    if pin.attention is Attention.EAGER:
        impossible.add(Checkpointing.SELECTIVE)  # it keeps what torch's attention operations return
    return tuple(mode for mode in Checkpointing if mode not in impossible)


def headroom_bytes(job: JobSpec) -> int:
    """Bytes of the device that a plan must leave free."""
    share = job.planner.headroom
    fraction = CONVENTION if isinstance(share, str) else share
    return round(fraction * job.hardware.memory_bytes)
