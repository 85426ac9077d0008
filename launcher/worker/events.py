"""Where the recorder's events come from: what torch keeps of an allocator's work, and marks in between.

A mark says that something happened in the program between two changes of memory; its number says what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY_EVENT: Final = "[memory]"
"""What torch's profiler calls a change of an allocator's bytes."""
MARK: Final = "launcher.mark:"
MOST_ENTRIES: Final = 1_000_000
"""Entries of torch's memory history that are kept: some 150 bytes each."""
BLOCK_BYTES: Final = 512
"""What sizes of blocks are multiples of (torch 2.9 to 2.13, c10/cuda/CUDACachingAllocator.cpp, `kMinBlockSize`)."""


@dataclass(frozen=True, slots=True)
class Change:
    """A block of memory is taken (bytes above zero) or given back (below)."""

    address: int
    num_bytes: int


class EventSource(Protocol):
    """What keeps events while recording goes on."""

    def start(self) -> bool:
        """Begins to keep events; False where it can't now."""

    def mark(self, number: int) -> None:
        """Puts a mark behind what happened so far."""

    def stop(self) -> Iterable[int | Change]:
        """Ends: changes and numbers of marks, in order; nothing where not all was kept."""

    def abandon(self) -> None:
        """Ends, and reads nothing."""


class ProfilerEvents:
    """The events of torch's profiler, of one kind of device.

    It sees what the threads do that inherit its state. Autograd's thread of a GPU gives memory back where it has put that
    state aside (torch/csrc/autograd/engine.cpp, `thread_main`): it is for CPUs, where the asking thread does the work.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._profiler: Any = None

    def start(self) -> bool:
        """See `EventSource`."""
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()
        return True

    def mark(self, number: int) -> None:
        """See `EventSource`."""
        with record_function(f"{MARK}{number}"):
            pass

    def stop(self) -> list[int | Change]:
        """See `EventSource`."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        roots = profiler.profiler.kineto_results.experimental_event_tree()
        return [event for _, event in sorted(self._events(roots), key=itemgetter(0))]

    def abandon(self) -> None:
        """See `EventSource`; a process that ends while torch's profiler runs may crash on its way out (torch 2.13)."""
        self._profiler.stop()
        self._profiler = None

    def _events(self, roots: Sequence[Any]) -> Iterator[tuple[int, int | Change]]:
        waiting = list(reversed(roots))
        while waiting:
            event = waiting.pop()
            waiting.extend(reversed(event.children))
            name = event.name
            if name == MEMORY_EVENT:
                change = event.extra_fields
                if change.device.type == self._device:
                    yield event.start_time_ns, Change(change.ptr, change.alloc_size)
            elif name.startswith(MARK):
                yield event.start_time_ns, int(name.removeprefix(MARK))


class HistoryEvents:
    """The history that torch's CUDA allocator keeps of itself, whoever asks it; without stacks it costs next to nothing.

    A mark is placed by what the allocator has counted: so many blocks were given out before it, and so many came back.

    Args:
        cuda: torch.cuda.
        is_taken: Whether the history is being kept for somebody else.
    """

    def __init__(self, cuda: Any, is_taken: Callable[[], bool]) -> None:
        self._cuda = cuda
        self._is_taken = is_taken
        self._before = 0
        self._marks: list[tuple[int, int]] = []

    def start(self) -> bool:
        """See `EventSource`."""
        if self._is_taken():
            return False
        self._marks = []
        self._cuda.memory._record_memory_history(
            enabled="all", context=None, stacks="python", max_entries=MOST_ENTRIES, clear_history=True
        )
        self._before = self._num_changes()
        return True

    def mark(self, number: int) -> None:
        """See `EventSource`."""
        self._marks.append((self._num_changes() - self._before, number))

    def stop(self) -> list[int | Change]:
        """See `EventSource`."""
        entries = self._cuda.memory._snapshot()["device_traces"][self._cuda.current_device()]
        self.abandon()
        marks, self._marks = self._marks, []
        if len(entries) >= MOST_ENTRIES:
            return []
        events: list[int | Change] = []
        waiting = iter(marks)
        place, number = next(waiting, (None, 0))
        for count, change in enumerate(_changes(entries)):
            while place is not None and place <= count:
                events.append(number)
                place, number = next(waiting, (None, 0))
            events.append(change)
        while place is not None:
            events.append(number)
            place, number = next(waiting, (None, 0))
        return events

    def abandon(self) -> None:
        """See `EventSource`."""
        self._cuda.memory._record_memory_history(enabled=None)

    def _num_changes(self) -> int:
        counts = self._cuda.memory_stats()
        return int(counts["allocation.all.allocated"] + counts["allocation.all.freed"])


def _changes(entries: Iterable[dict[str, Any]]) -> Iterator[Change]:
    """Blocks that were given out and came back; a block is free when that is asked for, whatever streams still use it."""
    for entry in entries:
        if entry["action"] == "alloc":
            yield Change(entry["addr"], whole_blocks(entry["size"]))
        elif entry["action"] == "free_requested":
            yield Change(entry["addr"], -whole_blocks(entry["size"]))


def whole_blocks(num_bytes: int) -> int:
    """Bytes of the block that is given out for so many."""
    return max(1, -(-num_bytes // BLOCK_BYTES)) * BLOCK_BYTES


def cuda_history() -> HistoryEvents:
    """The history of this process's CUDA allocator."""
    return HistoryEvents(torch.cuda, lambda: bool(torch._C._cuda_isHistoryEnabled()))
