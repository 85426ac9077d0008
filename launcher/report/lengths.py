"""Lengths of data, and what each length costs and keeps: for people, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.data_lengths import (
    PERCENTILES,
    DataLengths,
    histogram,
    kept_at,
    padding_share,
    percentile,
)
from launcher.explanation import LengthOption
from launcher.report.documents import plan_fields
from launcher.report.layout import aligned, wrapped
from launcher.units import format_bytes

ROUNDING = 1e-9
"""Shares nearer than this to nothing or all are that, but for floating-point sums."""
BAR = 40
"""Width of the longest bar of a histogram, characters."""


def lengths_text(data: DataLengths) -> str:
    """How long the examples are: percentiles, and a histogram."""
    marks = [f"p{share * 100:g} {percentile(data.lengths, share):,}" for share in PERCENTILES]
    counted = (
        f"{data.num_examples:,} examples"
        if data.is_whole
        else f"a random sample of {len(data.lengths):,} of {data.num_examples:,} examples, and those with the most text"
    )
    ranges = histogram(data.lengths)
    most = max(count for _, _, count in ranges)
    rows = [[f"  {low:,} to {high:,}", f"{count:,}"] for low, high, count in ranges]
    bars = ["#" * (-(-BAR * count // most)) for _, _, count in ranges]
    return "\n".join(
        [
            wrapped(
                "data     ",
                f"{data.source}: {counted}, in tokens: {', '.join(marks)}, longest {data.longest:,}",
            ),
            *(f"{line}  {bar}".rstrip() for line, bar in zip(aligned(rows), bars, strict=True)),
        ]
    )


def options_text(options: Sequence[LengthOption], taken: int | None, packing: bool) -> str:
    """A table of the lengths that came into question, longest first."""
    heads = ["  length", "plan", "peak", "tokens/s", *([] if packing else ["padding", "kept"]), "cut"]
    rows = [_row(option, packing, option.length == taken) for option in options]
    lines = ["what each length costs and keeps", *aligned([heads, *rows], num_words=2)]
    lines += [
        wrapped("  -", f"{option.length}: {option.reason}") for option in options if option.plan is None
    ]
    taken_words = "* taken, data.max_length=<tokens> takes another; " if taken is not None else ""
    kept_words = "" if packing else "tokens/s without padding; kept: of all tokens; "
    return "\n".join([*lines, wrapped(" ", f"{taken_words}{kept_words}cut: of all examples")])


def _row(option: LengthOption, packing: bool, is_taken: bool) -> list[str]:
    plan, peak, speed = option.plan, option.peak_device_bytes, option.real_tokens_per_second
    shape = "no plan"
    if plan is not None:
        shape = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} {plan.activation_checkpointing.value}"
    padding = [] if packing else [_percent(option.padding_share), _percent(option.kept_share)]
    return [
        f"{'*' if is_taken else ' '} {option.length}",
        shape,
        "" if peak is None else format_bytes(peak),
        "" if speed is None else f"{speed:,.0f}",
        *padding,
        _percent(option.cut_share),
    ]


def _percent(share: float | None) -> str:
    """A share in percent; one that is not whole never looks so."""
    if share is None:
        return ""
    is_whole = min(share, 1 - share) < ROUNDING
    return f"{100 * share:.1f} %" if is_whole else f"{min(99.9, max(0.1, 100 * share)):.1f} %"


def packing_lines(data: DataLengths, length: int, micro_batch_size: int, packing: bool) -> list[str]:
    """What packing saves, or would save, at a plan's micro batch; nothing where no example remains."""
    rows = kept_at(data, length).rows
    if not rows:
        return []
    share = padding_share(rows, micro_batch_size)
    words = f"batches of {micro_batch_size} are {share:.1%} padding; data.packing=true would save that"
    if share < ROUNDING:
        words = f"padded batches of {micro_batch_size} would have no padding, so packing saves none"
    elif packing:
        words = f"padded batches of {micro_batch_size} would be {share:.1%} padding, which packing saves"
    return [wrapped("packing  ", words)]


def lengths_document(data: DataLengths) -> dict[str, Any]:
    """Lengths as plain values."""
    return {
        "source": data.source,
        "num_examples": data.num_examples,
        "num_counted": len(data.lengths),
        "num_tokens_counted": data.num_tokens,
        "percentiles": {f"p{share * 100:g}": percentile(data.lengths, share) for share in PERCENTILES},
        "longest": data.longest,
        "histogram": [
            {"from": low, "to": high, "examples": count} for low, high, count in histogram(data.lengths)
        ],
    }


def options_document(options: Sequence[LengthOption]) -> list[dict[str, Any]]:
    """Candidate lengths as plain values."""
    return [
        {**asdict(option), "plan": None if option.plan is None else plan_fields(option.plan)}
        for option in options
    ]
