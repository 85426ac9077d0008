"""The stream of a step: every allocation and release of a traced run, in the order of time, and what can be read off it.

A skyline keeps the few moments that can be the highest, for many shapes. A stream keeps all of them, for one shape:
what an allocator sees, what is alive at a moment and which module made it, and how memory goes up and down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from launcher.memory import Category, ModuleShare, Phase, PhasePeak
from launcher.planner.blocks import FLUSH

CATEGORIES = tuple(Category)
PHASES = tuple(Phase)
LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The first number in a module's path is that of its layer; later ones are experts."""


@dataclass(frozen=True)
class Stream:
    """Every allocation and release of a run at one shape.

    Blocks are numbered in the order of their births. What lives when the run ends has no release.

    Raises:
        ValueError: When the arrays do not fit together.
    """

    sizes_bytes: NDArray[np.int64]
    """Size of each block; shape (blocks,)."""
    categories: NDArray[np.int8]
    """What each block is for, as an index into `tuple(Category)`; shape (blocks,)."""
    modules: NDArray[np.int32]
    """The module that each block was made for, as an index into `module_names`; shape (blocks,)."""
    module_names: tuple[str, ...]
    """Paths below the model, `model.layers.3.mlp.down_proj`; "" is for what no module made."""
    operations: NDArray[np.int32]
    """The operation that allocated each block, as an index into `operation_names`; shape (blocks,)."""
    operation_names: tuple[str, ...]
    """Names of operations, `aten.mm.default`."""
    events: NDArray[np.int64]
    """`i + 1`: block i is born; `-(i + 1)`: it is released; shape (events,)."""
    phases: NDArray[np.int8]
    """Phase of each event, as an index into `tuple(Phase)`; shape (events,)."""
    cuda_streams: NDArray[np.int8]
    """The CUDA stream on which each block was asked for; 0: the default one; shape (blocks,)."""

    def __post_init__(self) -> None:
        blocks, events = len(self.sizes_bytes), len(self.events)
        facts = (self.categories, self.modules, self.operations, self.cuda_streams)
        others = {len(fact) for fact in facts}
        if others != {blocks} or len(self.phases) != events:
            raise ValueError(
                f"{blocks} blocks with {others} facts; {events} events with {len(self.phases)} phases"
            )
        births = self.events[self.events > 0]
        if not np.array_equal(births, np.arange(1, blocks + 1)):
            raise ValueError(f"{blocks} blocks, but {len(births)} births, or births out of order")


def flushes(stream: Stream) -> NDArray[np.bool_]:
    """Whether the allocator gives back what it holds for nothing at the birth of each block; shape (blocks,)."""
    names = np.array([name.split()[0] == FLUSH for name in stream.operation_names], dtype=bool)
    is_flush: NDArray[np.bool_] = names[stream.operations]
    return is_flush


def live_bytes(stream: Stream) -> NDArray[np.int64]:
    """Bytes alive after each event; shape (events,)."""
    return np.cumsum(_changes_bytes(stream))


def live_bytes_by_category(stream: Stream) -> NDArray[np.int64]:
    """Bytes alive after each event; shape (events, categories), in the order of `Category`."""
    changes = np.zeros((len(stream.events), len(CATEGORIES)), dtype=np.int64)
    categories = stream.categories[np.abs(stream.events) - 1]
    changes[np.arange(len(categories)), categories] = _changes_bytes(stream)
    return np.cumsum(changes, axis=0)


def _changes_bytes(stream: Stream) -> NDArray[np.int64]:
    changes: NDArray[np.int64] = np.sign(stream.events) * stream.sizes_bytes[np.abs(stream.events) - 1]
    return changes


def phase_peaks(stream: Stream) -> tuple[PhasePeak, ...]:
    """The highest moment of each phase, the earliest of equals; phases without a birth are left out."""
    total = live_bytes(stream)
    peaks = []
    for number, phase in enumerate(PHASES):
        births = np.flatnonzero((stream.phases == number) & (stream.events > 0))
        if len(births):
            event = int(births[total[births].argmax()])
            amounts = bytes_by_category(stream, event)
            peaks.append(PhasePeak(phase, int(total[event]), amounts))
    return tuple(peaks)


def bytes_by_category(stream: Stream, event: int) -> Mapping[Category, int]:
    """Bytes alive right after an event, by category."""
    alive = blocks_alive(stream, event)
    sums = np.bincount(stream.categories[alive], weights=stream.sizes_bytes[alive], minlength=len(CATEGORIES))
    return {category: int(value) for category, value in zip(CATEGORIES, sums, strict=True)}


def highest_event(stream: Stream) -> int:
    """Index of the event after which most bytes are alive; the earliest of equals."""
    return int(live_bytes(stream).argmax())


def blocks_alive(stream: Stream, event: int) -> NDArray[np.int64]:
    """Numbers of the blocks that are alive right after an event, in the order of birth."""
    past = stream.events[: event + 1]
    alive = np.zeros(len(stream.sizes_bytes), dtype=bool)
    alive[past[past > 0] - 1] = True
    alive[-past[past < 0] - 1] = False
    return np.flatnonzero(alive)


def top_modules(stream: Stream, event: int, count: int) -> tuple[ModuleShare, ...]:
    """The modules with most bytes alive right after an event, largest first."""
    alive = blocks_alive(stream, event)
    number = len(stream.module_names)
    sums = np.bincount(stream.modules[alive], weights=stream.sizes_bytes[alive], minlength=number)
    counts = np.bincount(stream.modules[alive], minlength=number)
    order = np.argsort(-sums, kind="stable")[:count]
    return tuple(
        ModuleShare(stream.module_names[i], int(sums[i]), int(counts[i])) for i in order if counts[i]
    )


