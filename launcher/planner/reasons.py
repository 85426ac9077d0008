"""Why a plan was taken or not, in words with figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from launcher.job import Checkpointing, Engine, JobSpec, Optimizer
from launcher.memory import MemoryEstimate, Phase
from launcher.plan import Plan, Rejection
from launcher.planner.arrangements import Arrangement, arrangement_of, arrangement_words, rounds
from launcher.planner.objective import SAME, Price, Ranking
from launcher.planner.space import attentions, losses, optimizers
from launcher.units import format_bytes, format_step

NOT_PRICED = "; not priced"
"""Remark on a plan that may fit or not: it is worse in any case."""


def too_large(estimate: MemoryEstimate, budget_bytes: int, *, keeps_logits: bool) -> str:
    """A plan that exceeds the device."""
    peak = estimate.peak
    kept = "; evaluation.keep_logits=true keeps those of all held-out examples"
    return (
        f"{peak.phase.value} needs {format_bytes(estimate.peak_device_bytes)}, "
        f"{format_bytes(estimate.peak_device_bytes - budget_bytes)} over the budget; "
        f"{_largest({name.value: size for name, size in peak.by_category_bytes.items()})}"
        f"{kept if keeps_logits and peak.phase is Phase.EVALUATION else ''}"
    )


def too_large_on_host(estimate: MemoryEstimate, short_by_bytes: int) -> str:
    """A plan that exceeds the host memory."""
    assert estimate.host is not None  # it was found too large
    return (
        f"needs {format_bytes(estimate.host.peak_bytes)} of host memory, {format_bytes(short_by_bytes)} more than "
        f"there is; {_largest(estimate.host.by_category_bytes)}"
    )


def _largest(parts: Mapping[str, int]) -> str:
    largest = max(parts, key=lambda name: parts[name])
    return f"{format_bytes(parts[largest])} of it {largest}"


def like_smaller(smaller: Plan, short_by_bytes: int) -> str:
    """A plan with a larger micro batch than one that fails."""
    return (
        f"needs more than micro batch {smaller.micro_batch_size}, which is already {format_bytes(short_by_bytes)} "
        "over the budget"
    )


def by_bound(bound_bytes: int, budget_bytes: int) -> str:
    """A plan of which only a lower bound is known."""
    return f"needs at least {format_bytes(bound_bytes)}, {format_bytes(bound_bytes - budget_bytes)} over the budget"


def by_host_bound(bound_bytes: int, host_bytes: int) -> str:
    """A plan of which only a lower bound of its host memory is known."""
    return (
        f"needs at least {format_bytes(bound_bytes)} of host memory, {format_bytes(bound_bytes - host_bytes)} more than "
        "there is"
    )


def too_large_on_nvme(needed_bytes: int, short_by_bytes: int) -> str:
    """A plan that exceeds a device's share of the NVMe."""
    return f"needs {format_bytes(needed_bytes)} of NVMe, {format_bytes(short_by_bytes)} more than there is"


def worse(price: Price, best: Price, ranking: Ranking) -> str:
    """A plan that fits, and ranks below the plan taken."""
    more = price.estimate.peak_device_bytes - best.estimate.peak_device_bytes
    if ranking.by_memory:
        return f"fits, and needs {format_bytes(more)} more than the plan taken"
    if price.step is None or best.step is None:
        return f"slower than the plan taken: {_rule(price.plan, best.plan)}"
    if price.step.seconds <= ranking.within(best.step.seconds) and more >= 0:
        return f"as fast as the plan taken, and needs {format_bytes(more)} more"
    if price.plan.loss is not best.plan.loss and price.step.seconds <= best.step.seconds:
        return f"{_not_worth_it(price.plan, best.plan)}: {_seconds(price, best)}"
    if price.plan.activation_checkpointing is not best.plan.activation_checkpointing:
        return f"slower than the plan taken: {_seconds(price, best)}; {_rule(price.plan, best.plan)}"
    return f"slower than the plan taken: {_seconds(price, best)}"


def exchanges_more(arrangement: Arrangement, taken: Plan) -> str:
    """An arrangement that comes after that of the plan taken."""
    if arrangement.offloads and taken.uses_offload:
        return f"{arrangement.words()} moves no less to and from the host than what fits{NOT_PRICED}"
    if arrangement.offloads:
        return f"{arrangement.words()} waits for the host, and a plan without offload fits{NOT_PRICED}"
    if arrangement.small_buckets:
        return f"{arrangement.words()} waits for each exchange, and a plan that recomputes nothing fits{NOT_PRICED}"
    return f"{arrangement.words()} exchanges no less than what fits with nothing recomputed{NOT_PRICED}"


