"""What each higher ZeRO stage would free of a plan on several devices, and which would not help, and why."""

from __future__ import annotations

from launcher.job import Engine, JobSpec, Method
from launcher.memory import Category, MemoryEstimate
from launcher.plan import Plan
from launcher.planner.arrangements import Arrangement, arrangement_of
from launcher.planner.forecast import Forecaster
from launcher.planner.marginal import unpinned_arrangements
from launcher.units import format_bytes

WORTH = 0.02
"""Share of a device's peak below which a stage frees nothing to speak of: a convention."""
SHARDED = {Category.OPTIMIZER_STATE: 1, Category.GRADIENTS: 2, Category.PARAMETERS: 3}
"""What is sharded, and from which stage on."""


def sharding_words(job: JobSpec, plan: Plan, forecaster: Forecaster) -> str:
    """What higher stages would free, in words; empty on one device, with offload, and where nothing shards more.

    Args:
        job: The job, resolved.
        plan: Its plan.
        forecaster: Prices the stages.

    Raises:
        UnsupportedByPlanner: When the tracer can't follow a stage.
    """
    if plan.world_size == 1 or plan.uses_offload:
        return ""
    free, possible, refused = unpinned_arrangements(job, plan)
    here = arrangement_of(plan)
    higher = [item for item in possible if _is_higher(item, here) and not item.small_buckets]
    impossible = {item.zero_stage: reason for item, reason in refused.items() if _is_higher(item, here)}
    if not higher and not impossible:
        return ""
    base = forecaster.estimate(plan)
    forecaster.prepare([item.applied_to(plan, free) for item in higher])
    saved = {
        item.zero_stage: base.peak_device_bytes
        - forecaster.estimate(item.applied_to(plan, free)).peak_device_bytes
        for item in higher
    }
    said = [f"stage {stage} {_change(size)}" for stage, size in saved.items()]
    said += [f"stage {stage} can't be with this plan: {reason}" for stage, reason in impossible.items()]
    words = f"of {format_bytes(base.peak_device_bytes)} on a device ZeRO {', '.join(said)}; {_parts(base)}"
    useless = [stage for stage, size in saved.items() if size < WORTH * base.peak_device_bytes]
    if not useless:
        return words
    name = f"Stage{'s' if len(useless) > 1 else ''} {' and '.join(map(str, useless))}"
    return f"{words}. {name} would not help: {_why(plan, base, useless)}"


def _is_higher(item: Arrangement, here: Arrangement) -> bool:
    """Whether a stage of DeepSpeed shards more, on the devices alone."""
    return item.engine is Engine.DEEPSPEED and not item.offloads and item.zero_stage > here.zero_stage


def _change(saved_bytes: int) -> str:
    if saved_bytes < 0:
        return f"takes {format_bytes(-saved_bytes)} more"
    return f"frees {format_bytes(saved_bytes)}"


def _parts(base: MemoryEstimate) -> str:
    """What the highest moment is made of, by what a stage could shard."""
    amounts = base.peak.by_category_bytes
    parts = [
        f"{format_bytes(amounts.get(name, 0))} of {name.value.replace('_', ' ')} (sharded from stage {stage} on)"
        for name, stage in SHARDED.items()
    ]
    rest = base.peak_device_bytes - sum(amounts.get(name, 0) for name in SHARDED)
    return f"in {base.peak.phase.value} it holds {', '.join(parts)}, and {format_bytes(rest)} of its own"


def _why(plan: Plan, base: MemoryEstimate, useless: list[int]) -> str:
    """Why some stages free nothing to speak of."""
    amounts = base.peak.by_category_bytes
    below = sum(amounts.get(name, 0) for name, stage in SHARDED.items() if stage <= max(useless))
    if below < WORTH * base.peak_device_bytes:
        few = "adapters have few gradients and states" if plan.method is not Method.FULL else "that is little"
        return f"{few}, and what each device computes of its own batch no stage shards"
    return "what they shard is not what fills the device at its highest moment, or their buckets take as much"
