"""Devices and counts compared for one job, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.explanation import OnCard
from launcher.job import Engine
from launcher.plan import Plan
from launcher.report.documents import plan_fields
from launcher.report.layout import aligned, fits_width, wrapped
from launcher.report.tables import engine_parts
from launcher.units import format_bytes

KEPT_TOGETHER = "\u00a0"
"""A space at which no line is broken."""


def cards_text(cards: Sequence[OnCard], cheapest: OnCard | None) -> str:
    """A table, best first, each row with its plan below, and in words which device is fastest and which is cheapest."""
    able = [card for card in cards if card.plan is not None]
    names = [_name(card, cards) for card in able]
    lines = _table(able, names)
    lines += [wrapped("  -", f"{_name(card, cards)}: {card.reason}") for card in cards if card.plan is None]
    if able:
        lines += ["", wrapped("best     ", _best_words(able, cards, cheapest))]
    return "\n".join(lines)


def cards_document(cards: Sequence[OnCard], cheapest: OnCard | None) -> dict[str, Any]:
    """The comparison as plain values, best first; `best_index` and `cheapest_index` count in `devices`, from 0."""
    best = next((card for card in cards if card.plan is not None), None)
    return {
        "devices": [
            {
                **asdict(card),
                "plan": None if card.plan is None else plan_fields(card.plan),
                "grade": None if card.grade is None else card.grade.value,
                "tokens_per_second_per_device": card.tokens_per_second_per_device,
            }
            for card in cards
        ],
        "best": None if best is None else best.hardware,
        "best_index": None if best is None else cards.index(best),
        "cheapest": None if cheapest is None else cheapest.hardware,
        "cheapest_index": None if cheapest is None else cards.index(cheapest),
    }


def _table(able: Sequence[OnCard], names: Sequence[str]) -> list[str]:
    """Figures in columns, and below each row of them the plan; what nobody has a figure for has no column."""
    if not able:
        return []
    columns = [
        ["tokens/s", *(_figure(card.tokens_per_second, ",.0f") for card in able)],
        ["/device", *(_figure(card.tokens_per_second_per_device, ",.0f") for card in able)],
        ["$/M", *(_figure(card.dollars_per_million_tokens, ",.2f") for card in able)],
        ["peak", *(format_bytes(card.peak_device_bytes or 0) for card in able)],
        ["of", *(format_bytes(card.capacity_bytes) for card in able)],
        ["grade", *("" if card.grade is None else card.grade.value for card in able)],
    ]
    if all(card.num_devices == 1 for card in able):
        columns.pop(1)
    columns = [column for column in columns if any(column[1:])]
    rows = [list(row) for row in zip(["device", *names], *columns, strict=True)]
    is_named_above = not fits_width(rows)
    if is_named_above:
        rows = [rows[0], *(["", *figures] for _, *figures in rows[1:])]
    head, *figures = aligned(rows)
    lines = [head]
    for card, name, row in zip(able, names, figures, strict=True):
        assert card.plan is not None  # only those with a plan have a row
        lines += [*([name] if is_named_above else []), row, _plan_line(card.plan)]
    return lines


def _name(card: OnCard, cards: Sequence[OnCard]) -> str:
    """A device and how many of it; one of it is a count only among others."""
    if all(other.num_devices == 1 for other in cards):
        return card.hardware
    per_node = card.num_devices // card.num_nodes
    nodes = f"{card.num_nodes}x" if card.num_nodes > 1 else ""
    return f"{nodes}{per_node}x {card.hardware}"


def _plan_line(plan: Plan) -> str:
    """A plan below its figures, in a line or two; no part of it is broken."""
    parts = [
        _method(plan),
        f"micro batch {plan.micro_batch_size} x {plan.gradient_accumulation_steps}",
        f"length {plan.max_length}",
        f"checkpointing {plan.activation_checkpointing.value}",
        *engine_parts(plan),
    ]
    text = ", ".join(part.replace(" ", KEPT_TOGETHER) for part in parts)
    return wrapped(" ", text).replace(KEPT_TOGETHER, " ")


def _method(plan: Plan) -> str:
    return f"{plan.method.value} r{plan.rank}" if plan.rank else plan.method.value


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plan_cells(card: OnCard) -> list[str]:
    """A plan, its peak, the device's memory, tokens per second, and the grade."""
    plan = card.plan
    assert plan is not None and card.peak_device_bytes is not None  # only those with a plan have a row
    shape = f"{plan.micro_batch_size}x{plan.max_length}x{plan.gradient_accumulation_steps}"
    words = f"{_method(plan)} {shape} {plan.activation_checkpointing.value}"
    return [
        ", ".join([words, *engine_parts(plan)]) if plan.engine is not Engine.NONE else words,
        format_bytes(card.peak_device_bytes),
        format_bytes(card.capacity_bytes),
        _figure(card.tokens_per_second, ",.0f"),
        "" if card.grade is None else card.grade.value,
    ]


def _best_words(able: Sequence[OnCard], cards: Sequence[OnCard], cheapest: OnCard | None) -> str:
    """Which device is fastest and which is cheapest, of those that get as good a choice of the job as any."""
    best = able[0]
    rivals = [card for card in able if card.position == best.position]
    name = _name(best, cards)
    all_alike = len(rivals) == len(able)
    among = "that fits" if all_alike else "of those that get the job's best choice"
    if best.tokens_per_second is None:
        return f"{name} gets the job's best choice; how fast it is nobody knows"
    words = f"{name} is the fastest {among}"
    if len(rivals) == 1:
        words = (
            f"{name} is the only one {'that fits' if all_alike else 'that gets the best choice of the job'}"
        )
    if cheapest is None:
        return f"{words}; with planner.prices={{{best.hardware}: <dollars per hour>, ...}} prices are compared too"
    cost = f"${cheapest.dollars_per_million_tokens:,.2f} per million tokens"
    if len(rivals) == 1:
        return f"{words}: {cost}"
    unpriced = any(card.dollars_per_million_tokens is None for card in rivals)
    title = f"the cheapest{' of those with a price' if unpriced else ''}: {cost}"
    return f"{words}, and {title}" if cheapest == best else f"{words}, and {_name(cheapest, cards)} {title}"
