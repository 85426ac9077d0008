"""Replays births and releases through torch's CUDA caching allocator: live bytes in, reserved bytes out.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, whose functions stand in backquotes, read between
torch 2.10 and 2.11; tests/test_allocator.py holds recordings of the compiled libraries of 2.9 and 2.13. Sizes
are rounded to 512 bytes and served from two pools, small (up to 1 MiB) and large. The best free block is
taken, what is left of it stays free, and free neighbours become one block.

- classic: a pool grows by segments, one `cudaMalloc` each, and no block spans two of them.
- expandable (`expandable_segments:True`): a pool is one range of addresses. Memory is mapped where it is
  needed, in pages of 2 MiB (small pool) or 20 MiB (large), and stays when blocks on it are released.

Left out: more than one stream, `record_stream`, private pools (CUDA graphs), and what is off by default:
`max_split_size_mb`, `roundup_power2_divisions`, `garbage_collection_threshold`, memory fractions. Among equal
free blocks the lowest address wins; here `cudaMalloc` gives ever higher ones, which a driver need not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from launcher.memory import Phase
from launcher.units import MIB, format_bytes

# c10/core/AllocatorConfig.h of torch 2.13; in 2.9 the same numbers stand in CUDACachingAllocator.cpp
ROUND_BYTES = 512  # kMinBlockSize
SMALL_REQUEST_BYTES = MIB  # kSmallSize
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer, later the default of large_segment_size
LARGE_REQUEST_BYTES = 10 * MIB  # kMinLargeAlloc
LARGE_ROUND_BYTES = 2 * MIB  # kRoundLarge


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


@dataclass(slots=True, eq=False)
class Block:
    """A range of addresses with one use. It knows its neighbours within the segment."""

    address: int
    size_bytes: int
    is_mapped: bool = True
    """Whether memory is behind the addresses; always, but in expandable segments."""
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def reach_bytes(self) -> int:
        """Length together with the unmapped addresses behind it, which it could grow into."""
        gap = self.after
        return self.size_bytes if gap is None or gap.is_mapped else self.size_bytes + gap.size_bytes

    def cut(self, size_bytes: int) -> Block:
        """Shortens the block to its first `size_bytes`; returns the rest, free, mapped if the block is."""
        start, length = self.address + size_bytes, self.size_bytes - size_bytes
        rest = Block(start, length, self.is_mapped, before=self, after=self.after)
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size_bytes = size_bytes
        return rest


@dataclass(slots=True)
class Device:
    """What the device can give and has given; both pools draw on it."""

    capacity_bytes: int
    reserved_bytes: int = 0
    peak_reserved_bytes: int = 0
    next_address: int = 0  # from here on, addresses were never used

    def reserve(self, num_bytes: int) -> bool:
        """Takes memory; False, and takes nothing, when there is not enough left."""
        if self.reserved_bytes + num_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def new_segment(self, num_bytes: int, is_mapped: bool) -> Block:
        """A free block above all others."""
        self.next_address += num_bytes
        return Block(self.next_address - num_bytes, num_bytes, is_mapped)


class ClassicPool:
    """The free blocks for small or for large requests; grows by segments.

    Args:
        device: Where memory comes from.
        min_rest_bytes: What is left of a block is split off if it has so many bytes (`should_split`).
    """

    def __init__(self, device: Device, min_rest_bytes: int) -> None:
        self.device = device
        self.min_rest_bytes = min_rest_bytes
        self.free: list[tuple[int, int, Block]] = []
        """Free mapped blocks as (size, address, block), the order of `BlockComparatorSize`."""
        self.gaps: list[tuple[int, Block]] = []
        """Unmapped blocks as (address, block), the order of `BlockComparatorAddress`; none in this class."""

    def reuse(self, size_bytes: int) -> Block | None:
        """The smallest free block that is large enough, else None (`get_free_block`).

        A block before unmapped addresses counts with all it could grow to, so it is taken last.
        """
        free = self.free
        index = bisect_left(free, (size_bytes,))
        if index == len(free):
            return None
        while index + 1 < len(free) and free[index + 1][2].reach_bytes < free[index][2].reach_bytes:
            index += 1
        return self._hand_out(free.pop(index)[2], size_bytes)

    def grow(self, size_bytes: int) -> Block | None:
        """The start of a new segment (`get_allocation_size`); None when the device has no memory for it."""
        if size_bytes < LARGE_REQUEST_BYTES:
            segment_bytes = SMALL_SEGMENT_BYTES if size_bytes <= SMALL_REQUEST_BYTES else LARGE_SEGMENT_BYTES
        else:
            segment_bytes = _round_up(size_bytes, LARGE_ROUND_BYTES)
        if not self.device.reserve(segment_bytes):
            return None
        return self._hand_out(self.device.new_segment(segment_bytes, is_mapped=True), size_bytes)

    def release(self, block: Block) -> None:
        """Makes a block free again (`free_block`)."""
        block.is_free = True
        self._merge(block)
        self._insert(block)

    def give_back(self) -> None:
        """Returns every segment that is one free block to the device (`release_blocks`)."""
        for _, _, block in self.free.copy():
            if block.before is None and block.after is None:
                self._remove(block)
                self.device.reserved_bytes -= block.size_bytes

    def _hand_out(self, block: Block, size_bytes: int) -> Block:
        """Takes a block that is in no list, and splits off what is too much (`alloc_found_block`)."""
        if block.size_bytes - size_bytes >= self.min_rest_bytes:
            self._insert(block.cut(size_bytes))
        block.is_free = False
        return block

    def _merge(self, block: Block) -> None:
        """Joins a block that is in no list with free neighbours of its kind (`try_merge_blocks`)."""
        before, after = block.before, block.after
        if before is not None and before.is_free and before.is_mapped is block.is_mapped:
            self._remove(before)
            block.address = before.address
            block.size_bytes += before.size_bytes
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free and after.is_mapped is block.is_mapped:
            self._remove(after)
            block.size_bytes += after.size_bytes
            block.after = after.after
            if block.after is not None:
                block.after.before = block

    def _insert(self, block: Block) -> None:
        if block.is_mapped:
            insort(self.free, (block.size_bytes, block.address, block))
        else:
            insort(self.gaps, (block.address, block))

    def _remove(self, block: Block) -> None:
        if block.is_mapped:
            del self.free[bisect_left(self.free, (block.size_bytes, block.address))]
        else:
            del self.gaps[bisect_left(self.gaps, (block.address,))]


class ExpandablePool(ClassicPool):
    """A pool that is a range of addresses, mapped page by page (`ExpandableSegment`).

    Args:
        device: Where memory comes from.
        page_bytes: What is mapped and unmapped at once.
    """

    def __init__(self, device: Device, page_bytes: int) -> None:
        super().__init__(device, min_rest_bytes=ROUND_BYTES)
        self.page_bytes = page_bytes

    def grow(self, size_bytes: int) -> Block | None:
        """Maps what is missing at the lowest address with room (`try_allocate_expandable_block`).

        A free block before a gap is used up first: only the difference is mapped, in whole pages.
        """
        block = self._find_room(size_bytes)
        if not block.is_mapped and not self._map(block, min(size_bytes, block.size_bytes)):
            return None
        while block.size_bytes < size_bytes:
            gap = block.after
            assert gap is not None and not gap.is_mapped  # a mapped free block would be part of this one
            if not self._map(gap, min(size_bytes - block.size_bytes, gap.size_bytes)):
                return None  # what was mapped on the way stays, as a free block
            block = gap  # it has taken in the block before it
        self._remove(block)
        return self._hand_out(block, size_bytes)

    def give_back(self) -> None:
        """Unmaps the whole pages inside free blocks; what is left of the blocks stays (`unmap_block`)."""
        for _, _, block in self.free.copy():
            start = _round_up(block.address, self.page_bytes)
            end = (block.address + block.size_bytes) // self.page_bytes * self.page_bytes
            if start < end:
                self._unmap(block, start, end)

    def _find_room(self, size_bytes: int) -> Block:
        """Start of the lowest run of free and unmapped blocks of that size (`find_expandable_block`)."""
        for _, gap in self.gaps:
            start = gap.before if gap.before is not None and gap.before.is_free else gap
            room_bytes, block = start.size_bytes, start.after
            while room_bytes < size_bytes and block is not None and block.is_free:
                room_bytes += block.size_bytes
                block = block.after
            if room_bytes >= size_bytes:
                return start
        # `ExpandableSegment` takes addresses for 9/8 of the device; here, of what the device can give
        range_bytes = max(self.device.capacity_bytes * 9 // 8, size_bytes)
        segment = self.device.new_segment(_round_up(range_bytes, LARGE_SEGMENT_BYTES), is_mapped=False)
        self._insert(segment)
        return segment

    def _map(self, gap: Block, size_bytes: int) -> bool:
        """Maps the first pages of a gap and joins them with free neighbours (`map_block`)."""
        mapped_bytes = _round_up(size_bytes, self.page_bytes)
        if not self.device.reserve(mapped_bytes):
            return False
        self._remove(gap)
        if mapped_bytes < gap.size_bytes:
            self._insert(gap.cut(mapped_bytes))
        gap.is_mapped = True
        self._merge(gap)
        self._insert(gap)
        return True

    def _unmap(self, block: Block, start: int, end: int) -> None:
        self._remove(block)
        if end < block.address + block.size_bytes:
            self._insert(block.cut(end - block.address))
        if block.address < start:
            margin, block = block, block.cut(start - block.address)
            self._insert(margin)
        block.is_mapped = False
        self._merge(block)
        self.device.reserved_bytes -= end - start
        if block.before is not None or block.after is not None:
            self._insert(block)  # else the segment is empty, and its addresses are given up


class CachingAllocator:
    """The allocator of one device and one stream.

    Args:
        mode: How it takes memory from the device.
        capacity_bytes: What the device can give it in total; None: no limit.
    """

    def __init__(self, mode: AllocatorMode, capacity_bytes: int | None = None) -> None:
        self.device = Device(1 << 62 if capacity_bytes is None else capacity_bytes)  # more than all sizes
        if mode is AllocatorMode.CLASSIC:
            self.small = ClassicPool(self.device, ROUND_BYTES)
            self.large = ClassicPool(self.device, SMALL_REQUEST_BYTES + ROUND_BYTES)  # more than kSmallSize
        else:
            self.small = ExpandablePool(self.device, SMALL_SEGMENT_BYTES)
            self.large = ExpandablePool(self.device, LARGE_SEGMENT_BYTES)
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0

    def allocate(self, num_bytes: int) -> Block | None:
        """A block for `num_bytes` > 0; None when the device has no memory left (`malloc`)."""
        size_bytes = _round_up(num_bytes, ROUND_BYTES)
        pool = self.small if size_bytes <= SMALL_REQUEST_BYTES else self.large
        block = pool.reuse(size_bytes) or pool.grow(size_bytes)
        if block is None:
            self.give_back()
            block = pool.grow(size_bytes)
        if block is not None:
            self.allocated_bytes += block.size_bytes
            self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def release(self, block: Block) -> None:
        """Makes a block free for others; its memory stays reserved (`free`)."""
        self.allocated_bytes -= block.size_bytes
        (self.small if block.size_bytes <= SMALL_REQUEST_BYTES else self.large).release(block)

    def give_back(self) -> None:
        """Returns unused memory to the device, as `torch.cuda.empty_cache` does (`release_cached_blocks`)."""
        self.large.give_back()
        self.small.give_back()

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
) -> tuple[ReplayedPeak, ...]:
    """Replays a stream of births and releases.

    Args:
        sizes_bytes: Size of each block; shape (blocks,). A block of no bytes allocates nothing.
        events: In the order of time; shape (events,). `i + 1`: block i is born; `-(i + 1)`: it is released.
        phases: Phase of each event, as an index into `tuple(Phase)`; shape (events,).
        mode: How the allocator takes memory from the device.
        capacity_bytes: What the device can give in total, its context already taken off; None: no limit.

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
    peaks = np.zeros((len(Phase), 2), dtype=np.int64)
    bounds = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist(), len(stream)] if stream else []
    for start, end in pairwise(bounds):
        allocator.reset_peaks()
        for index in range(start, end):
            number = abs(stream[index]) - 1
            block, size = live[number], sizes[number]
            if not size:
                continue
            if (block is None) is (stream[index] < 0):
                raise ValueError(f"event {index}: block {number} is {'not ' * (block is None)}alive")
            if block is not None:
                allocator.release(block)
                live[number] = None
            elif (born := allocator.allocate(size)) is not None:
                live[number] = born
            else:
                raise OutOfDeviceMemory(index, size)
        highest = allocator.peak_allocated_bytes, allocator.device.peak_reserved_bytes
        peaks[phases[start]] = np.maximum(peaks[phases[start]], highest)
    return tuple(ReplayedPeak(tuple(Phase)[phase], *peaks[phase].tolist()) for phase in np.unique(phases))


def _round_up(num_bytes: int, multiple_bytes: int) -> int:
    return -(-num_bytes // multiple_bytes) * multiple_bytes


def _check(sizes_bytes: NDArray[np.int64], events: NDArray[np.int64], phases: NDArray[np.int8]) -> None:
    if len(events) != len(phases) or (phases < 0).any() or (phases >= len(Phase)).any():
        raise ValueError(f"each of {len(events)} events needs a phase between 0 and {len(Phase) - 1}")
    if (events == 0).any() or (np.abs(events) > len(sizes_bytes)).any() or (sizes_bytes < 0).any():
        raise ValueError(f"events name blocks 1 to {len(sizes_bytes)}, whose sizes are not negative")
