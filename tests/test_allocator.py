"""The replay must hold as many bytes as torch's own allocator does.

It is compared with sums worked out by hand, with what torch's tests expect of their allocator, with
recordings of the compiled allocator, and with a second implementation that searches byte ranges anew.
"""

from __future__ import annotations

import pickle
import random
import time
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from launcher.memory import Phase
from launcher.planner.allocator import (
    AllocatorMode,
    CachingAllocator,
    OutOfDeviceMemory,
    ReplayedPeak,
    replay,
)
from launcher.planner.pools import Block
from launcher.units import MIB

CLASSIC, EXPANDABLE = AllocatorMode.CLASSIC, AllocatorMode.EXPANDABLE
PHASES = tuple(Phase)
Stream = tuple[list[int], list[int]]
"""Sizes and events, as `replay` takes them."""


def peak(
    mode: AllocatorMode, sizes: list[int], events: list[int], capacity: int | None = None
) -> tuple[int, int]:
    """Allocated and reserved peak of a stream of one phase, in bytes."""
    stream = np.array(sizes, np.int64), np.array(events, np.int64), np.zeros(len(events), np.int8)
    (only,) = replay(*stream, mode, capacity)
    assert only.phase is PHASES[0]
    return only.allocated_bytes, only.reserved_bytes


def trajectory(mode: AllocatorMode, stream: Stream, capacity: int | None = None) -> list[tuple[int, int]]:
    """Allocated and reserved bytes after every event; shorter than the events if memory runs out."""
    sizes, events = stream
    allocator = CachingAllocator(mode, capacity)
    live: dict[int, Block] = {}
    states = []
    for event in events:
        number = abs(event) - 1
        if event < 0 and sizes[number]:
            allocator.release(live.pop(number))
        elif sizes[number]:
            block = allocator.allocate(sizes[number])
            if block is None:
                break
            live[number] = block
        states.append((allocator.allocated_bytes, allocator.device.reserved_bytes))
    return states


def random_stream(seed: int, num_events: int) -> Stream:
    """Births and releases of sizes around every threshold; about half of the sizes come again and again."""
    generator = random.Random(seed)

    def below(limit: float) -> int:
        return int(generator.random() * limit)  # the only method that is the same in every version of Python

    edges = [
        0,
        1,
        512,
        513,
        MIB,
        MIB + 1,
        2 * MIB,
        10 * MIB - 512,
        10 * MIB,
        11 * MIB + 1,
        20 * MIB,
        20 * MIB + 1,
    ]
    widest, crowd = 14 + below(15), 2 + below(60)
    sizes: list[int] = []
    events: list[int] = []
    live: list[int] = []
    while len(events) < num_events:
        if live and generator.random() < len(live) / (2 * crowd):
            # the last born more often than others, as in a backward pass
            number = live.pop() if generator.random() < 0.4 else live.pop(below(len(live)))
            events.append(-number - 1)
            continue
        kind = generator.random()
        if sizes and kind < 0.5:
            sizes.append(sizes[below(len(sizes))])
        else:
            sizes.append(edges[below(len(edges))] if kind < 0.6 else below(2 << below(widest)))
        live.append(len(sizes) - 1)
        events.append(len(sizes))
    return sizes, events


# by hand


@pytest.mark.parametrize("mode", AllocatorMode)
def test_small_requests_share_segments_of_2_mib(mode: AllocatorMode) -> None:
    assert peak(mode, [1], [1]) == (512, 2 * MIB)
    # 2 MiB / 512 B = 4096 blocks fill a segment
    assert peak(mode, [1] * 4096, list(range(1, 4097))) == (2 * MIB, 2 * MIB)
    assert peak(mode, [1] * 4097, list(range(1, 4098))) == (2 * MIB + 512, 4 * MIB)
    # 1 MiB is small still, and three of them take two segments
    assert peak(mode, [MIB] * 3, [1, 2, 3]) == (3 * MIB, 4 * MIB)


