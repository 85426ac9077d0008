"""Devices compared for one job, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.explanation import OnCard
from launcher.report.documents import plan_fields
from launcher.report.layout import aligned, wrapped
from launcher.units import format_bytes


def cards_text(cards: Sequence[OnCard], cheapest: OnCard | None) -> str:
    """A table, best first, and in words which device is fastest and which is cheapest."""
    able = [card for card in cards if card.plan is not None]
    lines = aligned(
        [["device", "plan", "peak", "of", "tokens/s", "$/M", "grade"], *map(_row, able)], num_words=2
    )
    lines += [wrapped("  -", f"{card.hardware}: {card.reason}") for card in cards if card.plan is None]
    if able:
        lines += ["", wrapped("best     ", _best_words(able[0], cheapest))]
    return "\n".join(lines)


def cards_document(cards: Sequence[OnCard], cheapest: OnCard | None) -> dict[str, Any]:
    """The comparison as plain values, best first."""
    return {
        "devices": [
            {
                **asdict(card),
                "plan": None if card.plan is None else plan_fields(card.plan),
                "grade": None if card.grade is None else card.grade.value,
            }
            for card in cards
        ],
        "best": next((card.hardware for card in cards if card.plan is not None), None),
        "cheapest": None if cheapest is None else cheapest.hardware,
    }


def _row(card: OnCard) -> list[str]:
    name = card.hardware if card.num_devices == 1 else f"{card.num_devices} {card.hardware}"
    return [name, *plan_cells(card)]


def plan_cells(card: OnCard) -> list[str]:
    """A plan, its peak, the device's memory, tokens per second, dollars per million tokens, and the grade."""
    plan = card.plan
    assert plan is not None and card.peak_device_bytes is not None  # only those with a plan have a row
    method = f"{plan.method.value} r{plan.rank}" if plan.rank else plan.method.value
    shape = f"{plan.micro_batch_size}x{plan.max_length}x{plan.gradient_accumulation_steps}"
    dollars = card.dollars_per_million_tokens
    return [
        f"{method} {shape} {plan.activation_checkpointing.value}",
        format_bytes(card.peak_device_bytes),
        format_bytes(card.capacity_bytes),
        "" if card.tokens_per_second is None else f"{card.tokens_per_second:,.0f}",
        "" if dollars is None else f"{dollars:.2f}",
        "" if card.grade is None else card.grade.value,
    ]


def _best_words(best: OnCard, cheapest: OnCard | None) -> str:
    words = f"{best.hardware} is the fastest of those that get the job's best choice"
    if best.tokens_per_second is None:
        words = f"{best.hardware} gets the job's best choice; how fast it is nobody knows"
    if cheapest is None:
        return f"{words}; with planner.prices={{{best.hardware}: <dollars per hour>, ...}} prices are compared too"
    return f"{words}, and {cheapest.hardware} the cheapest: ${cheapest.dollars_per_million_tokens:.2f} per million tokens"
