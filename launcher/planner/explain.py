"""Explains a plan: each knob turned alone, the same job on half and twice the memory, and how tight the plan is.

All prices come from the skylines that the search uses, of the plan taken too, so that differences compare like with like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launcher.data_lengths import DataLengths
from launcher.explanation import AtCapacity, Change, Explanation
from launcher.job import Checkpointing, JobSpec, Method
from launcher.memory import TRAINING, Category, MemoryEstimate, Phase
from launcher.plan import Grade, Plan, PlanChoice, Squeeze
from launcher.planner.marginal import Forecasters, marginal_changes
from launcher.planner.sharding import sharding_words
from launcher.planner.space import semantic_plans
from launcher.units import format_bytes

FACTORS = (0.5, 1.0, 2.0)
"""Memory of the devices that are compared, in devices as they are."""
COMFORTABLE_SHARE, SQUEEZED_SHARE = 0.15, 0.06
"""Free share of the device from which a plan is comfortable, and below which it is squeezed when it needs savers.

A convention: batches differ, other processes come, and fragmentation grows over weeks; no data say how much.
"""
MANY_SAVERS = 2
FASTER = 1.03
"""Speeds nearer than this are the same: the order of plans is not known better."""
SMALL_OPTIMIZERS = ("8bit", "adafactor", "sgd", "galore", "apollo", "paged")
Search = Callable[[JobSpec], PlanChoice]


def explain(
    job: JobSpec,
    choice: PlanChoice,
    forecasters: Forecasters,
    search: Search,
    length_words: str = "",
    data: DataLengths | None = None,
) -> Explanation:
    """Explains the plan that was taken.

    Args:
        job: The job, resolved.
        choice: What its search found; it must have a plan.
        forecasters: Make what prices the changes, with the libraries of all methods.
        search: Searches the job on other devices.
        length_words: What is wrong with the length for the job's data; empty when nothing is, or nobody knows.
        data: Lengths of the job's examples; None: nobody knows them.

    Raises:
        ValueError: When there is no plan.
    """
    if choice.plan is None or choice.estimate is None:
        raise ValueError(f"nothing to explain: {choice.reason}")
    changes = marginal_changes(job, choice.plan, forecasters, data)
    capacities = tuple(_at_capacity(job, choice, factor, search) for factor in FACTORS)
    return Explanation(
        changes=changes,
        capacities=capacities,
        verdict=verdict(job, choice, capacities, length_words, changes),
        squeeze=squeeze(choice.plan, choice.estimate, choice.capacity_bytes, changes),
        sharding=sharding_words(job, choice.plan, forecasters(job)),
    )


def _at_capacity(job: JobSpec, choice: PlanChoice, factor: float, search: Search) -> AtCapacity:
    capacity = round(job.hardware.memory_bytes * factor)
    if factor != 1.0:
        hardware = replace(job.hardware, memory_bytes=capacity)
        choice = search(replace(job, hardware=hardware))
    step = choice.step
    return AtCapacity(
        factor=factor,
        capacity_bytes=capacity,
        plan=choice.plan,
        position=-1 if choice.plan is None else position(job, choice.plan),
        tokens_per_second=None if step is None else step.tokens_per_second,
        reason=choice.reason,
    )


def position(job: JobSpec, plan: Plan) -> int:
    """Of a plan's method, length and rank among the job's combinations, best first."""
    wanted = [(item.method, item.max_length, item.rank) for item in semantic_plans(job)]
    return wanted.index((plan.method, plan.max_length, plan.rank))


def verdict(
    job: JobSpec,
    choice: PlanChoice,
    capacities: tuple[AtCapacity, ...],
    length_words: str = "",
    changes: tuple[Change, ...] = (),
) -> str:
    """Whether memory is this job's problem, or its settings are; one sentence.

    Args:
        job: The job.
        choice: Its plan on the device as it is.
        capacities: The same job with other memories; one of them as it is, and one larger.
        length_words: What is wrong with the length for the job's data, if anything.
        changes: The marginal table.
    """
    assert choice.plan is not None and choice.estimate is not None
    setting = _setting_at_the_peak(job, choice.estimate)
    now = next(item for item in capacities if item.factor == 1.0)
    more = max(capacities, key=lambda item: item.factor)
    gain = _gain(now, more)
    if setting:
        return f"A setting decides the highest moment, not the training: {setting}."
    if length_words:
        return f"A setting takes the memory, not the training: {length_words}."
    if gain and (adapters := _adapters_instead(job, choice.plan, changes)):
        return f"A setting takes the memory, {adapters}: with {more.factor:g} times as much memory {gain}."
    if gain:
        return f"Memory is this job's limit: with {more.factor:g} times as much {gain}."
    less = min(capacities, key=lambda item: item.factor)
    spare = ""
    if less.plan is not None and not _gain(less, now):
        spare = f", and {less.factor:g} times as much would do as well"
    return f"Memory is not this job's problem: with {more.factor:g} times as much it would not get faster{spare}."


def _adapters_instead(job: JobSpec, plan: Plan, changes: tuple[Change, ...]) -> str:
    """What full fine-tuning takes more than the adapters that the job would take too; empty where it is not so."""
    if plan.method is not Method.FULL:
        return ""
    allowed = {item.method for item in semantic_plans(job)}
    found = [
        (item.saved_bytes, item.plan.method.value)
        for item in changes
        if item.knob == "method" and item.plan.method in allowed and (item.saved_bytes or 0) > 0
    ]
    if not found:
        return ""
    saved_bytes, method = max(found, key=lambda item: item[0] or 0)
    return f"full fine-tuning where the job's lists allow {method}, which takes {format_bytes(saved_bytes or 0)} less"


def _gain(now: AtCapacity, more: AtCapacity) -> str:
    """What the device with more memory buys; empty when nothing."""
    if more.plan is None:
        return ""
    if now.plan is None:
        return "there is a plan at all"
    if more.position < now.position:
        return (
            f"the job gets {more.plan.method.value} at length {more.plan.max_length}"
            + (f", rank {more.plan.rank}" if more.plan.rank else "")
            + f", choice {more.position + 1} of its lists and not {now.position + 1}"
        )
    if now.tokens_per_second and more.tokens_per_second:
        ratio = more.tokens_per_second / now.tokens_per_second
        return f"it runs {ratio:.2f} times as fast" if ratio >= FASTER else ""
    order = list(Checkpointing)
    before, after = (order.index(plan.activation_checkpointing) for plan in (now.plan, more.plan))
    if after < before:
        return "it recomputes less"
    return "it takes a larger micro batch" if more.plan.micro_batch_size > now.plan.micro_batch_size else ""


def _setting_at_the_peak(job: JobSpec, estimate: MemoryEstimate) -> str:
    """A setting apart from training that makes the highest moment; empty when training does."""
    peak, evaluation = estimate.peak, job.evaluation
    training = max(
        (item.allocated_bytes for item in estimate.phases if item.phase in TRAINING),
        default=0,
    )
    above = format_bytes(peak.allocated_bytes - training)
    if peak.phase is Phase.EVALUATION and evaluation.keep_logits:
        return f"evaluation.keep_logits=true takes {above} more than a training step"
    if peak.phase is Phase.EVALUATION:
        batch = evaluation.batch_size or "as in training"
        return f"evaluation takes {above} more than a training step (evaluation.batch_size {batch})"
    if peak.phase is Phase.GENERATION:
        batch = job.generation.batch_size
        weights = estimate.resident_bytes.get(Category.PARAMETERS, 0)
        beside = peak.allocated_bytes - weights
        cache = (
            f"; its cache and the rest, {format_bytes(beside)}, exceed the weights"
            if beside > weights > 0
            else ""
        )
        return f"generating samples takes {above} more than a training step (generation.batch_size {batch}{cache})"
    if peak.phase is Phase.MERGE:
        return f"method.merge=true takes {above} more than a training step"
    return ""


def savers(plan: Plan) -> tuple[str, ...]:
    """Memory savers that a plan uses, by the knob."""
    found = []
    if plan.activation_checkpointing is not Checkpointing.NONE:
        found.append(f"activation_checkpointing={plan.activation_checkpointing.value}")
    if plan.method is Method.QLORA:
        found.append("method=qlora")
    if any(word in plan.optimizer.value for word in SMALL_OPTIMIZERS):
        found.append(f"optimizer={plan.optimizer.value}")
    if plan.micro_batch_size == 1 and plan.gradient_accumulation_steps > 1:
        found.append("micro_batch_size=1")
    if plan.zero_stage:
        found.append(f"zero_stage={plan.zero_stage}")
    return tuple(found)


def squeeze(
    plan: Plan, estimate: MemoryEstimate, capacity_bytes: int, changes: tuple[Change, ...] | None = None
) -> Squeeze:
    """How tight a plan is: by what is free at the upper end of what is expected, and by the savers it needs.

    Args:
        plan: The plan.
        estimate: Its memory.
        capacity_bytes: Usable bytes of the device.
        changes: The marginal table, for advice; None: nobody asks for it.
    """
    expected = estimate.peak_device_bytes
    if estimate.interval is not None:
        expected += max(0, estimate.interval.high_bytes - estimate.peak_allocated_bytes)
    free = capacity_bytes - expected
    share = free / capacity_bytes
    used = savers(plan)
    grade = Grade.TIGHT
    if share >= COMFORTABLE_SHARE:
        grade = Grade.COMFORTABLE
    elif share < SQUEEZED_SHARE and len(used) >= MANY_SAVERS:
        grade = Grade.SQUEEZED
    wanted = round(COMFORTABLE_SHARE * capacity_bytes) - free
    advice = "" if grade is Grade.COMFORTABLE or changes is None else _advice(changes, wanted)
    return Squeeze(grade, free, share, used, advice)


def _advice(changes: tuple[Change, ...], wanted_bytes: int) -> str:
    """The cheapest single change that makes a plan comfortable: one that leaves the result alone, else any."""
    enough = [
        item
        for item in changes
        if item.saved_bytes is not None and item.saved_bytes >= wanted_bytes and item.fits
    ]
    if not enough:
        return f"no single change frees {format_bytes(wanted_bytes)}; a larger device, or more devices, would"
    best = min(
        enough, key=lambda item: (item.changes_result, item.step_ratio or 1.0, -(item.saved_bytes or 0))
    )
    slower = "" if best.step_ratio is None else f" at {best.step_ratio:.2f} times the time per token"
    result = ", and changes the result" if best.changes_result else ""
    return f"{best.knob} {best.words} frees {format_bytes(best.saved_bytes or 0)}{slower}{result}"
