"""The pools of torch's CUDA caching allocator: ranges of addresses, what is free in them, and how they grow.

See `launcher.planner.allocator`, of which this is the inside: functions of CUDACachingAllocator.cpp stand in backquotes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from launcher.units import MIB

# c10/core/AllocatorConfig.h of torch 2.13; in 2.9 the same numbers stand in CUDACachingAllocator.cpp
ROUND_BYTES = 512  # kMinBlockSize
SMALL_REQUEST_BYTES = MIB  # kSmallSize
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer, later the default of large_segment_size
LARGE_REQUEST_BYTES = 10 * MIB  # kMinLargeAlloc
LARGE_ROUND_BYTES = 2 * MIB  # kRoundLarge


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
            segment_bytes = round_up(size_bytes, LARGE_ROUND_BYTES)
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
            start = round_up(block.address, self.page_bytes)
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
        segment = self.device.new_segment(round_up(range_bytes, LARGE_SEGMENT_BYTES), is_mapped=False)
        self._insert(segment)
        return segment

    def _map(self, gap: Block, size_bytes: int) -> bool:
        """Maps the first pages of a gap and joins them with free neighbours (`map_block`)."""
        mapped_bytes = round_up(size_bytes, self.page_bytes)
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


def round_up(num_bytes: int, multiple_bytes: int) -> int:
    """The next multiple."""
    return -(-num_bytes // multiple_bytes) * multiple_bytes