def pages_in_vain(optimizer: Optimizer) -> str:
    """A plan whose optimizer states would be paged, where one fits that has them on the device."""
    return f"{optimizer.value} is for states that don't fit on the device, and these do{NOT_PRICED}"


def shards_in_vain(plan: Plan, fitting: Plan) -> str:
    """A plan whose like fits with less sharded, or with ordinary buckets."""
    words, mode = arrangement_words(fitting), fitting.activation_checkpointing.value
    if plan.has_small_buckets and not fitting.has_small_buckets:
        return (
            f"small buckets are for what does not fit with ordinary ones; the same micro batch fits with {words} and "
            f"checkpointing {mode}{NOT_PRICED}"
        )
    return f"exchanges no less than the same micro batch with {words}, which fits with checkpointing {mode}{NOT_PRICED}"


def unpriced(plan: Plan, floor: float, best: Price, ranking: Ranking, is_dominated: bool) -> str:
    """A plan that no trace was worth.

    Args:
        plan: The plan.
        floor: A value that it does not go below; see `Ranking.floor`.
        best: The plan taken.
        ranking: How plans compare.
        is_dominated: Whether a plan with the same micro batch fits that is never slower.
    """
    if ranking.by_memory:
        return f"needs at least {format_bytes(round(floor))}{NOT_PRICED}"
    if is_dominated:
        return f"recomputes or offloads more than a plan with the same micro batch that fits{NOT_PRICED}"
    if best.step is None:
        return f"slower than the plan taken: {_rule(plan, best.plan)}{NOT_PRICED}"
    if plan.loss is not best.plan.loss and floor <= best.step.seconds:
        return (
            f"{_not_worth_it(plan, best.plan)}: at least {format_step(floor)} per step, not "
            f"{format_step(best.step.seconds)}{NOT_PRICED}"
        )
    return (
        f"slower than the plan taken: at least {format_step(floor)} per step, not "
        f"{format_step(best.step.seconds)}{NOT_PRICED}"
    )


def runner_up(second: Price, best: Price, ranking: Ranking) -> str:
    """The next best plan."""
    if ranking.by_memory:
        return "the runner-up: fits, and needs more memory"
    if second.step is None or best.step is None:
        return "the runner-up: fits, and is slower by the planner's rules"
    return f"the runner-up: fits; {_seconds(second, best)}"


def _not_worth_it(plan: Plan, best: Plan) -> str:
    """A plan with another loss that may be as fast."""
    return f"{plan.loss.value} loss is not more than {SAME:.0%} faster than {best.loss.value} loss"


def _seconds(price: Price, best: Price) -> str:
    assert price.step is not None and best.step is not None
    theirs, ours = format_step(price.step.seconds), format_step(best.step.seconds)
    if theirs != ours:
        return f"{theirs} per step, not {ours}"
    return f"{theirs} per step, {price.step.seconds / best.step.seconds - 1:+.2%}"


def _rule(plan: Plan, best: Plan) -> str:
    if plan.has_small_buckets and not best.has_small_buckets:
        return "waits for each exchange"
    if (plan.engine, plan.zero_stage) != (best.engine, best.zero_stage):
        return "exchanges more" if plan.zero_stage > best.zero_stage else "recomputes more"
    if plan.activation_checkpointing is not best.activation_checkpointing:
        return "recomputes activations"
    return f"micro batch {plan.micro_batch_size} while micro batch {best.micro_batch_size} fits"


