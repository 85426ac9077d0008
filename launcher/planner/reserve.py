"""From a stream to what the caching allocator holds, and whether a plan fits a card with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from launcher.memory import Category, MemoryEstimate, Phase
from launcher.planner.allocator import AllocatorMode, OutOfDeviceMemory, ReplayedPeak, replay
from launcher.planner.stream import CATEGORIES, PHASES, Stream

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
    return replay(stream.sizes_bytes, stream.events, stream.phases, MODE, capacity_bytes)


def _fits(stream: Stream, capacity_bytes: int) -> bool:
    try:
        _replay(stream, capacity_bytes)
    except OutOfDeviceMemory:
        return False
    return True


def with_workspaces(stream: Stream, num_bytes: int, count: int) -> Stream:
    """Adds the matrix library's workspaces: born at the first step, through the caching allocator, and never freed.

    Args:
        stream: The stream.
        num_bytes: Size of one.
        count: How many there are.
    """
    training = np.flatnonzero(stream.phases == PHASES.index(Phase.TRAIN_STEP))
    if not num_bytes or not len(training):
        return stream
    at = int(training[0])
    before = int((stream.events[:at] > 0).sum())
    numbers = np.abs(stream.events)
    shifted = np.sign(stream.events) * np.where(numbers > before, numbers + count, numbers)
    born = np.arange(before + 1, before + count + 1)
    nobody, operation = stream.module_names, stream.operation_names
    return Stream(
        sizes_bytes=np.insert(stream.sizes_bytes, before, [num_bytes] * count),
        categories=np.insert(stream.categories, before, [CATEGORIES.index(Category.WORKSPACES)] * count),
        modules=np.insert(stream.modules, before, [len(nobody)] * count),
        module_names=(*nobody, "matrix library"),
        operations=np.insert(stream.operations, before, [len(operation)] * count),
        operation_names=(*operation, "workspace"),
        events=np.insert(shifted, at, born),
        phases=np.insert(stream.phases, at, [PHASES.index(Phase.TRAIN_STEP)] * count),
    )
