"""Which lengths come into question for some data, and what each of them costs and keeps.

The rule of `data.max_length=auto`: the smallest multiple of 8 that no example exceeds, so that nothing is lost; where no
plan fits that, the longest candidate for which one does. Padded batches are as long as their longest example, so a length
above the longest one buys nothing, and this one is the worst batch that the data can make. Packed rows are all of the
length itself; there it is the smallest for which an example is cut only where a row ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.data_lengths import (
    PERCENTILES,
    DataLengths,
    expected_longest,
    kept_at,
    padding_share,
    percentile,
    split_share,
)
from launcher.explanation import LengthOption
from launcher.job import ChoicesSpec, JobSpec
from launcher.plan import Plan, PlanChoice
from launcher.planner.forecast import Forecaster
from launcher.units import format_bytes

MULTIPLE = 8
"""Lengths are multiples of this: what matrix units take without a remainder, and no more than 7 tokens of padding."""
SHORTEST = 8
APART = 1.25
"""Powers of two nearer than this to another candidate are none."""
FAR = 2.0
"""Times the data's p99 from which a length is far above it: a convention."""
POSITION_KEYS = ("max_position_embeddings", "n_positions")
Search = Callable[[JobSpec], PlanChoice]


def candidates(data: DataLengths, limit: int | None) -> tuple[int, ...]:
    """The lengths that come into question, longest first: that of the longest example, percentiles, powers of two.

    Args:
        data: Lengths of the examples.
        limit: Positions that the model has; None: nobody knows.
    """
    marks = [data.longest, *(percentile(data.lengths, share) for share in PERCENTILES)]
    found = {_rounded(mark, limit) for mark in marks}
    shortest, longest = min(found), max(found)
    for exponent in range(longest.bit_length(), shortest.bit_length() - 1, -1):
        power = 1 << exponent
        if shortest < power < longest and all(
            max(power, other) >= APART * min(power, other) for other in found
        ):
            found.add(power)
    return tuple(sorted(found, reverse=True))


def _rounded(length: int, limit: int | None) -> int:
    rounded = max(SHORTEST, -(-length // MULTIPLE) * MULTIPLE)
    return rounded if limit is None else min(rounded, limit)


def position_limit(architecture: Mapping[str, Any]) -> int | None:
    """Positions that a model was made for; None where its config doesn't say."""
    facts = {**architecture, **(architecture.get("text_config") or {})}
    return next((int(facts[key]) for key in POSITION_KEYS if facts.get(key)), None)


def with_candidates(job: JobSpec, lengths: tuple[int, ...]) -> JobSpec:
    """The job with candidates in place of `auto`, which the search takes in their order."""
    choices: ChoicesSpec = replace(job.planner.choices, max_length=lengths)
    return replace(
        job,
        data=replace(job.data, max_length=lengths[0]),
        planner=replace(job.planner, choices=choices),
    )


def length_options(
    job: JobSpec, data: DataLengths, choice: PlanChoice, forecaster: Forecaster, search: Search
) -> tuple[LengthOption, ...]:
    """What each candidate costs and keeps, longest first.

    Args:
        job: The job, resolved, with candidates.
        data: Lengths of its examples.
        choice: What the search of all of them found.
        forecaster: Prices the steps.
        search: Searches the job at one length.
    """
    options = []
    for length in job.planner.choices.max_length:
        found = choice
        if choice.plan is None or choice.plan.max_length != length:
            pin = replace(job.planner.pin, max_length=length)
            found = search(replace(job, planner=replace(job.planner, pin=pin)))
        options.append(_option(job, data, length, found, forecaster))
    return tuple(options)


def _option(
    job: JobSpec, data: DataLengths, length: int, choice: PlanChoice, forecaster: Forecaster
) -> LengthOption:
    kept, plan = kept_at(data, length), choice.plan
    packing = job.data.packing
    option = LengthOption(
        length=length,
        plan=plan,
        reason=choice.reason,
        peak_device_bytes=None if choice.estimate is None else choice.estimate.peak_device_bytes,
        real_tokens_per_second=None,
        padding_share=None,
        kept_share=1.0 if packing else kept.tokens_share,
        cut_share=split_share(data, length) if packing else kept.cut_share,
        dropped_share=0.0 if packing else kept.dropped_share,
    )
    if plan is None or not kept.rows:
        return option
    if packing:
        speed = None if choice.step is None else choice.step.tokens_per_second * plan.world_size
        return replace(option, real_tokens_per_second=speed, padding_share=0.0)
    return replace(
        option,
        real_tokens_per_second=real_tokens_per_second(plan, kept.rows, forecaster),
        padding_share=padding_share(kept.rows, plan.micro_batch_size),
    )


def real_tokens_per_second(plan: Plan, rows: tuple[int, ...], forecaster: Forecaster) -> float | None:
    """Tokens per second, over all devices and without padding; None where nobody knows how fast the device is.

    A step takes the time of batches of their expected length. Devices wait for each other, so with several of them that
    is the expected length over all their batches.

    Args:
        plan: The plan.
        rows: Lengths of the examples as they are cut.
        forecaster: Prices the step.
    """
    length = round(expected_longest(rows, plan.micro_batch_size * plan.world_size))
    step = forecaster.step_time(replace(plan, max_length=max(SHORTEST, length)))
    if step is None:
        return None
    return plan.global_batch_size * (sum(rows) / len(rows)) / step.seconds


def far_above(job: JobSpec, plan: Plan, data: DataLengths, forecaster: Forecaster) -> str:
    """In words, that a length is far above what the data have; empty when it is not, or when rows are packed."""
    p99 = percentile(data.lengths, 0.99)
    if job.data.packing or plan.max_length < FAR * p99:
        return ""
    enough = _rounded(data.longest, plan.max_length)
    words = f"length {plan.max_length} is {plan.max_length / p99:.1f} times the data's p99 of {p99} tokens"
    if enough == plan.max_length:
        return f"{words}, and few examples need it"
    saved = (
        forecaster.estimate(plan).peak_device_bytes
        - forecaster.estimate(replace(plan, max_length=enough)).peak_device_bytes
    )
    return (
        f"{words}; no example exceeds {enough}, which would take {format_bytes(saved)} less and lose nothing"
    )


def words_of_choice(data: DataLengths, length: int, lengths: Sequence[int], *, packing: bool) -> str:
    """What an automatic length does to the result.

    Args:
        data: Lengths of the examples.
        length: The length that was taken.
        lengths: The candidates.
        packing: Whether examples are packed.
    """
    counted = "all" if data.is_whole else f"a sample of {len(data.lengths):,}"
    read = f"{counted} of {data.num_examples:,} examples were counted"
    kept = kept_at(data, length)
    if packing:
        share = split_share(data, length)
        return f"length {length}: packing cuts {share:.1%} of the examples where a row ends ({read})"
    if kept.tokens_share == 1.0:
        return f"length {length}: no token is lost ({read})"
    words = (
        f"length {length} changes the result: {1 - kept.tokens_share:.1%} of the tokens are lost, {kept.cut_share:.1%} "
        "of the examples cut"
    )
    if kept.dropped_share:
        words += f", {kept.dropped_share:.1%} left out because nothing that is learnt remains"
    longer = [str(other) for other in lengths if other > length]
    why = f"no plan fits {', '.join(longer)}" if longer else "the model has no more positions"
    return f"{words}; {why} ({read})"
