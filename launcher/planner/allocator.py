"""Replays births and releases through torch's CUDA caching allocator: live bytes in, reserved bytes out.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp`; names in backquotes are its functions, read at torch
2.10 and compared with the compiled library of torch 2.13 (tests/test_allocator.py). Requests are rounded to 512
bytes and served from two pools, small (up to 1 MiB) and large. A free block is the best fit; what is left of it
stays free, and free neighbours become one block.

- classic: a pool grows by segments, one `cudaMalloc` each, and blocks never span two of them.
- expandable (`expandable_segments:True`): a pool is one range of addresses whose memory is mapped page by page
  where it is needed. Pages are 2 MiB in the small pool and 20 MiB in the large one; a mapping stays when the
  block on it is released.

Left out: a second stream, `record_stream`, private pools (CUDA graphs), and every option off by default
(`max_split_size_mb`, `roundup_power2_divisions`, `garbage_collection_threshold`, `per_process_memory_fraction`).
Between equally good free blocks the lowest address wins; here `cudaMalloc` returns rising addresses, a driver may
not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from launcher.memory import Phase
from launcher.units import KIB, MIB, format_bytes

# c10/core/AllocatorConfig.h, torch 2.13; the same numbers stood in CUDACachingAllocator.cpp up to 2.9
ROUND_BYTES = KIB // 2  # kMinBlockSize
SMALL_REQUEST_BYTES = MIB  # kSmallSize
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer, since 2.10 the default of large_segment_size_mb
LARGE_REQUEST_BYTES = 10 * MIB  # kMinLargeAlloc
LARGE_ROUND_BYTES = 2 * MIB  # kRoundLarge

UNBOUNDED_BYTES = 1 << 62
"""Stands for a capacity without limit; larger than any sum of real sizes."""


class AllocatorMode(StrEnum):
    """How the allocator takes memory from the device."""

    CLASSIC = "classic"
    EXPANDABLE = "expandable"


@dataclass(frozen=True)
class ReplayedPeak:
    """The highest state of the allocator in one phase."""

    phase: Phase
    """Which phase."""
    allocated_bytes: int
    """Highest sum of the live blocks' sizes: what `torch.cuda.max_memory_allocated` reports. Sizes are rounded
    to 512 bytes; in classic mode a block of the large pool may also have up to 1 MiB that was not split off."""
    reserved_bytes: int
    """Highest sum of segments or mapped pages: what `torch.cuda.max_memory_reserved` reports."""


class OutOfDeviceMemory(Exception):
    """The device can't give the memory for a birth, not even after all unused memory was given back.

    Args:
        event_index: Position of the birth in `events`.
        requested_bytes: Size of the block that was to be born.
        allocated_bytes: Live bytes at that moment.
        reserved_bytes: Bytes held from the device at that moment.
    """

    def __init__(
        self, event_index: int, requested_bytes: int, allocated_bytes: int, reserved_bytes: int
    ) -> None:
        super().__init__(event_index, requested_bytes, allocated_bytes, reserved_bytes)
        self.event_index = event_index
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes

    def __str__(self) -> str:
        return (
            f"event {self.event_index} asks for {format_bytes(self.requested_bytes)} while "
            f"{format_bytes(self.allocated_bytes)} are allocated and {format_bytes(self.reserved_bytes)} reserved"
        )


@dataclass(slots=True, eq=False)
class Block:
    """A range of addresses with one use; it knows its neighbours of the same segment."""

    address: int
    """First byte."""
    size_bytes: int
    """Length."""
    is_free: bool = True
    is_mapped: bool = True
    """Whether memory is behind the addresses; False only in expandable segments."""
    before: Block | None = None
    """What ends where this starts."""
    after: Block | None = None
    """What starts where this ends."""


@dataclass(slots=True)
class Device:
    """What the device has given; both pools draw on it."""

    capacity_bytes: int
    """What it can give in total."""
    reserved_bytes: int = 0
    peak_reserved_bytes: int = 0
    """Highest `reserved_bytes` since someone last reset it."""
    next_address: int = 0
    """Where the next segment starts."""

    def reserve(self, num_bytes: int) -> bool:
        """Takes memory; False, and nothing happens, when there is not enough."""
        if self.reserved_bytes + num_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def addresses(self, num_bytes: int, alignment_bytes: int) -> int:
        """First address of a range that nothing else uses."""
        start = _round_up(self.next_address, alignment_bytes)
        self.next_address = start + num_bytes
        return start


@dataclass(slots=True)
class ClassicPool:
    """A pool that grows by whole segments."""

    device: Device
    is_small: bool
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    """Free mapped blocks as (size, address, block), in the order of `BlockComparatorSize`."""
    min_rest_bytes: int = field(init=False)
    """A rest of at least so many bytes is split off (`should_split`)."""

    def __post_init__(self) -> None:
        # large pool: more than kSmallSize must remain, or the whole block is handed out
        self.min_rest_bytes = ROUND_BYTES if self.is_small else SMALL_REQUEST_BYTES + ROUND_BYTES

    def allocate(self, size_bytes: int) -> Block | None:
        """A block of at least `size_bytes`, a multiple of 512; None when the device has no memory left."""
        return self.reuse(size_bytes) or self.grow(size_bytes)

    def reuse(self, size_bytes: int) -> Block | None:
        """The best of the free blocks (`get_free_block`); None when none is large enough."""
        index = bisect_left(self.free, size_bytes, key=_size)
        if index == len(self.free):
            return None
        return self._hand_out(self.free.pop(index)[2], size_bytes)

    def grow(self, size_bytes: int) -> Block | None:
        """A block from new memory (`alloc_block`); None when the device has none left."""
        segment_bytes = segment_size(size_bytes)
        if not self.device.reserve(segment_bytes):
            return None
        segment = Block(self.device.addresses(segment_bytes, LARGE_ROUND_BYTES), segment_bytes)
        return self._hand_out(segment, size_bytes)

    def release(self, block: Block) -> None:
        """Makes a block free again (`free_block`)."""
        block.is_free = True
        self._merge(block)
        self._insert(block)

    def give_back(self) -> None:
        """Returns every segment in which nothing lives to the device (`release_blocks`)."""
        kept = []
        for entry in self.free:
            block = entry[2]
            if block.before is None and block.after is None:
                self.device.reserved_bytes -= block.size_bytes
            else:
                kept.append(entry)
        self.free = kept

    def _hand_out(self, block: Block, size_bytes: int) -> Block:
        """Marks a block as used and splits off what is too much (`alloc_found_block`)."""
        block.is_free = False
        rest_bytes = block.size_bytes - size_bytes
        if rest_bytes >= self.min_rest_bytes:
            block.size_bytes = size_bytes
            self._insert(_split_after(block, rest_bytes))
        return block

    def _merge(self, block: Block) -> None:
        """Joins a block that is in no list with free neighbours that are mapped as it is (`try_merge_blocks`)."""
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
        insort(self.free, (block.size_bytes, block.address, block))

    def _remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size_bytes, block.address), key=_size_and_address)]


@dataclass(slots=True)
class ExpandablePool(ClassicPool):
    """A pool whose segments are ranges of addresses, mapped page by page."""

    unmapped: list[tuple[int, Block]] = field(default_factory=list)
    """Addresses without memory as (address, block), in the order of `BlockComparatorAddress`."""
    page_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.min_rest_bytes = ROUND_BYTES  # `should_split`: no tolerance in either pool
        self.page_bytes = SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES

    def reuse(self, size_bytes: int) -> Block | None:
        """The best of the free blocks, where a block that can grow counts with all it can grow to."""
        free = self.free
        index = bisect_left(free, size_bytes, key=_size)
        if index == len(free):
            return None
        while index + 1 < len(free) and _reach(free[index + 1][2]) < _reach(free[index][2]):
            index += 1
        return self._hand_out(free.pop(index)[2], size_bytes)

    def grow(self, size_bytes: int) -> Block | None:
        """Maps as many pages as are missing at the lowest address (`try_allocate_expandable_block`).

        A free block that ends there is used first, so only the rest is mapped, in whole pages.
        """
        block = self._find_room(size_bytes)
        if not block.is_mapped and not self._map(block, min(size_bytes, block.size_bytes)):
            return None
        while block.size_bytes < size_bytes:
            gap = block.after
            assert gap is not None and not gap.is_mapped, "a free block that is too small ends at a gap"
            if not self._map(gap, min(size_bytes - block.size_bytes, gap.size_bytes)):
                return None  # what is mapped already stays, as a free block
            block = gap  # it has swallowed the free block before it
        self._remove(block)
        return self._hand_out(block, size_bytes)

    def give_back(self) -> None:
        """Unmaps every page on which nothing lives (`release_blocks`, `unmap_block`)."""
        for _, _, block in list(self.free):
            self._unmap(block)

    def _find_room(self, size_bytes: int) -> Block:
        """Start of the lowest run of free and unmapped blocks that is long enough (`find_expandable_block`)."""
        for _, gap in self.unmapped:
            before = gap.before
            start = before if before is not None and before.is_free else gap
            found_bytes, block = 0, start
            while found_bytes < size_bytes and block is not None and block.is_free:
                found_bytes += block.size_bytes
                block = block.after
            if found_bytes >= size_bytes:
                return start
        # `ExpandableSegment`: addresses for 9/8 of the device, so that pages can move to the end
        space_bytes = _round_up(self.device.capacity_bytes * 9 // 8, self.page_bytes)
        segment = Block(self.device.addresses(space_bytes, self.page_bytes), space_bytes, is_mapped=False)
        insort(self.unmapped, (segment.address, segment))
        return segment

    def _map(self, gap: Block, size_bytes: int) -> bool:
        """Maps the first pages of a gap and joins them with free neighbours; False when memory is short."""
        mapped_bytes = _round_up(size_bytes, self.page_bytes)
        if not self.device.reserve(mapped_bytes):
            return False
        self._remove(gap)
        gap.is_mapped = True
        if mapped_bytes < gap.size_bytes:
            rest = _split_after(gap, gap.size_bytes - mapped_bytes)
            rest.is_mapped = False
            gap.size_bytes = mapped_bytes
            rest.address = gap.address + mapped_bytes
            self._insert(rest)
        self._merge(gap)
        self._insert(gap)
        return True

    def _unmap(self, block: Block) -> None:
        """Unmaps the whole pages inside a free block; what is left of it on either side stays free."""
        start = _round_up(block.address, self.page_bytes)
        end = (block.address + block.size_bytes) // self.page_bytes * self.page_bytes
        if start >= end:
            return
        self._remove(block)
        after_bytes = block.address + block.size_bytes - end
        if start > block.address:
            ...
        del after_bytes
