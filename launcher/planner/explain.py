"""Explains a plan: each knob turned alone, the same job on half and twice the memory, and how tight the plan is.

All prices come from the skylines that the search uses, of the plan taken too, so that differences compare like with like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from launcher.engine_limits import engine_limits
from launcher.errors import LauncherError
from launcher.explanation import AtCapacity, Change, Explanation
from launcher.hardware import DeviceKind
from launcher.job import Attention, Checkpointing, Engine, JobSpec, Method, Optimizer, Precision
from launcher.memory import TRAINING, Category, MemoryEstimate, Phase
from launcher.optimisation import PAGED_OPTIMIZERS, implementations
from launcher.plan import Grade, Plan, PlanChoice, Squeeze
from launcher.planner.arrangements import Arrangement, arrangement_of, arrangements, rounds, short_words
from launcher.planner.forecast import Forecaster
from launcher.planner.space import (
    attentions,
    batch_splits,
    checkpointing_modes,
    headroom_bytes,
    losses,
    semantic_plans,
)
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
OTHER_PRECISION = {
    (Method.LORA, Precision.BF16): Precision.BF16_AUTOCAST,
    (Method.LORA, Precision.BF16_AUTOCAST): Precision.BF16,
    (Method.LORA, Precision.BF16_MIXED): Precision.BF16_AUTOCAST,
    (Method.FULL, Precision.BF16): Precision.BF16_MIXED,
    (Method.FULL, Precision.BF16_MIXED): Precision.BF16,
}
"""What is worth a look: adapters in fp32 that compute in bf16 all the same, and fp32 weights to update, or none."""
SMALL_OPTIMIZERS = ("8bit", "adafactor", "sgd", "galore", "apollo", "paged")
Search = Callable[[JobSpec], PlanChoice]


def explain(
    job: JobSpec, choice: PlanChoice, forecaster: Forecaster, search: Search, length_words: str = ""
) -> Explanation:
    """Explains the plan that was taken.

    Args:
        job: The job, resolved.
        choice: What its search found; it must have a plan.
        forecaster: Prices the changes; it must have the libraries of all methods.
        search: Searches the job on other devices.
        length_words: What is wrong with the length for the job's data; empty when nothing is, or nobody knows.

    Raises:
        ValueError: When there is no plan.
    """
    if choice.plan is None or choice.estimate is None:
        raise ValueError(f"nothing to explain: {choice.reason}")
    changes = marginal_changes(job, choice.plan, forecaster)
    capacities = tuple(_at_capacity(job, choice, factor, search) for factor in FACTORS)
    return Explanation(
        changes=changes,
        capacities=capacities,
        verdict=verdict(job, choice, capacities, length_words, changes),
        squeeze=squeeze(choice.plan, choice.estimate, choice.capacity_bytes, changes),
    )


def marginal_changes(job: JobSpec, plan: Plan, forecaster: Forecaster) -> tuple[Change, ...]:
    """Every single change of a knob, priced; what frees most comes first, what was not priced last."""
    options = list(_options(job, plan))
    forecaster.prepare([plan])
    base = forecaster.estimate(plan)
    base_step = forecaster.step_time(plan)
    budget = job.hardware.memory_bytes - headroom_bytes(job)
    changes = []
    for knob, words, changed, changes_result in options:
        limits = engine_limits(job, changed) if changed.engine is not Engine.NONE else ()
        if limits:
            changes.append(Change(knob, words, changed, changes_result, None, None, False, "; ".join(limits)))
            continue
        try:
            estimate = forecaster.estimate(changed)
            step = forecaster.step_time(changed)
        except LauncherError as failure:
            changes.append(
                Change(knob, words, changed, changes_result, None, None, False, str(failure).split("\n")[0])
            )
            continue
        ratio = None
        if step is not None and base_step is not None:
            ratio = base_step.tokens_per_second / step.tokens_per_second
        changes.append(
            Change(
                knob,
                words,
                changed,
                changes_result,
                base.peak_device_bytes - estimate.peak_device_bytes,
                ratio,
                estimate.peak_device_bytes <= budget,
            )
        )
    return tuple(sorted(changes, key=lambda item: (item.saved_bytes is None, -(item.saved_bytes or 0))))


def _options(job: JobSpec, plan: Plan) -> Iterator[tuple[str, str, Plan, bool]]:
    """Knob, words, the plan with the change, and whether it changes the result."""
    unpinned = replace(job, planner=replace(job.planner, pin=type(job.planner.pin)()))
    splits = sorted(batch_splits(unpinned))
    sizes = [micro for micro, _ in splits]
    here = sizes.index(plan.micro_batch_size)
    for index in (here - 1, here + 1):
        if 0 <= index < len(splits):
            micro, steps = splits[index]
            yield (
                "micro_batch_size",
                f"{plan.micro_batch_size} -> {micro}",
                replace(plan, micro_batch_size=micro, gradient_accumulation_steps=steps),
                False,
            )
    free = replace(
        job, planner=replace(job.planner, pin=replace(job.planner.pin, activation_checkpointing=None))
    )
    for mode in checkpointing_modes(free):
        if mode is not plan.activation_checkpointing:
            words = f"{plan.activation_checkpointing.value} -> {mode.value}"
            yield "activation_checkpointing", words, replace(plan, activation_checkpointing=mode), False
    for loss in losses(unpinned):
        if loss is not plan.loss:
            yield "loss", f"{plan.loss.value} -> {loss.value}", replace(plan, loss=loss), False
    for attention in (*attentions(unpinned), Attention.EAGER):
        is_eager = attention is Attention.EAGER
        is_possible = not is_eager or plan.activation_checkpointing is not Checkpointing.SELECTIVE
        if attention is not plan.attention and is_possible:
            words = f"{plan.attention.value} -> {attention.value}"
            yield "attention", words, replace(plan, attention=attention), False
    yield from _other_arrangements(job, plan)
    other = OTHER_PRECISION.get((plan.method, plan.precision))
    if other is not None and plan.engine is not Engine.DEEPSPEED:  # to which they are one
        yield "precision", f"{plan.precision.value} -> {other.value}", replace(plan, precision=other), True
    for length in (plan.max_length // 2, plan.max_length * 2):
        if length >= 8:
            yield "max_length", f"{plan.max_length} -> {length}", replace(plan, max_length=length), True
    for method in Method:
        if method is not plan.method:
            rank = 0 if method is Method.FULL else plan.rank or job.method.rank
            yield (
                "method",
                f"{plan.method.value} -> {method.value}",
                replace(plan, method=method, rank=rank),
                True,
            )
    if plan.rank:
        for rank in (plan.rank // 2, plan.rank * 2):
            if rank:
                yield "rank", f"{plan.rank} -> {rank}", replace(plan, rank=rank), True
    for optimizer in implementations(plan.optimizer):
        has_pages = optimizer in PAGED_OPTIMIZERS
        if optimizer is not plan.optimizer and (not has_pages or job.hardware.kind is DeviceKind.CUDA):
            words = f"{plan.optimizer.value} -> {optimizer.value}"
            yield "optimizer", words, replace(plan, optimizer=optimizer), False
    if Optimizer.ADAMW_8BIT not in implementations(plan.optimizer):
        words = f"{plan.optimizer.value} -> {Optimizer.ADAMW_8BIT.value}"
        yield "optimizer", words, replace(plan, optimizer=Optimizer.ADAMW_8BIT), True


def _other_arrangements(job: JobSpec, plan: Plan) -> Iterator[tuple[str, str, Plan, bool]]:
    """What several devices could share a little less or more of, engines that can't do it among them.

    One device could put states on the host; those of adapters are too few to be worth a word.
    """
    if plan.world_size == 1 and plan.method is not Method.FULL and not plan.uses_offload:
        return
    pin = replace(
        job.planner.pin, engine=None, zero_stage=None, offload_optimizer=None, offload_parameters=None
    )
    free = replace(job, planner=replace(job.planner, pin=pin))
    here = arrangement_of(plan)
    candidates = tuple(chain.from_iterable(rounds(free)))
    possible = [
        item for item in arrangements(free, plan, candidates)[0] if item.small_buckets is here.small_buckets
    ]
    for item in neighbours(possible, here):
        yield "engine", f"{short_words(here)} -> {short_words(item)}", item.applied_to(plan, free), False


def neighbours(items: Sequence[Arrangement], here: Arrangement) -> tuple[Arrangement, ...]:
    """What comes before and after one of some arrangements; none where it is not among them."""
    if here not in items:
        return ()
    place = items.index(here)
    return tuple(items[index] for index in (place - 1, place + 1) if 0 <= index < len(items))


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