def next_highest_event(stream: Stream, valley_bytes: int) -> int | None:
    """The highest moment of another hill than the peak's; the earliest of equals.

    Two conditions make it another hill. On the way to the peak memory falls at least `valley_bytes` below it, as a
    summit counts as one of its own when it stands out from the saddle that joins it to a higher one; without that
    the answer is the moment beside the peak. And what allocates there, an operation of a module in whatever layer,
    allocates nothing within `valley_bytes` of the peak; without that it is the peak again, one layer or one micro
    batch on.

    Args:
        stream: The stream.
        valley_bytes: How deep the valley between the two is at least; a tenth of the peak is a good measure.

    Returns:
        Index of its event; None when the stream has one hill only.
    """
    total, births = live_bytes(stream), stream.events > 0
    peak = int(total.argmax())
    lowest_between = np.concatenate(
        [np.minimum.accumulate(total[: peak + 1][::-1])[::-1], np.minimum.accumulate(total[peak:])[1:]]
    )
    makers = _makers(stream)
    on_the_hill = lowest_between > total[peak] - valley_bytes
    repeats = np.isin(makers, makers[on_the_hill & births])
    is_apart = total - lowest_between >= valley_bytes
    others = np.flatnonzero(births & is_apart & ~repeats)
    return int(others[total[others].argmax()]) if len(others) else None


def _makers(stream: Stream) -> NDArray[np.int64]:
    """A number for each event's block: equal for the same operation of the same module in whatever layer."""
    paths = [LAYER.sub("*", name, count=1) for name in stream.module_names]
    numbers = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    blocks = np.abs(stream.events) - 1
    modules = np.array([numbers[path] for path in paths], dtype=np.int64)[stream.modules[blocks]]
    makers: NDArray[np.int64] = modules * len(stream.operation_names) + stream.operations[blocks]
    return makers


def in_order_of_births(
    events: NDArray[np.int64], phases: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Puts the releases between two births (of one phase) in the order in which their blocks were born.

    Their own order can hang on addresses (autocast's cache is a hash table), and nothing hangs on it: what is alive
    at the next birth, and what an allocator has free by then, are the same for every order.

    Args:
        events: As in `Stream`.
        phases: As in `Stream`.
    """
    begins = (events > 0) | (np.diff(phases, prepend=phases[:1]) != 0)
    order = np.lexsort((np.abs(events), events < 0, np.cumsum(begins)))
    return events[order], phases[order]


def with_waiting_inputs(stream: Stream, count: int) -> Stream:
    """Adds the inputs of more micro batches, which wait in the training loop for their turn.

    A trace has at most two micro batches per optimizer step. The trainer fetches all of a step before the first one
    runs, and lets go of all of them together; the passes of the others allocate what those of the second one do.
    In every step the inputs fetched last are taken `count` times more.

    Args:
        stream: Stream of a trace with two micro batches per step.
        count: Further micro batches.
    """
    places: list[int] = []
    added: list[int] = []
    origins = list(range(len(stream.sizes_bytes)))
    release_of = {-event: place for place, event in enumerate(stream.events.tolist()) if event < 0}
    for birth, batch in _last_inputs_of_steps(stream):
        for number in [number for _ in range(count) for number in batch.tolist()]:
            origins.append(number - 1)
            places.append(birth + 1)
            added.append(len(origins))
            if number in release_of:
                places.append(release_of[number] + 1)
                added.append(-len(origins))
    events = np.insert(stream.events, places, added)
    phases = np.insert(stream.phases, places, stream.phases[np.array(places, dtype=np.int64) - 1])
    births = events[events > 0]
    numbers = np.zeros(len(births), dtype=np.int64)
    numbers[births - 1] = np.arange(1, len(births) + 1)
    events, phases = in_order_of_births(np.sign(events) * numbers[np.abs(events) - 1], phases)
    blocks = np.array(origins)[births - 1]
    return replace(
        stream,
        sizes_bytes=stream.sizes_bytes[blocks],
        categories=stream.categories[blocks],
        modules=stream.modules[blocks],
        operations=stream.operations[blocks],
        events=events,
        phases=phases,
        cuda_streams=stream.cuda_streams[blocks],
    )


def _last_inputs_of_steps(stream: Stream) -> list[tuple[int, NDArray[np.int64]]]:
    """For every optimizer step where the last blocks of the inputs that it fetched last are born, and the blocks.

    The inputs of a step are released together; those of one micro batch are born without anything in between.
    A batch that the loader fetched ahead, and no step took, is alone.
    """
    events, blocks = stream.events, np.abs(stream.events) - 1
    training = stream.phases == PHASES.index(Phase.TRAIN_STEP)
    is_input = stream.categories[blocks] == CATEGORIES.index(Category.INPUTS)
    births_before = np.cumsum(events > 0)
    released = np.zeros(len(stream.sizes_bytes), dtype=np.int64)
    released[blocks[events < 0]] = births_before[events < 0]
    places = np.flatnonzero(is_input & training & (events > 0))
    fetched: dict[int, list[NDArray[np.int64]]] = {}
    for batch in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        if len(batch):
            fetched.setdefault(int(released[blocks[batch[0]]]), []).append(batch)
    whole = max(map(len, fetched.values()), default=0)
    return [(int(step[-1][-1]), events[step[-1]]) for step in fetched.values() if len(step) == whole]