@pytest.mark.parametrize(
    ("size", "classic", "expandable"),
    [
        (MIB + 1, 20 * MIB, 20 * MIB),  # up to 10 MiB: a segment of 20 MiB; one page
        (10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 20 * MIB),  # from 10 MiB on: rounded to 2 MiB; whole pages
        (10 * MIB + 512, 12 * MIB, 20 * MIB),
        (20 * MIB + 512, 22 * MIB, 40 * MIB),
        (100 * MIB, 100 * MIB, 100 * MIB),
    ],
)
def test_large_requests(size: int, classic: int, expandable: int) -> None:
    assert peak(CLASSIC, [size], [1])[1] == classic
    assert peak(EXPANDABLE, [size], [1])[1] == expandable


def test_classic_does_not_split_off_up_to_1_mib_of_a_large_block() -> None:
    # 12 - 11 = 1 MiB is not more than 1 MiB: the tensor gets all 12 MiB, and torch counts them as allocated.
    assert peak(CLASSIC, [11 * MIB, 11 * MIB - 512], [1]) == (12 * MIB, 12 * MIB)
    # 12 MiB - (11 MiB - 512) is: the rest of 1 MiB + 512 is free and takes a request of that size.
    assert peak(CLASSIC, [11 * MIB - 512, MIB + 512], [1, 2]) == (12 * MIB, 12 * MIB)
    # The expandable mode splits everything: 11 + 9 MiB are one page.
    assert peak(EXPANDABLE, [11 * MIB, 9 * MIB], [1, 2]) == (20 * MIB, 20 * MIB)


def test_classic_segments_never_join() -> None:
    # Three free segments of 12 MiB hold no tensor of 30 MiB: 36 + 30 = 66.
    # As one range, 3 x 12 = 36 MiB are two pages of 20, and 30 MiB fit into the 40.
    events = [1, 2, 3, -1, -2, -3, 4]
    assert peak(CLASSIC, [12 * MIB] * 3 + [30 * MIB], events) == (36 * MIB, 66 * MIB)
    assert peak(EXPANDABLE, [12 * MIB] * 3 + [30 * MIB], events) == (36 * MIB, 40 * MIB)


def test_the_best_fit_is_taken() -> None:
    # Free are 16 and 12 MiB. 11 MiB go into the 12, so that 16 MiB fit as well: 28 stay reserved.
    assert peak(CLASSIC, [n * MIB for n in (16, 12, 11, 16)], [1, 2, -1, -2, 3, 4]) == (28 * MIB, 28 * MIB)


def test_expandable_memory_grows_from_its_free_end() -> None:
    # 30 MiB map 40, 10 are free at the end. 25 MiB take those and miss 15: one page more, 60, of which 5 are
    # free.
    assert peak(EXPANDABLE, [30 * MIB, 25 * MIB], [1, 2]) == (55 * MIB, 60 * MIB)


def test_a_hole_that_is_too_small_is_not_extended() -> None:
    # 30 + 5 MiB map 40. The hole of 30 is too small for 32; the 5 at the end miss 27: two pages, 80 for 37.
    stream = [30 * MIB, 5 * MIB, 32 * MIB], [1, 2, -1, 3]
    assert peak(EXPANDABLE, *stream) == (37 * MIB, 80 * MIB)
    assert trajectory(EXPANDABLE, stream)[-1] == (37 * MIB, 80 * MIB)


def test_the_end_that_can_grow_is_taken_last() -> None:
    # 12 + 18 MiB map 40: a hole of 12 at the start, 10 free at the end. 8 MiB fit the end better and go into
    # the hole all the same, so 12 MiB more must start at the end and miss 2: 60. Best fit alone: 40.
    assert peak(EXPANDABLE, [n * MIB for n in (12, 18, 8, 12)], [1, 2, -1, 3, 4]) == (38 * MIB, 60 * MIB)


def test_expandable_pages_stay_mapped_and_pools_do_not_share() -> None:
    # 100 MiB are released, and then 100 x 1 MiB need 100 MiB of the small pool: 200 reserved for 100 in use.
    sizes = [100 * MIB] + [MIB] * 100
    for mode in AllocatorMode:
        assert peak(mode, sizes, [1, -1, *range(2, 102)]) == (100 * MIB, 200 * MIB)


