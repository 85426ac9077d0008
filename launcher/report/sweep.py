"""The points of a sweep in one table, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.explanation import SweepPoint
from launcher.report.cards import plan_cells
from launcher.report.layout import aligned, fits_width, wrapped


def sweep_text(points: Sequence[SweepPoint]) -> str:
    """A table in the order of the sweep; points without a plan have a row too, and their reason below it.

    Points have numbers where their values would leave the words of a plan less than `PLAN_WIDTH`.
    """
    keys = [key.rpartition(".")[2] for key, _ in points[0].swept]
    named = [[*keys, *PLAN_HEADS], *([*_values(point), *_cells(point)] for point in points)]
    legend: list[str] = []
    if fits_width([[*row[: len(keys)], row[len(keys)][:PLAN_WIDTH], *row[len(keys) + 1 :]] for row in named]):
        lines = aligned(named, num_words=len(keys) + 1, gives_way=len(keys))
    else:
        numbers = [str(index) for index in range(1, len(points) + 1)]
        rows = [[f"{number}", *_cells(point)] for number, point in zip(numbers, points, strict=True)]
        lines = aligned([["point", *PLAN_HEADS], *rows], num_words=2, gives_way=1)
        legend = [wrapped(f"  {number}", words(point)) for number, point in zip(numbers, points, strict=True)]
    reasons = [
        wrapped("  -", f"{words(point) or 'the job'}: {point.card.reason}")
        for point in points
        if point.card.plan is None
    ]
    notes = [wrapped("  -", f"{words(point) or 'the job'}: {point.note}") for point in points if point.note]
    return "\n".join([*lines, *legend, *reasons, *notes, *_fastest(points)])


PLAN_HEADS = ["plan", "peak", "of", "tokens/s", "grade"]
PLAN_WIDTH = 18
"""Cells in which the words of a plan can be read: none of them is longer."""


def words(point: SweepPoint) -> str:
    """What sets a point apart from the others."""
    return " ".join(f"{key}={value}" for key, value in point.swept)


def _values(point: SweepPoint) -> list[str]:
    return [value for _, value in point.swept]


def _cells(point: SweepPoint) -> list[str]:
    card = point.card
    if card.plan is None:
        return ["no plan", "", "", "", ""]
    return plan_cells(card)


def _fastest(points: Sequence[SweepPoint]) -> list[str]:
    """Which point is fastest, where there are several."""
    timed = [
        point for point in points if point.card.plan is not None and point.card.tokens_per_second is not None
    ]
    if len(timed) < 2:
        return []
    best = max(timed, key=lambda point: point.card.tokens_per_second or 0.0)
    return ["", wrapped("fastest  ", f"{words(best)}: {best.card.tokens_per_second:,.0f} tokens/s")]


def sweep_document(points: Sequence[SweepPoint], documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All points as plain values, each with what `action=plan` would print for it alone."""
    return {
        "points": [
            {"overrides": dict(point.swept), **document}
            for point, document in zip(points, documents, strict=True)
        ]
    }
