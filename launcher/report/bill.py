"""The bill for people: what is alive at the highest moment, by category and by module, and a step over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from launcher.memory import Bill, Moment, Phase, Timeline
from launcher.report.layout import aligned
from launcher.units import format_bytes

CHART_WIDTH = 64
CHART_HEIGHT = 12
EIGHTHS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Blocks that fill nothing to all of a character's height."""


def bill_text(bill: Bill, measured: Timeline | None) -> str:
    """A bill: two moments, and the step as a chart."""
    lines = _moment_lines("highest moment", bill.peak)
    if bill.next_highest is not None:
        missing = bill.peak.allocated_bytes - bill.next_highest.allocated_bytes
        lines += [
            "",
            *_moment_lines(f"next highest moment, {format_bytes(missing)} lower", bill.next_highest),
        ]
    lines += ["", "one optimizer step, predicted", *chart(bill.step)]
    if measured is not None:
        lines += ["", "one optimizer step, measured", *chart(measured)]
    return "\n".join(lines)


def bill_document(bill: Bill, measured: Timeline | None) -> dict[str, Any]:
    """A bill as plain values."""
    return {
        "peak": asdict(bill.peak),
        "next_highest": None if bill.next_highest is None else asdict(bill.next_highest),
        "step": asdict(bill.step),
        "measured_step": None if measured is None else asdict(measured),
    }


def _moment_lines(title: str, moment: Moment) -> list[str]:
    whole = moment.allocated_bytes
    lines = [f"{title} ({moment.phase.value}): {format_bytes(whole)}"]
    parts = sorted(moment.by_category_bytes.items(), key=lambda item: -item[1])
    rows = [[f"  {name.value}", format_bytes(size), _share(size, whole)] for name, size in parts if size]
    lines += aligned(rows)
    if not moment.by_module:
        return lines
    lines.append("  made by")
    rows = [
        [
            f"    {share.module or '(no module)'}",
            format_bytes(share.num_bytes),
            _share(share.num_bytes, whole),
        ]
        for share in moment.by_module
    ]
    return lines + aligned(rows)


def _share(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.1f} %"


def chart(timeline: Timeline) -> list[str]:
    """A timeline as lines of block characters: time to the right, bytes upwards from 0."""
    heights = _resampled(timeline.allocated_bytes, CHART_WIDTH)
    top = max(heights)
    levels = [round(height / top * CHART_HEIGHT * 8) for height in heights]
    labels = {0: format_bytes(top), CHART_HEIGHT - 1: "0"}
    lines = [
        f"{labels.get(row, ''):>10} "
        + "".join(EIGHTHS[min(8, max(0, level - 8 * (CHART_HEIGHT - 1 - row)))] for level in levels)
        for row in range(CHART_HEIGHT)
    ]
    return [*lines, " " * 11 + _phase_line(timeline.phases)]


def _resampled(values: Sequence[int], count: int) -> list[int]:
    parts = min(count, len(values))
    return [max(values[i * len(values) // parts : (i + 1) * len(values) // parts]) for i in range(parts)]


def _phase_line(phases: Sequence[Phase]) -> str:
    width = min(CHART_WIDTH, len(phases))
    shown = [phases[i * len(phases) // width] for i in range(width)]
    words = [(phase.value, len(list(group))) for phase, group in groupby(shown)]
    return "".join(f"|{name}"[:length].ljust(length) for name, length in words)
