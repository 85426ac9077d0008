"""From a stream to what the caching allocator holds, and whether a plan fits a card with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from launcher.memory import Category, MemoryEstimate
from launcher.planner.allocator import AllocatorMode, OutOfDeviceMemory, ReplayedPeak, replay
from launcher.planner.stream import CATEGORIES, Stream, flushes

MODE = AllocatorMode.EXPANDABLE
"""How the launcher sets the allocator up (run/render.py)."""


def with_reserved(estimate: MemoryEstimate, stream: Stream, capacity_bytes: int) -> MemoryEstimate:
    """Adds to every phase what the caching allocator holds at most.

    An allocator that runs out gives back what it holds for nothing, and goes on. So a plan that reserves more than
    the capacity may still fit: then the capacity is what it holds.

    Args:
        estimate: The plan's memory.
        stream: Its allocations and releases.
        capacity_bytes: What the device can give to tensors, bytes.
    """
    peaks = _replay(stream, None)
    if max(peak.reserved_bytes for peak in peaks) > capacity_bytes and _fits(stream, capacity_bytes):
        peaks = _replay(stream, capacity_bytes)
    reserved = {peak.phase: peak.reserved_bytes for peak in peaks}
    phases = tuple(replace(peak, reserved_bytes=reserved.get(peak.phase)) for peak in estimate.phases)
    return replace(estimate, phases=phases)


def _replay(stream: Stream, capacity_bytes: int | None) -> tuple[ReplayedPeak, ...]:
    return replay(
        stream.sizes_bytes,
        stream.events,
        stream.phases,
        MODE,
        capacity_bytes,
        stream.cuda_streams,
        flushes(stream),
    )


def _fits(stream: Stream, capacity_bytes: int) -> bool:
    try:
        _replay(stream, capacity_bytes)
    except OutOfDeviceMemory:
        return False
    return True


def with_workspaces(stream: Stream, num_bytes: int) -> Stream:
    """Gives the matrix library's workspaces their size, which is the card's.

    Args:
        stream: A stream, in which they are blocks of no size.
        num_bytes: Size of one.
    """
    is_workspace = stream.categories == CATEGORIES.index(Category.WORKSPACES)
    sizes_bytes = np.where(is_workspace & (stream.sizes_bytes == 0), num_bytes, stream.sizes_bytes)
    return replace(stream, sizes_bytes=sizes_bytes)
