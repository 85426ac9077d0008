"""From a tape to a profile: births and releases become live bytes at every instant; and to a stream of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from launcher.domain import Exponents
from launcher.memory import PINNED, Category, category_of
from launcher.planner.blocks import Block, Event
from launcher.planner.polynomial import CONSTANT
from launcher.planner.skyline import Instant, Profile
from launcher.planner.stream import CATEGORIES, PHASES, Stream, in_order_of_births

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
    stream: Stream | None = None,
    small_bytes: int = SMALL_BYTES,
) -> Profile:
    """Sums up a tape.

    Args:
        events: Births and releases in the order of time.
        resident: Full size of each resident category, bytes.
        batch_inputs: Bytes of the inputs of one micro batch.
        stream: The same tape block by block; None where nobody asks.
        small_bytes: Blocks up to this size do not identify an instant.
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
        row = row_of[category_of(block.category, block.region)]
        for key, coefficient in block.size.items():
            live[row, column[key]] += coefficient if event.birth else -coefficient
        if event.birth:
            births.append(event)
            if following is None or following.instant != event.instant or not following.birth:
                instants.append(_instant(births, small_bytes))
                snapshots.append(live.copy())
                births = []
    return Profile(tuple(instants), tuple(exponents), np.stack(snapshots), resident, batch_inputs, stream)


def build_host_profile(events: Sequence[Event], *, exact: bool) -> Profile | None:
    """Sums up what a tape has of host memory; None where it has nothing.

    Args:
        events: Births and releases in the order of time.
        exact: Whether the trace is at the true shape; then pinned blocks have the sizes that torch gives them, the
            next power of two (ATen/core/CachingHostAllocator.h, torch 2.13), of which no polynomial knows.
    """
    if not events:
        return None
    for event in events:
        block = event.block
        if exact and event.birth and block.num_bytes and category_of(block.category, block.region) in PINNED:
            block.size = {CONSTANT: 1 << (block.num_bytes - 1).bit_length()}
    pinned = [event.block for event in events if event.birth and event.block.is_pinned and event.block.alive]
    # only whole tensors, and what an engine keeps for all layers together: its size is no mark of a moment
    profile = build_profile(events, {}, {}, small_bytes=0)
    return replace(profile, pinned=tuple(block.num_bytes for block in pinned))


def build_stream(events: Sequence[Event]) -> Stream:
    """Lists what a tape has, block by block.

    Args:
        events: Births and releases in the order of time.
    """
    blocks = [event.block for event in events if event.birth]
    numbers = {id(block): number for number, block in enumerate(blocks, 1)}
    module_names = {name: index for index, name in enumerate(sorted({block.module for block in blocks}))}
    operation_names = {
        name: index for index, name in enumerate(sorted({block.operation for block in blocks}))
    }
    signed = np.array(
        [numbers[id(event.block)] * (1 if event.birth else -1) for event in events], dtype=np.int64
    )
    phases = np.array([PHASES.index(event.phase) for event in events], dtype=np.int8)
    ordered, phases = in_order_of_births(signed, phases)
    return Stream(
        sizes_bytes=np.array([block.num_bytes for block in blocks], dtype=np.int64),
        categories=np.array(
            [CATEGORIES.index(category_of(block.category, block.region)) for block in blocks], dtype=np.int8
        ),
        modules=np.array([module_names[block.module] for block in blocks], dtype=np.int32),
        module_names=tuple(module_names),
        operations=np.array([operation_names[block.operation] for block in blocks], dtype=np.int32),
        operation_names=tuple(operation_names),
        events=ordered,
        phases=phases,
        cuda_streams=np.array([block.cuda_stream for block in blocks], dtype=np.int8),
    )


def _instant(births: Sequence[Event], small_bytes: int) -> Instant:
    first = births[0]
    blocks = [event.block for event in births]
    sizes = frozenset(tuple(sorted(block.size.items())) for block in blocks if block.num_bytes > small_bytes)
    return Instant((first.block.operation, first.block.region), first.phase, sizes)
