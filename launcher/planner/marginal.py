"""The marginal table: each knob of a plan turned alone, and the few knobs of its job that cost memory, priced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from launcher.data_lengths import DataLengths, kept_at
from launcher.engine_limits import engine_limits
from launcher.errors import LauncherError
from launcher.explanation import Change
from launcher.hardware import DeviceKind
from launcher.job import Attention, Checkpointing, Engine, JobSpec, Method, Optimizer, Precision, Task
from launcher.optimisation import PAGED_OPTIMIZERS, implementations
from launcher.plan import Plan
from launcher.planner.arrangements import Arrangement, arrangement_of, arrangements, rounds, short_words
from launcher.planner.forecast import Forecaster
from launcher.planner.lengths import SHORTEST, real_tokens_per_second
from launcher.planner.space import attentions, batch_splits, checkpointing_modes, headroom_bytes, losses

OTHER_PRECISION = {
    (Method.LORA, Precision.BF16): Precision.BF16_AUTOCAST,
    (Method.LORA, Precision.BF16_AUTOCAST): Precision.BF16,
    (Method.LORA, Precision.BF16_MIXED): Precision.BF16_AUTOCAST,
    (Method.FULL, Precision.BF16): Precision.BF16_MIXED,
    (Method.FULL, Precision.BF16_MIXED): Precision.BF16,
}
"""What is worth a look: adapters in fp32 that compute in bf16 all the same, and fp32 weights to update, or none."""
Item = TypeVar("Item")
Forecasters = Callable[[JobSpec], Forecaster]
"""Makes what prices the plans of a job."""


@dataclass(frozen=True)
class Turn:
    """One knob turned."""

    knob: str
    """Its name in the configuration."""
    words: str
    """From what to what."""
    plan: Plan
    """The plan with the change."""
    changes_result: bool
    """Whether another model comes out."""
    job: JobSpec | None = None
    """The job with the change, where the knob is one of the job's and not of the plan's."""


def marginal_changes(
    job: JobSpec, plan: Plan, forecasters: Forecasters, data: DataLengths | None = None
) -> tuple[Change, ...]:
    """Every single change of a knob, priced; what frees most comes first, what was not priced last.

    Args:
        job: The job, resolved.
        plan: Its plan.
        forecasters: Make what prices plans, with the libraries of all methods.
        data: Lengths of its examples, for the time of a token that is no padding; None: nobody knows them.
    """
    forecaster = forecasters(job)
    forecaster.prepare([plan])
    changes = [_priced(turn, job, plan, forecaster, forecasters, data) for turn in turns(job, plan)]
    return tuple(sorted(changes, key=lambda item: (item.saved_bytes is None, -(item.saved_bytes or 0))))


def _priced(
    turn: Turn,
    job: JobSpec,
    plan: Plan,
    forecaster: Forecaster,
    forecasters: Forecasters,
    data: DataLengths | None,
) -> Change:
    change = Change(turn.knob, turn.words, turn.plan, turn.changes_result, None, None, False)
    limits = engine_limits(job, turn.plan) if turn.plan.engine is not Engine.NONE else ()
    if limits:
        return replace(change, refusal="; ".join(limits))
    other = forecaster if turn.job is None else forecasters(turn.job)
    try:
        estimate = other.estimate(turn.plan)
        ratio = (
            _ratio(plan, forecaster, turn.plan, other)
            if turn.job is None or turn.job.data.packing is job.data.packing
            else _ratio_packed(job, plan, forecaster, other, data)
        )
    except LauncherError as failure:
        return replace(change, refusal=str(failure).split("\n")[0])
    budget = job.hardware.memory_bytes - headroom_bytes(job)
    return replace(
        change,
        saved_bytes=forecaster.estimate(plan).peak_device_bytes - estimate.peak_device_bytes,
        step_ratio=ratio,
        fits=estimate.peak_device_bytes <= budget,
    )


def _ratio(plan: Plan, forecaster: Forecaster, changed: Plan, other: Forecaster) -> float | None:
    """Time of a token of a changed plan over that of the plan; None where nobody knows."""
    base, step = forecaster.step_time(plan), other.step_time(changed)
    return None if step is None or base is None else base.tokens_per_second / step.tokens_per_second


def _ratio_packed(
    job: JobSpec, plan: Plan, forecaster: Forecaster, other: Forecaster, data: DataLengths | None
) -> float | None:
    """The same where one of the two pads: of tokens that are none, which packed rows are without."""
    rows = () if data is None else kept_at(data, plan.max_length).rows
    padding, packing = (other, forecaster) if job.data.packing else (forecaster, other)
    step = packing.step_time(plan)
    padded = real_tokens_per_second(plan, rows, padding) if rows else None
    if step is None or padded is None:
        return None
    packed = step.tokens_per_second * plan.world_size
    return packed / padded if job.data.packing else padded / packed


def turns(job: JobSpec, plan: Plan) -> Iterator[Turn]:
    """Every single change of a knob: those that leave the result alone, the job's own, and those that don't.

    Args:
        job: The job, resolved.
        plan: Its plan.
    """
    yield from _free_turns(job, plan)
    yield from _other_arrangements(job, plan)
    yield from _of_the_job(job, plan)
    yield from _other_results(job, plan)


def _to(plan: Plan, knob: str, value: Any, *, changes_result: bool = False, **besides: Any) -> Turn:
    """A knob of a plan turned to a value, and what follows from that."""
    changed = replace(plan, **{knob: value, **besides})
    return Turn(knob, f"{getattr(plan, knob)} -> {value}", changed, changes_result)


def _free_turns(job: JobSpec, plan: Plan) -> Iterator[Turn]:
    """Batch, checkpointing, kernels: pinned ones too."""
    unpinned = replace(job, planner=replace(job.planner, pin=type(job.planner.pin)()))
    for micro, steps in neighbours(
        sorted(batch_splits(unpinned)), (plan.micro_batch_size, plan.gradient_accumulation_steps)
    ):
        yield _to(plan, "micro_batch_size", micro, gradient_accumulation_steps=steps)
    pin = replace(job.planner.pin, activation_checkpointing=None)
    for mode in checkpointing_modes(replace(job, planner=replace(job.planner, pin=pin))):
        if mode is not plan.activation_checkpointing:
            yield _to(plan, "activation_checkpointing", mode)
    for loss in losses(unpinned):
        if loss is not plan.loss:
            yield _to(plan, "loss", loss)
    for attention in (*attentions(unpinned), Attention.EAGER):
        is_eager = attention is Attention.EAGER
        is_possible = not is_eager or plan.activation_checkpointing is not Checkpointing.SELECTIVE
        if attention is not plan.attention and is_possible:
            yield _to(plan, "attention", attention)
    for optimizer in implementations(plan.optimizer):
        has_pages = optimizer in PAGED_OPTIMIZERS
        if optimizer is not plan.optimizer and (not has_pages or job.hardware.kind is DeviceKind.CUDA):
            yield _to(plan, "optimizer", optimizer)


def _other_arrangements(job: JobSpec, plan: Plan) -> Iterator[Turn]:
    """What several devices could share a little less or more of, engines that can't do it among them; and their buckets.

    One device could put states on the host; those of adapters are too few to be worth a word.
    """
    if plan.world_size == 1 and plan.method is not Method.FULL and not plan.uses_offload:
        return
    free, possible, _ = unpinned_arrangements(job, plan)
    here = arrangement_of(plan)
    alike = [item for item in possible if item.small_buckets is here.small_buckets]
    for item in neighbours(alike, here):
        yield Turn(
            "engine", f"{short_words(here)} -> {short_words(item)}", item.applied_to(plan, free), False
        )
    other = replace(here, small_buckets=not here.small_buckets)
    if other in possible:
        sizes = ("ordinary", "small")
        words = f"{sizes[here.small_buckets]} -> {sizes[other.small_buckets]}"
        yield Turn("buckets", words, other.applied_to(plan, free), False)


def unpinned_arrangements(
    job: JobSpec, plan: Plan
) -> tuple[JobSpec, tuple[Arrangement, ...], Mapping[Arrangement, str]]:
    """The job without pins of its engine, the arrangements that could carry out its plan then, simplest first, and those
    that could not, with the reason."""
    pin = replace(
        job.planner.pin, engine=None, zero_stage=None, offload_optimizer=None, offload_parameters=None
    )
    free = replace(job, planner=replace(job.planner, pin=pin))
    return free, *arrangements(free, plan, tuple(chain.from_iterable(rounds(free))))


def _of_the_job(job: JobSpec, plan: Plan) -> Iterator[Turn]:
    """Rows packed or padded, and what an evaluation takes."""
    if job.model.task is Task.CAUSAL_LM:
        packing, words = not job.data.packing, ("false", "true")
        changed = replace(job, data=replace(job.data, packing=packing))
        yield Turn("data.packing", f"{words[not packing]} -> {words[packing]}", plan, True, changed)
    if not job.evaluation.enabled:
        return
    size = job.evaluation.batch_size or plan.micro_batch_size
    for other in (size // 2, 2 * size):
        if other:
            changed = replace(job, evaluation=replace(job.evaluation, batch_size=other))
            yield Turn("evaluation.batch_size", f"{size} -> {other}", plan, False, changed)
    if job.evaluation.keep_logits:
        changed = replace(job, evaluation=replace(job.evaluation, keep_logits=False))
        yield Turn("evaluation.keep_logits", "true -> false", plan, False, changed)


def _other_results(job: JobSpec, plan: Plan) -> Iterator[Turn]:
    """Precision, length, method, rank, optimizer: another model comes out."""
    precision = OTHER_PRECISION.get((plan.method, plan.precision))
    if precision is not None and plan.engine is not Engine.DEEPSPEED:  # to which they are one
        yield _to(plan, "precision", precision, changes_result=True)
    for length in (plan.max_length // 2, plan.max_length * 2):
        if length >= SHORTEST:
            yield _to(plan, "max_length", length, changes_result=True)
    for method in Method:
        if method is not plan.method:
            rank = 0 if method is Method.FULL else plan.rank or job.method.rank
            yield _to(plan, "method", method, changes_result=True, rank=rank)
    for rank in (plan.rank // 2, plan.rank * 2):
        if rank:
            yield _to(plan, "rank", rank, changes_result=True)
    if Optimizer.ADAMW_8BIT not in implementations(plan.optimizer):
        yield _to(plan, "optimizer", Optimizer.ADAMW_8BIT, changes_result=True)


def neighbours(items: Sequence[Item], here: Item) -> tuple[Item, ...]:
    """What comes before and after one of some items; none where it is not among them."""
    if here not in items:
        return ()
    place = items.index(here)
    return tuple(items[index] for index in (place - 1, place + 1) if 0 <= index < len(items))
