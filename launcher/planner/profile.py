"""From a tape to a profile: births and releases become live bytes at every instant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from launcher.memory import Category
from launcher.planner.polynomial import CONSTANT, Exponents
from launcher.planner.skyline import CATEGORIES, Instant, Profile
from launcher.planner.tape import Block, Event, Region

SMALL_BYTES = 1 << 16
"""Blocks up to this size do not identify an instant: stacked norms, one per tensor, grow with depth."""


def sum_blocks(blocks: Sequence[Block]) -> dict[Exponents, int]:
    """The total size of some blocks, bytes."""
    total: dict[Exponents, int] = {}
    for block in blocks:
        for exponents, coefficient in block.size.items():
            total[exponents] = total.get(exponents, 0) + coefficient
    return total


def build_profile(
    events: Sequence[Event],
    resident: Mapping[Category, Mapping[Exponents, int]],
    batch_inputs: Mapping[Exponents, int],
) -> Profile:
    """Sums up a tape.

    Args:
        events: Births and releases in the order of time.
        resident: Full size of each resident category, bytes.
        batch_inputs: Bytes of the inputs of one micro batch.
    """
    exponents = sorted({CONSTANT} | {key for event in events for key in event.block.size})
    column = {key: index for index, key in enumerate(exponents)}
    row_of = {category: index for index, category in enumerate(CATEGORIES)}
    live = np.zeros((len(CATEGORIES), len(exponents)))
    instants: list[Instant] = []
    snapshots: list[np.ndarray] = []
    births: list[Event] = []
    for event, following in zip(events, [*events[1:], None], strict=True):
        block = event.block
        row = row_of[_category(block)]
        for key, coefficient in block.size.items():
            live[row, column[key]] += coefficient if event.birth else -coefficient
        if event.birth:
            births.append(event)
            if following is None or following.instant != event.instant or not following.birth:
                instants.append(Instant(_signature(births), event.phase))
                snapshots.append(live.copy())
                births = []
    return Profile(tuple(instants), tuple(exponents), np.stack(snapshots), resident, batch_inputs)


def _category(block: Block) -> Category:
    if block.category is not None:
        return block.category
    return Category.LOGITS_AND_LOSS if block.region is Region.HEAD else Category.TEMPORARIES


def _signature(births: Sequence[Event]) -> tuple[object, ...]:
    first = births[0]
    blocks = [event.block for event in births]
    sizes = frozenset(tuple(sorted(block.size.items())) for block in blocks if block.num_bytes > SMALL_BYTES)
    return (first.block.operation, first.phase, first.block.region, sizes)