def test_memory_is_given_back_when_it_runs_out() -> None:
    # 100 MiB were released; 100 x 1 MiB do not fit beside them into 150: they go back at the 26th segment.
    sizes = [100 * MIB] + [MIB] * 100
    for mode in AllocatorMode:
        stream = sizes, [1, -1, *range(2, 102)]
        assert peak(mode, *stream, capacity=150 * MIB) == (100 * MIB, 150 * MIB)
        after = [reserved for _, reserved in trajectory(mode, stream, 150 * MIB)]
        # 25 segments of 2 MiB hold the first 50; the 51st finds no memory and leaves 26 segments
        assert after[51] == 150 * MIB and after[52] == 52 * MIB and after[-1] == 100 * MIB


def test_pages_with_something_alive_are_not_given_back() -> None:
    # 15 + 10 + 10 MiB map 40. Without the first and the last, no page of 20 is quite free: the 10 MiB from 15
    # to 25 lie on both. So 40 MiB stay, and the small tensor finds nothing, with 30 MiB unused.
    sizes, events = [15 * MIB, 10 * MIB, 10 * MIB, 1], [1, 2, 3, -1, -3, 4]
    with pytest.raises(OutOfDeviceMemory) as caught:
        peak(EXPANDABLE, sizes, events, capacity=40 * MIB)
    assert (caught.value.event_index, caught.value.requested_bytes) == (5, 1)
    # Classic: 20 MiB segments for 10 MiB - 512 each two, 16 for 15 MiB; the free 16 are given back: 20 + 2.
    sizes = [15 * MIB, 10 * MIB - 512, 10 * MIB - 512, 1]
    assert trajectory(CLASSIC, (sizes, events), 36 * MIB)[-1] == (10 * MIB, 22 * MIB)


# what torch's tests expect


@pytest.mark.parametrize(
    ("size", "classic", "expandable", "classic_after", "expandable_after"),
    [
        (512, 2, 2, 2, 2),
        (MIB, 4, 4, 2, 2),
        (MIB + 512, 20, 20, 20, 20),
        (10 * MIB - 512, 40, 40, 20, 40),
        (10 * MIB + 512, 36, 40, 12, 20),
    ],
)
def test_clones_hold_what_torch_says(
    size: int, classic: int, expandable: int, classic_after: int, expandable_after: int
) -> None:
    """Reserved MiB of test_graph_memory_stats_and_use_result_after_destroy_graph (torch's test/test_cuda.py).

    Five times `b = b.clone() + 1` in a pool of its own, without the segment for random numbers that the test
    adds; then with nothing but `b` alive, after the cache was emptied. The test gives both modes' numbers.
    """
    for mode, held, after in ((CLASSIC, classic, classic_after), (EXPANDABLE, expandable, expandable_after)):
        allocator = CachingAllocator(mode)
        b = allocator.allocate(size)
        for _ in range(5):
            clone = allocator.allocate(size)
            total = allocator.allocate(size)
            assert b and clone and total
            allocator.release(clone)
            allocator.release(b)
            b = total
        assert (allocator.allocated_bytes, allocator.device.reserved_bytes) == (size, held * MIB)
        allocator.give_back()
        assert (allocator.allocated_bytes, allocator.device.reserved_bytes) == (size, after * MIB)


@pytest.mark.parametrize("mode", AllocatorMode)
def test_out_of_memory_retry(mode: AllocatorMode) -> None:
    """Half of the device fits once, and again when it was released (torch's test/test_cuda.py)."""
    half, capacity = 40 * 1024 * MIB, 79 * 1024 * MIB
    with pytest.raises(OutOfDeviceMemory) as caught:
        peak(mode, [half, half], [1, 2], capacity)
    assert caught.value.event_index == 1
    assert peak(mode, [half, half], [1, -1, 2], capacity) == (half, half)
    assert peak(mode, [half, half + 20 * MIB], [1, -1, 2], capacity)[0] == half + 20 * MIB


