"""The smallest change that makes a job fit of which no plan does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.engine_limits import engine_limits
from launcher.errors import LauncherError
from launcher.job import Checkpointing, Engine, JobSpec, Loss
from launcher.memory import Phase
from launcher.plan import Plan, PlanChoice
from launcher.planner.forecast import Forecaster
from launcher.planner.space import batch_splits, checkpointing_modes
from launcher.units import format_bytes

SHORTEST = 8
"""No shorter length is worth a word."""
SHORT = 512
"""Lengths above it are said in whole 64s, those below in whole 8s."""
SAVES_MOST = (Checkpointing.FULL, Checkpointing.OFFLOAD)


def smallest_change(job: JobSpec, choice: PlanChoice, forecaster: Forecaster) -> str:
    """What would make a job fit that has no plan: each single change of what is pinned and of the length, priced.

    Args:
        job: The job, resolved.
        choice: Its search, which found nothing.
        forecaster: Prices plans of the job.
    """
    nearest = choice.nearest
    assert nearest is not None  # something exceeds the budget, or a plan was found
    more = f"{format_bytes(nearest.short_by_bytes)} ({nearest.short_by_bytes:,} bytes)"
    if nearest.is_refused:
        return (
            f"hardware with {more} more memory, shorter data.max_length, or planner.refused_grades=[], which takes the "
            "plan as it is"
        )
    if nearest.is_host_short:
        return f"hardware with {more} more host memory (hardware.host_memory_bytes)"
    if nearest.is_nvme_short:
        return f"{more} more NVMe for each device (hardware.nvme_bytes)"
    budget_bytes = choice.capacity_bytes - choice.headroom_bytes

    def fits(plan: Plan) -> bool:
        if plan.engine is not Engine.NONE and engine_limits(job, plan):
            return False
        try:
            return forecaster.estimate(plan).peak_device_bytes <= budget_bytes
        except LauncherError:  # the tracer can't follow it, or no library has it
            return False

    freed = next((words for words, plan in _without_a_pin(job, nearest.plan) if fits(plan)), "")
    ways = [f"{freed}, which leaves the result alone"] if freed else []
    if _fits_without_checkpoints(job, nearest.plan, forecaster, budget_bytes):
        ways.append("training.save_steps=null, because a resumed run has paged states on the device")
    if length := _longest(nearest.plan, fits):
        ways.append(f"data.max_length={length}")
    spare = choice.capacity_bytes - nearest.peak_bytes
    if spare > 0 and nearest.peak_bytes:
        ways.append(f"planner.headroom={int(1000 * spare / choice.capacity_bytes) / 1000:g}")
    ways.append(f"hardware with {more} more memory")
    if on_host := [item.short_by_bytes for item in choice.rejected if item.is_host_short]:
        ways.append(f"{format_bytes(min(on_host))} or more of host memory beyond what there is")
    return f"{', or '.join(ways)}"


def _fits_without_checkpoints(job: JobSpec, plan: Plan, forecaster: Forecaster, budget_bytes: int) -> bool:
    """Whether a plan whose states are paged exceeds the device as a resumed run alone."""
    if job.training.save_steps is None or not plan.uses_pages:
        return False
    estimate = forecaster.estimate(plan)
    undisturbed = [peak.allocated_bytes for peak in estimate.phases if peak.phase is not Phase.RESUME]
    freed_bytes = estimate.peak.allocated_bytes - max(undisturbed)
    return freed_bytes > 0 and estimate.peak_device_bytes - freed_bytes <= budget_bytes


def _without_a_pin(job: JobSpec, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """What the pins forbid and the result does not depend on, one at a time: what is least slow first."""
    pin = job.planner.pin
    unpinned = replace(job, planner=replace(job.planner, pin=type(pin)()))
    if pin.loss is Loss.PLAIN:
        yield "planner.pin.loss=chunked", replace(plan, loss=Loss.CHUNKED)
    if pin.micro_batch_size or pin.gradient_accumulation_steps:
        for micro, steps in reversed(batch_splits(unpinned)):
            if micro < plan.micro_batch_size:
                keys = [f"planner.pin.micro_batch_size={micro}"] if pin.micro_batch_size else []
                keys += (
                    [f"planner.pin.gradient_accumulation_steps={steps}"]
                    if pin.gradient_accumulation_steps
                    else []
                )
                changed = replace(plan, micro_batch_size=micro, gradient_accumulation_steps=steps)
                yield " with ".join(keys), changed
    if pin.activation_checkpointing:
        possible = checkpointing_modes(unpinned)
        for mode in SAVES_MOST:
            if mode in possible and mode is not plan.activation_checkpointing:
                key = f"planner.pin.activation_checkpointing={mode.value}"
                yield key, replace(plan, activation_checkpointing=mode)


def _longest(plan: Plan, fits: Callable[[Plan], bool]) -> int:
    """The longest sequence with which a plan fits, tokens; 0 where none does."""
    unit = 64 if plan.max_length > SHORT else SHORTEST
    low, high = 0, -(-plan.max_length // unit)  # in units; what is there is too long
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(plan, max_length=unit * middle)):
            low = middle
        else:
            high = middle
    return unit * low
