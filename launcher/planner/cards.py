"""Compares devices and counts for one job: by the time of its plan on each, and by what a token costs there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from launcher.explanation import OnCard
from launcher.job import JobSpec
from launcher.plan import PlanChoice
from launcher.planner.explain import position
from launcher.step_time import dollars_per_million_tokens


def on_card(job: JobSpec, choice: PlanChoice) -> OnCard:
    """A job's plan on one device.

    Args:
        job: The job, resolved for the device.
        choice: What its search found.
    """
    hardware = job.hardware
    price = job.planner.prices.get(hardware.name, hardware.price_per_hour)
    step = choice.step
    speed = None if step is None else step.tokens_per_second * hardware.world_size
    return OnCard(
        hardware=hardware.name,
        num_devices=hardware.world_size,
        num_nodes=hardware.num_nodes,
        plan=choice.plan,
        reason=choice.reason,
        position=-1 if choice.plan is None else position(job, choice.plan),
        peak_device_bytes=None if choice.estimate is None else choice.estimate.peak_device_bytes,
        capacity_bytes=choice.capacity_bytes,
        tokens_per_second=speed,
        dollars_per_million_tokens=None
        if step is None or price is None
        else dollars_per_million_tokens(step, price),
        grade=None if choice.squeeze is None else choice.squeeze.grade,
    )


def ranked(cards: Iterable[OnCard]) -> tuple[OnCard, ...]:
    """The job's better choice first, then more tokens per second, then the cheaper token; without a plan last."""
    return tuple(
        sorted(
            cards,
            key=lambda card: (
                card.plan is None,
                card.position,
                -(card.tokens_per_second or 0.0),
                card.dollars_per_million_tokens or math.inf,
                card.hardware,
                card.num_devices,
                card.num_nodes,
            ),
        )
    )


def cheapest(cards: Sequence[OnCard]) -> OnCard | None:
    """Of the devices with the best choice of the job that any of them has, the one whose tokens cost least."""
    able = [card for card in cards if card.plan is not None]
    best = min((card.position for card in able), default=-1)
    priced = [card for card in able if card.position == best and card.dollars_per_million_tokens is not None]
    return min(priced, key=lambda card: card.dollars_per_million_tokens or math.inf, default=None)