# recordings of the compiled allocator


RECORDED: list[tuple[int, str, int | None, int, int, int, int]] = [
    (0, "classic", None, 2000, 331850240, 534773760, 2307376823),
    (0, "expandable", None, 2000, 327342592, 406847488, 2932289418),
    (1, "classic", None, 2000, 154325504, 197132288, 1774413436),
    (1, "expandable", None, 2000, 152228864, 174063616, 278008542),
    (2, "classic", None, 2000, 982810112, 1736441856, 2990440248),
    (2, "expandable", None, 2000, 980782592, 1017118720, 3326088044),
    (3, "classic", None, 2000, 161688064, 220200960, 3851311807),
    (3, "expandable", None, 2000, 161683456, 174063616, 3399812347),
    (4, "classic", None, 2000, 52564992, 71303168, 3788220306),
    (4, "expandable", None, 2000, 52564992, 67108864, 1175106294),
    (5, "classic", None, 2000, 163682816, 230686720, 1860920514),
    (5, "expandable", None, 2000, 162634752, 218103808, 2954706760),
    (100, "classic", 87, 2000, 58840576, 81788928, 2154568060),
    (102, "classic", 217, 2000, 191033856, 205520896, 2822555471),
    (103, "classic", 963, 1970, 667171840, 893386752, 3982367243),
    (104, "classic", 1149, 2000, 872114176, 1103101952, 994623080),
    (166, "classic", 99, 1942, 90348544, 102760448, 3447921989),
    (101, "expandable", 65, 2000, 54748160, 67108864, 3526720318),
    (102, "expandable", 202, 2000, 191033856, 211812352, 4016107765),
    (103, "expandable", 851, 2000, 750168576, 845152256, 653202166),
    (112, "expandable", 205, 1262, 194504704, 213909504, 2827089193),
    (125, "expandable", 262, 2000, 233059328, 257949696, 2197983032),  # runs out of addresses
    (133, "expandable", 126, 1801, 107124224, 132120576, 3989378154),
]
"""Seed, mode, capacity in MiB, events until memory ran out, peak allocated and reserved bytes, checksum.

What `getDeviceStats` said after each event of `random_stream(seed, 2000)`, when libc10_cuda.so of the wheels
of torch 2.13.0 (CUDA 13) and 2.9.0 (CUDA 12.8) ran it; both said the same. Beneath was a CUDA runtime without
a device: it counts bytes up to the capacity, which it also reports as the device's memory, and gives ever
higher addresses.
"""


@pytest.mark.parametrize(
    ("seed", "mode", "capacity_mib", "events", "allocated", "reserved", "checksum"), RECORDED
)
def test_the_compiled_allocator_holds_the_same(
    seed: int, mode: str, capacity_mib: int | None, events: int, allocated: int, reserved: int, checksum: int
) -> None:
    capacity = None if capacity_mib is None else capacity_mib * MIB
    states = trajectory(AllocatorMode(mode), random_stream(seed, 2000), capacity)
    assert (len(states), *np.max(states, axis=0)) == (events, allocated, reserved)
    assert zlib.crc32(repr(states).encode()) == checksum


# a second implementation


@dataclass
class Segment:
    """Addresses from 0, a set of pages with memory behind them, and the ranges in use."""

    size: int
    page: int
    pages: set[int]
    used: dict[int, tuple[int, int]] = field(default_factory=dict)

    def runs(self) -> list[tuple[int, int, str]]:
        """Start, end and state of the longest stretches that are used, free or unmapped, in order."""
        cuts = {0, self.size} | {edge for span in self.used.values() for edge in span}
        cuts |= {edge * self.page for page in self.pages for edge in (page, page + 1)}
        runs: list[tuple[int, int, str]] = []
        edges = sorted(cuts)
        for start, end in pairwise(edges):
            owner = next((key for key, span in self.used.items() if span[0] <= start < span[1]), None)
            state = "unmapped" if start // self.page not in self.pages else "free"
            state = state if owner is None else f"used by {owner}"
            if runs and runs[-1][2] == state:
                runs[-1] = (runs[-1][0], end, state)
            else:
                runs.append((start, end, state))
        return runs


