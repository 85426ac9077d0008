"""An explanation for people, and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.explanation import AtCapacity, Change, Explanation
from launcher.report.documents import plan_fields, squeeze_fields
from launcher.report.layout import aligned, wrapped
from launcher.report.tables import plan_words, squeeze_words
from launcher.units import format_bytes, format_change


def explanation_text(explanation: Explanation) -> str:
    """What each knob buys, what other memories would, the verdict, and the grade."""
    squeeze = explanation.squeeze
    lines = [
        "one knob turned, everything else as it is; time is that of a token",
        *aligned([_heads(), *map(_row, explanation.changes)]),
    ]
    lines += [
        wrapped("  -", f"{item.knob} {item.words}: {item.refusal}")
        for item in explanation.changes
        if item.refusal
    ]
    lines += ["  * another model comes out", "", "the same job with other memory"]
    lines += [wrapped(f"  {item.factor:g} x", _capacity_words(item)) for item in explanation.capacities]
    lines += [
        "",
        wrapped("verdict  ", explanation.verdict),
        wrapped("grade    ", squeeze_words(squeeze)),
    ]
    if squeeze.advice:
        lines.append(wrapped("to relax ", squeeze.advice))
    if explanation.sharding:
        lines.append(wrapped("sharding ", explanation.sharding))
    return "\n".join(lines)


def explanation_document(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain values."""
    return {
        "changes": [
            {
                "knob": item.knob,
                "change": item.words,
                "plan": plan_fields(item.plan),
                "changes_result": item.changes_result,
                "saved_bytes": item.saved_bytes,
                "step_ratio": item.step_ratio,
                "fits": item.fits,
                "refusal": item.refusal,
            }
            for item in explanation.changes
        ],
        "capacities": [
            {**asdict(item), "plan": None if item.plan is None else plan_fields(item.plan)}
            for item in explanation.capacities
        ],
        "verdict": explanation.verdict,
        "squeeze": squeeze_fields(explanation.squeeze),
        "sharding": explanation.sharding,
    }


def _heads() -> list[str]:
    return ["  knob and change", "memory", "time", "fits"]


def _row(change: Change) -> list[str]:
    name = f"  {change.knob} {change.words}{' *' if change.changes_result else ''}"
    if change.saved_bytes is None:
        return [name, "not priced", "", ""]
    ratio = "" if change.step_ratio is None else f"x {change.step_ratio:.2f}"
    return [name, format_change(-change.saved_bytes), ratio, "yes" if change.fits else "no"]


def _capacity_words(item: AtCapacity) -> str:
    if item.plan is None:
        return f"{format_bytes(item.capacity_bytes)}: no plan; {item.reason}"
    speed = "" if item.tokens_per_second is None else f"; {item.tokens_per_second:,.0f} tokens/s"
    return f"{format_bytes(item.capacity_bytes)}: {plan_words(item.plan)}{speed}"