def taken(
    job: JobSpec,
    best: Price,
    ranking: Ranking,
    budget_bytes: int,
    position: int,
    left: int,
    rejected: Sequence[Rejection] = (),
) -> str:
    """Why a plan was taken.

    Args:
        job: The job.
        best: The plan.
        ranking: How plans compare.
        budget_bytes: What it may take of the device.
        position: Of its combination among the wanted ones.
        left: Combinations that are wanted less.
        rejected: The other plans.
    """
    pin, plan = job.planner.pin, best.plan
    words = [
        "first choice of the job" if position == 0 else f"choice {position + 1} of the job's ordered lists"
    ]
    if ranking.by_memory:
        words.append("it needs the least memory")
    else:
        if pin.activation_checkpointing:
            words.append("checkpointing is pinned")
        elif plan.activation_checkpointing is Checkpointing.NONE:
            words.append("nothing is recomputed")
        else:
            words.append("activations are recomputed because this micro batch does not fit without")
        pinned = pin.micro_batch_size or pin.gradient_accumulation_steps
        size = f"micro batch {plan.micro_batch_size}"
        if ranking.knows_speed:
            words += [f"{size} is pinned"] if pinned else []
            alone = " without host memory" if len(rounds(job)) > 1 and not plan.uses_offload else ""
            words.append(f"no plan that fits{alone} is more than {SAME:.0%} faster")
        else:
            words.append(f"{size} is pinned" if pinned else f"{size} is the largest that fits")
    first, kernel = losses(job)[0], attentions(job)[0]
    if plan.loss is not first:
        words.append(f"with {first.value} loss no plan that fits is as good")
    if plan.attention is not kernel:
        words.append(f"with {kernel.value} attention no plan that fits is as good")
    if plan.optimizer is not optimizers(job)[0] and not ranking.by_memory:
        words.append(_paged(plan, optimizers(job)[0], rejected))
    words += _shortfalls(plan, rejected)
    words.append(f"{format_bytes(budget_bytes - best.estimate.peak_device_bytes)} remain above the headroom")
    if left:
        words.append(f"{left} less wanted combination{'s were' if left > 1 else ' was'} not priced")
    return "; ".join(words)


def _shortfalls(plan: Plan, rejected: Sequence[Rejection]) -> list[str]:
    """By how much arrangements that shard less are short at least, with the same recomputation; and ordinary buckets."""
    short: dict[str, int] = {}
    words = []
    ordinary = replace(arrangement_of(plan), small_buckets=False)
    for item in rejected:
        is_alike = item.plan.activation_checkpointing is plan.activation_checkpointing
        is_alike &= item.plan.optimizer is plan.optimizer and not item.is_off_device
        is_same_job = _is_same_job(item.plan, plan)
        if not (item.short_by_bytes > 0 and is_alike and is_same_job and _shards_less(item.plan, plan)):
            continue
        if arrangement_of(item.plan) != ordinary:
            name = arrangement_words(item.plan)
            short[name] = min(short.get(name, item.short_by_bytes), item.short_by_bytes)
        elif item.plan.micro_batch_size == plan.micro_batch_size:
            words.append(
                "buckets are small, and nothing is exchanged while the device computes, because with ordinary ones the "
                f"same plan is short by {format_bytes(item.short_by_bytes)} or more"
            )
    return words + [f"{name} is short by {format_bytes(size)} or more" for name, size in short.items()]


def _paged(plan: Plan, resident: Optimizer, rejected: Sequence[Rejection]) -> str:
    """By how much plans of the same job are short at least whose states are on the device."""
    short = [
        item.short_by_bytes
        for item in rejected
        if item.plan.optimizer is resident
        and item.short_by_bytes > 0
        and not item.is_off_device
        and _is_same_job(item.plan, plan)
    ]
    lack = f"the job is short by {format_bytes(min(short))} or more" if short else "no plan is taken"
    return (
        f"optimizer states go to host memory where the device is full, because with {resident.value} {lack}"
    )


def _is_same_job(other: Plan, plan: Plan) -> bool:
    """Whether two plans make the same result."""
    return (other.method, other.max_length, other.rank) == (plan.method, plan.max_length, plan.rank)


def _shards_less(other: Plan, plan: Plan) -> bool:
    """Whether an arrangement comes before that of a plan: less is sharded, or buckets are ordinary ones."""
    return _order(arrangement_of(other)) < _order(arrangement_of(plan))


def _order(item: Arrangement) -> tuple[bool, bool, int, bool]:
    return item.offloads, item.small_buckets, item.zero_stage, item.offload_parameters


def none_fits(nearest: Rejection, considered: int, capacity_bytes: int, headroom_bytes: int) -> str:
    """Why there is no plan."""
    plan = nearest.plan
    words = arrangement_words(plan) + ", " if plan.engine is not Engine.NONE else ""
    words += (
        f"{plan.method.value}, length {plan.max_length}, micro batch {plan.micro_batch_size}, checkpointing "
    )
    words += plan.activation_checkpointing.value
    if nearest.is_refused:
        return f"none of {considered} plans is taken; of {words} the plan {nearest.reason}"
    where = " of host memory" if nearest.is_host_short else " of NVMe" if nearest.is_nvme_short else ""
    short = f"{format_bytes(nearest.short_by_bytes)} ({nearest.short_by_bytes:,} bytes)"
    return (
        f"none of {considered} plans fits {format_bytes(capacity_bytes - headroom_bytes)} "
        f"({format_bytes(capacity_bytes)} less {format_bytes(headroom_bytes)} headroom); the nearest is short by "
        f"{short}{where}: {words}; {nearest.reason}"
    )