@dataclass
class Reference:
    """The rules on byte ranges: everything is looked for anew on each request."""

    mode: AllocatorMode
    capacity: int
    small: list[Segment] = field(default_factory=list)
    large: list[Segment] = field(default_factory=list)

    def reserved(self) -> int:
        return sum(len(segment.pages) * segment.page for segment in self.small + self.large)

    def allocated(self) -> int:
        return sum(end - start for segment in self.small + self.large for start, end in segment.used.values())

    def birth(self, key: int, num_bytes: int) -> bool:
        size = -(-num_bytes // 512) * 512
        segments = self.small if size <= MIB else self.large
        if self.place_in_free(segments, key, size) or self.place_in_new(segments, key, size):
            return True
        for pool in (self.small, self.large):
            for segment in pool:
                busy = {
                    page
                    for start, end in segment.used.values()
                    for page in range(start // segment.page, (end - 1) // segment.page + 1)
                }
                segment.pages &= busy
            pool[:] = [segment for segment in pool if segment.pages]
        return self.place_in_new(segments, key, size)

    def release(self, key: int) -> None:
        for segment in self.small + self.large:
            segment.used.pop(key, None)

    def place_in_free(self, segments: list[Segment], key: int, size: int) -> bool:
        fits = []
        for order, segment in enumerate(segments):
            runs = segment.runs()
            for (start, end, state), behind in zip(runs, [*runs[1:], (0, 0, "")], strict=True):
                if state == "free" and end - start >= size:
                    reach = (behind[1] if behind[2] == "unmapped" else end) - start
                    fits.append((end - start, order, start, reach))
        fits.sort()
        while len(fits) > 1 and fits[1][3] < fits[0][3]:
            del fits[0]
        if not fits:
            return False
        length, order, start, _ = fits[0]
        keep_whole = self.mode is CLASSIC and size > MIB and length - size <= MIB
        segments[order].used[key] = (start, start + (length if keep_whole else size))
        return True

    def place_in_new(self, segments: list[Segment], key: int, size: int) -> bool:
        if self.mode is CLASSIC:
            total = (
                2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            )
            if self.reserved() + total > self.capacity:
                return False
            segments.append(Segment(total, total, {0}))
            return self.place_in_free(segments[-1:], key, size)
        for segment in segments:
            start = self.room(segment, size)
            if start is not None:
                pages = set(range(start // segment.page, (start + size - 1) // segment.page + 1))
                if self.reserved() + len(pages - segment.pages) * segment.page > self.capacity:
                    return False
                segment.pages |= pages
                segment.used[key] = (start, start + size)
                return True
        page = 2 * MIB if segments is self.small else 20 * MIB
        segments.append(Segment(-(-self.capacity * 9 // 8 // (20 * MIB)) * 20 * MIB, page, set()))
        return self.place_in_new(segments, key, size)

    @staticmethod
    def room(segment: Segment, size: int) -> int | None:
        """Lowest start, at or right before unmapped addresses, of so many bytes that nothing uses."""
        runs = segment.runs()
        for index, (start, _, state) in enumerate(runs):
            if state == "unmapped":
                if index and runs[index - 1][2] == "free":
                    start = runs[index - 1][0]
                end = next((s for s, _, use in runs[index:] if use.startswith("used")), segment.size)
                if end - start >= size:
                    return start
        return None


def reference_trajectory(mode: AllocatorMode, stream: Stream, capacity: int) -> list[tuple[int, int]]:
    sizes, events = stream
    reference = Reference(mode, capacity)
    states = []
    for event in events:
        number = abs(event) - 1
        if event < 0:
            reference.release(number)
        elif sizes[number] and not reference.birth(number, sizes[number]):
            break
        states.append((reference.allocated(), reference.reserved()))
    return states


@pytest.mark.parametrize("mode", AllocatorMode)
def test_byte_ranges_say_the_same(mode: AllocatorMode) -> None:
    ran_out = gave_back = 0
    for seed in range(60):
        stream = random_stream(seed, 240)
        plenty = 1 << 40
        states = trajectory(mode, stream, plenty)
        assert states == reference_trajectory(mode, stream, plenty), seed
        allocated, reserved = np.max(states, axis=0)
        for share in (0.98, 0.9, 0.7):  # of what is reserved beyond the tensors
            capacity = int(allocated + share * (reserved - allocated))
            states = trajectory(mode, stream, capacity)
            assert states == reference_trajectory(mode, stream, capacity), (seed, share)
            ran_out += len(states) < len(stream[1])
            gave_back += any(later[1] < earlier[1] for earlier, later in pairwise(states))
    assert ran_out > 10 and gave_back > 10


# what must always hold


@pytest.mark.parametrize("mode", AllocatorMode)
def test_live_blocks_never_overlap_and_lie_in_reserved_memory(mode: AllocatorMode) -> None:
    for seed in range(20):
        sizes, events = random_stream(seed, 400)
        allocator = CachingAllocator(mode, 400 * MIB if seed % 2 else None)
        live: dict[int, Block] = {}
        for event in events:
            number = abs(event) - 1
            if not sizes[number]:
                continue
            if event < 0:
                allocator.release(live.pop(number))
                continue
            block = allocator.allocate(sizes[number])
            if block is None:
                break
            assert block.size_bytes >= sizes[number] and block.is_mapped and not block.is_free
            live[number] = block
            spans = sorted((block.address, block.address + block.size_bytes) for block in live.values())
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            reserved = allocator.device.reserved_bytes
            assert allocator.allocated_bytes == sum(end - start for start, end in spans) <= reserved
            assert reserved % (2 * MIB) == 0


@pytest.mark.parametrize("mode", AllocatorMode)
def test_when_everything_is_released_everything_can_be_given_back(mode: AllocatorMode) -> None:
    for seed in range(20):
        allocator = CachingAllocator(mode)
        blocks = [allocator.allocate(size) for size in random_stream(seed, 300)[0] if size]
        random.Random(seed).shuffle(blocks)
        for block in blocks:
            assert block is not None
            allocator.release(block)
        allocator.give_back()
        assert (allocator.allocated_bytes, allocator.device.reserved_bytes) == (0, 0)
        for pool in allocator._pools.values():
            assert not pool.free and not pool.gaps


@pytest.mark.parametrize("mode", [CLASSIC, EXPANDABLE])
def test_streams_share_nothing_but_the_device(mode: AllocatorMode) -> None:
    """What three streams reserve together is at every moment what each of them would reserve alone."""
    for seed in range(10):
        sizes, events = map(np.array, random_stream(seed, 300))
        streams = np.array([(7 * number + seed) % 3 for number in range(len(sizes))], dtype=np.int8)
        phases = np.zeros(len(events), dtype=np.int8)
        ends = range(1, len(events) + 1, 7)
        together = [replay(sizes, events[:end], phases[:end], mode, None, streams) for end in ends]
        alone = [
            [
                replay(sizes, mine, np.zeros(len(mine), dtype=np.int8), mode)
                for stream in range(3)
                if len(mine := events[:end][streams[np.abs(events[:end]) - 1] == stream])
            ]
            for end in ends
        ]
        for (all_of_them,), each in zip(together, alone, strict=True):
            # nothing is given back, so the highest is the last
            assert all_of_them.reserved_bytes == sum(peak.reserved_bytes for (peak,) in each)


@pytest.mark.parametrize("mode", [CLASSIC, EXPANDABLE])
def test_an_emptied_cache_is_reserved_anew(mode: AllocatorMode) -> None:
    """40 MiB come and go; where the cache is emptied before 60 MiB come, they are not there beside them."""
    sizes = np.array([40 * MIB, 0, 60 * MIB])
    events, phases = np.array([1, -1, 2, 3]), np.array([0, 0, 1, 1], dtype=np.int8)
    flushes = np.array([False, True, False])
    kept = replay(sizes, events, phases, mode)
    emptied = replay(sizes, events, phases, mode, None, None, flushes)
    assert [peak.reserved_bytes for peak in emptied] == [40 * MIB, 60 * MIB]
    grown = 60 * MIB if mode is EXPANDABLE else 100 * MIB  # a segment of 40 MiB is too small, a range grows
    assert [peak.reserved_bytes for peak in kept] == [40 * MIB, grown]


def test_without_holes_expandable_memory_is_less_than_a_page_per_pool_above_what_lives() -> None:
    for seed in range(20):
        sizes = [size for size in random_stream(seed, 200)[0] if size]
        allocated, reserved = peak(EXPANDABLE, sizes, list(range(1, len(sizes) + 1)))
        assert 0 <= reserved - allocated < 22 * MIB


# the interface


def test_a_phase_counts_what_it_finds_and_folds_its_stretches() -> None:
    sizes = np.array([20 * MIB, 30 * MIB, 0, 40 * MIB], np.int64)
    events = np.array([1, 3, 2, -2, -3, -1, 4, -4, 1], np.int64)
    load, train, save = (PHASES.index(phase) for phase in (Phase.LOAD, Phase.TRAIN_STEP, Phase.SAVE))
    phases = np.array([load, load, train, train, train, save, load, save, load], np.int8)
    # 20 MiB are one page, 20 + 30 are three. 40 MiB then fit into the free 60.
    assert replay(sizes, events, phases, EXPANDABLE) == (
        ReplayedPeak(Phase.LOAD, 40 * MIB, 60 * MIB),
        ReplayedPeak(Phase.TRAIN_STEP, 50 * MIB, 60 * MIB),
        ReplayedPeak(Phase.SAVE, 40 * MIB, 60 * MIB),
    )
    # Classic: 20 and 30 MiB are segments, and 40 need a third.
    assert replay(sizes, events, phases, CLASSIC) == (
        ReplayedPeak(Phase.LOAD, 40 * MIB, 90 * MIB),
        ReplayedPeak(Phase.TRAIN_STEP, 50 * MIB, 50 * MIB),
        ReplayedPeak(Phase.SAVE, 40 * MIB, 90 * MIB),
    )


def test_nothing_replays_to_nothing() -> None:
    empty = np.array([], np.int64)
    assert replay(empty, empty, np.array([], np.int8), EXPANDABLE) == ()
    assert peak(CLASSIC, [0], [1, -1]) == (0, 0)


@pytest.mark.parametrize(
    ("sizes", "events", "phases"),
    [
        ([1], [1], [0, 0]),
        ([1], [1], [len(PHASES)]),
        ([1], [0], [0]),
        ([1], [2], [0]),
        ([-1], [1], [0]),
        ([1], [-1], [0]),
        ([1], [1, 1], [0, 0]),
        ([1], [1, -1, -1], [0, 0, 0]),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(
    sizes: list[int], events: list[int], phases: list[int]
) -> None:
    with pytest.raises(ValueError):
        replay(np.array(sizes, np.int64), np.array(events, np.int64), np.array(phases, np.int8), EXPANDABLE)


@pytest.mark.parametrize("capacity", [0, 1, 10 * MIB])
@pytest.mark.parametrize("mode", AllocatorMode)
def test_a_tensor_larger_than_the_device_finds_no_memory(mode: AllocatorMode, capacity: int) -> None:
    with pytest.raises(OutOfDeviceMemory) as caught:
        peak(mode, [500 * MIB], [1], capacity)
    assert str(caught.value) == "no memory for 500.0 MiB at event 0"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.event_index, copy.requested_bytes) == (0, 500 * MIB)


@pytest.mark.parametrize("mode", AllocatorMode)
def test_150_000_events_are_quick(mode: AllocatorMode) -> None:
    sizes, events = random_stream(7, 150_000)
    began = time.perf_counter()
    peak(mode, sizes, events)
    assert time.perf_counter() - began < 4  # about 0.2 s on a quiet machine
