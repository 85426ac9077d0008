"""What a search rejected: plans one by one, and runs of plans that differ in their micro batch alone.

A search may weigh a hundred thousand plans of which a person reads ten. Of a run it keeps two numbers per plan; the plan
and its reason are written out when somebody looks at them. The order, the counts and the nearest need the numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import overload

import numpy as np

from launcher.plan import ManyRejections, Plan, Rejection
from launcher.planner.group import Group, shapeless

Order = tuple[int, int]
"""When something was rejected: what was rejected together has one number, and each plan of it its micro batch."""
WRITTEN_OUT = 2_000
"""As many rejections are written out when the search ends; of more each is when somebody looks at it."""


@dataclass(frozen=True)
class Run:
    """Plans of a group that were rejected alike."""

    group: Group
    """The plans, at least one."""
    shorts: tuple[int, ...]
    """Of each, bytes by which it exceeds the budget, at least; see `Rejection`."""
    peaks: tuple[int, ...]
    """Of each, its device peak, bytes, at least; 0 for plans that were not priced."""
    reason: Callable[[Plan, int], str]
    """Why not, of a plan and its peak."""
    is_priced: bool = False
    """Whether the peaks are those of the plans."""
    is_bound: bool = False
    """Whether the peaks are lower bounds that traces of other plans gave."""
    is_refused: bool = False
    is_unexplored: bool = False
    is_host_short: bool = False

    @property
    def is_off_device(self) -> bool:
        """See `Rejection`; of what NVMe lacks each is a rejection of its own."""
        return self.is_host_short

    def __len__(self) -> int:
        return len(self.shorts)

    @cached_property
    def nearest(self) -> int | None:
        """Place of the plan that exceeds its budget by least; None where none does."""
        least = min((size for size in self.shorts if size > 0), default=0)
        return self.shorts.index(least) if least else None

    def item(self, place: int) -> Rejection:
        """One of the rejections, written out."""
        plan = self.group.plan(self.group.splits[place])
        peak, short = self.peaks[place], self.shorts[place]
        flags = self.is_refused, self.is_unexplored, self.is_host_short
        return Rejection(plan, self.reason(plan, peak), short, peak, None, *flags)

    def place(self, plan: Plan) -> int:
        """Where a plan with the knobs of the group is; -1 where it is not."""
        split = plan.micro_batch_size, plan.gradient_accumulation_steps
        return self.group.splits.index(split) if split in self.group.splits else -1

    def part(self, begin: int, end: int) -> Run:
        """Some of the plans."""
        return replace(
            self,
            group=replace(self.group, splits=self.group.splits[begin:end]),
            shorts=self.shorts[begin:end],
            peaks=self.peaks[begin:end],
        )


class RejectionLog:
    """What was rejected so far, in the order in which that was found."""

    def __init__(self) -> None:
        self._entries: dict[Order, Rejection | Run] = {}
        self._singles: dict[Plan, Order] = {}
        self._runs: dict[Plan, list[Order]] = {}
        self._queue: list[tuple[tuple[bool, bool, int], Order]] | None = None
        self._count = 0

    def append(self, item: Rejection) -> None:
        """Adds one plan."""
        self._count += 1
        self._put((self._count, 0), item)

    def extend(self, run: Run) -> None:
        """Adds plans that were rejected alike."""
        self._count += 1
        self._put((self._count, run.group.splits[0][0]), run)

    def run_of(self, plan: Plan) -> Run | None:
        """The run that has a plan; None where it was not rejected with others."""
        order = self._order_of_run(plan)
        return None if order is None else self._run(order)

    def peak_bytes(self, plan: Plan) -> int:
        """What a plan that was rejected with others needs at least; 0 when nobody knows."""
        run = self.run_of(plan)
        return 0 if run is None else run.peaks[run.place(plan)]

    def nearest(self) -> Rejection | None:
        """The plan that exceeds its budget by least, of equals the first one; see `plan.nearest`."""
        if self._queue is None:
            self._queue = [
                (_nearness(entry), order) for order, entry in self._entries.items() if _is_short(entry)
            ]
            heapify(self._queue)
        while self._queue:
            nearness, order = self._queue[0]
            entry = self._entries.get(order)
            if entry is not None and _is_short(entry) and _nearness(entry) == nearness:
                return entry.item(entry.nearest or 0) if isinstance(entry, Run) else entry
            heappop(self._queue)  # it was removed, or cut
        return None

    def remove(self, plan: Plan) -> None:
        """Forgets a plan."""
        order = self._order_alone(plan)
        del self._entries[order], self._singles[plan]

    def set_unexplored(self, plan: Plan) -> None:
        """Says of a plan that nobody knows by how much it exceeds the budget."""
        order = self._order_alone(plan)
        item = self._entries[order]
        assert isinstance(item, Rejection)  # it stands alone now
        self._put(order, replace(item, is_unexplored=True))

    def of_job(self, plan: Plan) -> list[Rejection]:
        """Rejected plans that make the same result as a plan."""
        wanted = plan.method, plan.max_length, plan.rank
        found: list[Rejection] = []
        for entry in self._in_order():
            like = entry.plan if isinstance(entry, Rejection) else entry.group.like
            if (like.method, like.max_length, like.rank) == wanted:
                found += _items(entry)
        return found

    def written_out(self) -> Iterator[Rejection]:
        """Each of them."""
        return (item for entry in self._in_order() for item in _items(entry))

    def ordered(self, first: Rejection | None = None, *, has_plan: bool = True) -> Sequence[Rejection]:
        """All of them, nearest to fitting first, of those that fit what was priced.

        Args:
            first: One that comes before its equals; None: there is none.
            has_plan: Whether a plan was found; without, what no engine can carry out is not near to one, and comes last.
        """
        found = Rejections([*([] if first is None else [first]), *self._in_order()], has_plan=has_plan)
        return found if len(found) > WRITTEN_OUT else tuple(found)

    def __len__(self) -> int:
        return sum(len(entry) if isinstance(entry, Run) else 1 for entry in self._entries.values())

    def _in_order(self) -> list[Rejection | Run]:
        return [self._entries[order] for order in sorted(self._entries)]

    def _put(self, order: Order, entry: Rejection | Run) -> None:
        self._entries[order] = entry
        if isinstance(entry, Rejection):
            self._singles[entry.plan] = order
        else:
            self._runs.setdefault(entry.group.like, []).append(order)
        if self._queue is not None and _is_short(entry):
            heappush(self._queue, (_nearness(entry), order))

    def _run(self, order: Order) -> Run:
        run = self._entries[order]
        assert isinstance(run, Run)
        return run

    def _order_of_run(self, plan: Plan) -> Order | None:
        orders = self._runs.get(shapeless(plan), ()) if self._runs else ()
        return next((order for order in orders if self._run(order).place(plan) >= 0), None)

    def _order_alone(self, plan: Plan) -> Order:
        """Where a plan stands alone, from now on."""
        order = self._order_of_run(plan)
        if order is None:
            return self._singles[plan]
        run = self._run(order)
        place = run.place(plan)
        del self._entries[order]
        self._runs[run.group.like].remove(order)
        for part in (run.part(0, place), run.part(place + 1, len(run))):
            if len(part):
                self._put((order[0], part.group.splits[0][0]), part)
        alone = order[0], plan.micro_batch_size
        self._put(alone, run.item(place))
        return alone


def _items(entry: Rejection | Run) -> list[Rejection]:
    return [entry] if isinstance(entry, Rejection) else [entry.item(place) for place in range(len(entry))]


def _is_short(entry: Rejection | Run) -> bool:
    """Whether a plan exceeds its budget, or one of many does, and somebody knows by how much."""
    return not entry.is_unexplored and _least_short(entry) > 0


def _nearness(entry: Rejection | Run) -> tuple[bool, bool, int]:
    return not entry.is_refused, entry.is_off_device, _least_short(entry)


def _least_short(entry: Rejection | Run) -> int:
    if isinstance(entry, Rejection):
        return entry.short_by_bytes
    return 0 if entry.nearest is None else entry.shorts[entry.nearest]


class Rejections(ManyRejections):
    """All that a search rejected, nearest to fitting first; each is written out when it is looked at."""

    def __init__(self, entries: Sequence[Rejection | Run], *, has_plan: bool = True) -> None:
        self._entries = tuple(entries)
        self._has_plan = has_plan
        self._sizes = [len(entry) if isinstance(entry, Run) else 1 for entry in self._entries]

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """Of each rejection its entry and its place there."""
        keys: list[tuple[bool, bool, bool, int, bool]] = []
        for entry in self._entries:
            flags = entry.is_unexplored, entry.is_off_device
            if isinstance(entry, Rejection):
                pairs = [(entry.short_by_bytes, entry.peak_bytes)]
            else:
                pairs = list(zip(entry.shorts, entry.peaks, strict=True))
            keys += [(not self._has_plan and not short, *flags, short, not peak) for short, peak in pairs]
        columns = np.array(keys, dtype=np.int64).reshape(-1, 5).T
        order = np.lexsort(columns[::-1])
        begins = np.cumsum([0, *self._sizes])
        entries = np.searchsorted(begins, order, side="right") - 1
        return list(zip(entries.tolist(), (order - begins[entries]).tolist(), strict=True))

    def __len__(self) -> int:
        return sum(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Rejection: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Rejection, ...]: ...

    def __getitem__(self, index: int | slice) -> Rejection | tuple[Rejection, ...]:
        if isinstance(index, slice):
            return tuple(self._item(*where) for where in self._order[index])
        return self._item(*self._order[index])

    def _item(self, index: int, place: int) -> Rejection:
        entry = self._entries[index]
        return entry if isinstance(entry, Rejection) else entry.item(place)

    def nearest(self) -> Rejection | None:
        """The one that exceeds its budget by least; see `plan.nearest`."""
        entries = (self._entries[index] for index in dict.fromkeys(index for index, _ in self._order))
        found = min(filter(_is_short, entries), key=_nearness, default=None)
        return found.item(found.nearest or 0) if isinstance(found, Run) else found
