"""The bill of a plan: what is alive at its highest moment and at the next one, and how memory goes over a step."""

from __future__ import annotations

from launcher.memory import Bill, Moment, last_step
from launcher.planner.stream import (
    PHASES,
    Stream,
    bytes_by_category,
    highest_event,
    live_bytes,
    next_highest_event,
    top_modules,
)

MODULES_SHOWN = 10
VALLEY = 0.1
"""Share of the peak by which memory falls between it and what counts as another hill."""


def build_bill(stream: Stream) -> Bill:
    """Reads the bill off a stream."""
    peak = highest_event(stream)
    total = live_bytes(stream)
    other = next_highest_event(stream, round(VALLEY * int(total[peak])))
    return Bill(
        peak=moment(stream, peak),
        next_highest=None if other is None else moment(stream, other),
        step=last_step(total.tolist(), [PHASES[number] for number in stream.phases.tolist()]),
    )


def moment(stream: Stream, event: int) -> Moment:
    """What is alive right after an event."""
    by_category = bytes_by_category(stream, event)
    return Moment(
        phase=PHASES[stream.phases[event]],
        allocated_bytes=sum(by_category.values()),
        by_category_bytes=by_category,
        by_module=top_modules(stream, event, MODULES_SHOWN),
    )
