"""Replays births and releases through torch's CUDA caching allocator: live bytes in, reserved bytes out.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, whose functions stand in backquotes, read between
torch 2.10 and 2.11; tests/test_allocator.py holds recordings of the compiled libraries of 2.9 and 2.13. Sizes
are rounded to 512 bytes and served from two pools, small (up to 1 MiB) and large. The best free block is
taken, what is left of it stays free, and free neighbours become one block.

- classic: a pool grows by segments, one `cudaMalloc` each, and no block spans two of them.
- expandable (`expandable_segments:True`): a pool is one range of addresses. Memory is mapped where it is
  needed, in pages of 2 MiB (small pool) or 20 MiB (large), and stays when blocks on it are released.

Every CUDA stream has blocks of its own, which no other stream is given. Left out: blocks that wait until another
stream is done with them (`record_stream`), private pools (CUDA graphs), and what is off by default:
`max_split_size_mb`, `roundup_power2_divisions`, `garbage_collection_threshold`, memory fractions. Among equal
free blocks the lowest address wins; here `cudaMalloc` gives ever higher ones, which a driver need not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from launcher.memory import Phase
from launcher.planner.pools import (
    LARGE_SEGMENT_BYTES,
    ROUND_BYTES,
    SMALL_REQUEST_BYTES,
    SMALL_SEGMENT_BYTES,
    Block,
    ClassicPool,
    Device,
    ExpandablePool,
    round_up,
)
from launcher.units import format_bytes


class AllocatorMode(StrEnum):
    """How the allocator takes memory from the device."""

    CLASSIC = "classic"
    EXPANDABLE = "expandable"


@dataclass(frozen=True)
class ReplayedPeak:
    """The highest states of the allocator in one phase."""

    phase: Phase
    """Which phase."""
    allocated_bytes: int
    """Highest sum of used blocks: `torch.cuda.max_memory_allocated`. Sizes are rounded to 512 bytes; in
    classic mode a large block may also contain up to 1 MiB that was not worth splitting off."""
    reserved_bytes: int
    """Highest sum of segments or of mapped pages: `torch.cuda.max_memory_reserved`."""


@dataclass(eq=False)
class OutOfDeviceMemory(Exception):
    """A birth found no memory, not even after everything unused was given back to the device."""

    event_index: int
    """Position of the birth in the stream of events."""
    requested_bytes: int
    """Size of the block that was to be born."""

    def __str__(self) -> str:
        return f"no memory for {format_bytes(self.requested_bytes)} at event {self.event_index}"


class CachingAllocator:
    """The allocator of one device.

    Args:
        mode: How it takes memory from the device.
        capacity_bytes: What the device can give it in total; None: no limit.
    """

    def __init__(self, mode: AllocatorMode, capacity_bytes: int | None = None) -> None:
        self.device = Device(1 << 62 if capacity_bytes is None else capacity_bytes)  # more than all sizes
        self._mode = mode
        self._pools: dict[tuple[int, bool], ClassicPool] = {}
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0

    def allocate(self, num_bytes: int, cuda_stream: int = 0) -> Block | None:
        """A block for `num_bytes` > 0; None when the device has no memory left (`malloc`).

        Args:
            num_bytes: What is asked for.
            cuda_stream: On which CUDA stream.
        """
        size_bytes = round_up(num_bytes, ROUND_BYTES)
        pool = self._pool(cuda_stream, size_bytes)
        block = pool.reuse(size_bytes) or pool.grow(size_bytes)
        if block is None:
            self.give_back()
            block = pool.grow(size_bytes)
        if block is not None:
            self.allocated_bytes += block.size_bytes
            self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def release(self, block: Block, cuda_stream: int = 0) -> None:
        """Makes a block free for others of its CUDA stream; its memory stays reserved (`free`)."""
        self.allocated_bytes -= block.size_bytes
        self._pool(cuda_stream, block.size_bytes).release(block)

    def give_back(self) -> None:
        """Returns unused memory to the device, as `torch.cuda.empty_cache` does (`release_cached_blocks`)."""
        for _, pool in sorted(
            self._pools.items()
        ):  # large ones of a stream first, as False comes before True
            pool.give_back()

    def _pool(self, cuda_stream: int, size_bytes: int) -> ClassicPool:
        """Where blocks of a size come from: small or large ones, of a stream."""
        is_small = size_bytes <= SMALL_REQUEST_BYTES
        pool = self._pools.get((cuda_stream, is_small))
        if pool is None:
            pool = self._pools[cuda_stream, is_small] = self._new_pool(is_small=is_small)
        return pool

    def _new_pool(self, *, is_small: bool) -> ClassicPool:
        if self._mode is AllocatorMode.EXPANDABLE:
            return ExpandablePool(self.device, SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES)
        # what is left of a large block is split off when it is more than kSmallSize
        return ClassicPool(self.device, ROUND_BYTES if is_small else SMALL_REQUEST_BYTES + ROUND_BYTES)

    def reset_peaks(self) -> None:
        """Peaks count from here: `torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.device.peak_reserved_bytes = self.device.reserved_bytes


def replay(
    sizes_bytes: NDArray[np.int64],
    events: NDArray[np.int64],
    phases: NDArray[np.int8],
    mode: AllocatorMode,
    capacity_bytes: int | None = None,
    cuda_streams: NDArray[np.int8] | None = None,
    flushes: NDArray[np.bool_] | None = None,
) -> tuple[ReplayedPeak, ...]:
    """Replays a stream of births and releases.

    Args:
        sizes_bytes: Size of each block; shape (blocks,). A block of no bytes allocates nothing.
        events: In the order of time; shape (events,). `i + 1`: block i is born; `-(i + 1)`: it is released.
        phases: Phase of each event, as an index into `tuple(Phase)`; shape (events,).
        mode: How the allocator takes memory from the device.
        capacity_bytes: What the device can give in total, its context already taken off; None: no limit.
        cuda_streams: The CUDA stream that asks for each block; shape (blocks,). None: all are of the default stream.
        flushes: Blocks of no bytes at whose birth unused memory goes back to the device; shape (blocks,). None: none do.

    Returns:
        The peaks of every phase that has events, in the order of `Phase`. What is held when a phase begins
        counts; a phase that is entered again has one peak over all its stretches.

    Raises:
        OutOfDeviceMemory: When a birth finds no memory after everything unused was given back.
        ValueError: When the arrays don't fit together, or a block is born or released while it is already.
    """
    _check(sizes_bytes, events, phases)
    allocator = CachingAllocator(mode, capacity_bytes)
    sizes, stream = sizes_bytes.tolist(), events.tolist()
    live: list[Block | None] = [None] * len(sizes)
    lanes = [0] * len(sizes) if cuda_streams is None else cuda_streams.tolist()
    peaks = np.zeros((len(Phase), 2), dtype=np.int64)
    bounds = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist(), len(stream)] if stream else []
    for start, end in pairwise(bounds):
        allocator.reset_peaks()
        for index in range(start, end):
            number = abs(stream[index]) - 1
            block, size = live[number], sizes[number]
            if not size:
                if flushes is not None and flushes[number]:
                    allocator.give_back()
                continue
            if (block is None) is (stream[index] < 0):
                raise ValueError(f"event {index}: block {number} is {'not ' * (block is None)}alive")
            if block is not None:
                allocator.release(block, lanes[number])
                live[number] = None
            elif (born := allocator.allocate(size, lanes[number])) is not None:
                live[number] = born
            else:
                raise OutOfDeviceMemory(index, size)
        highest = allocator.peak_allocated_bytes, allocator.device.peak_reserved_bytes
        peaks[phases[start]] = np.maximum(peaks[phases[start]], highest)
    return tuple(ReplayedPeak(tuple(Phase)[phase], *peaks[phase].tolist()) for phase in np.unique(phases))


def _check(sizes_bytes: NDArray[np.int64], events: NDArray[np.int64], phases: NDArray[np.int8]) -> None:
    if len(events) != len(phases) or (phases < 0).any() or (phases >= len(Phase)).any():
        raise ValueError(f"each of {len(events)} events needs a phase between 0 and {len(Phase) - 1}")
    if (events == 0).any() or (np.abs(events) > len(sizes_bytes)).any() or (sizes_bytes < 0).any():
        raise ValueError(f"events name blocks 1 to {len(sizes_bytes)}, whose sizes are not negative")
