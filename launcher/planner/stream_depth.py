"""Streams over depth: the full list of allocations of a deep model, from those of two shallow ones.

The events of two traces that differ by one period are aligned as depth.py aligns instants, each stretch that the
deeper trace has more of is repeated as often as the full depth asks, and everything that depends on the depth is an
integer that is affine in the number of periods and in the position among them:

- the layer in a module's path;
- which block a release means. It is written as a rank: how many live blocks of the same kind are younger. Blocks
  released in reverse (backward frees what forward kept) have a constant rank, those released in the order of their
  births (a list that is worked off from its front) one that shrinks by a constant from period to period;
- the size of what is gathered over all layers (a stack of norms).

Played in the order of time, the ranks say which birth each release belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.memory import PhasePeak
from launcher.planner.depth import DepthMismatch, match
from launcher.planner.stream import LAYER, Stream, phase_peaks

SMALL_BYTES = 1 << 16
"""Sizes up to this do not tell kinds of blocks apart: those of stacked norms grow with depth."""
PEAK_TOLERANCE = 1e-3
"""Share by which the peaks of a stream and of the skyline from the same traces may differ."""

Integers = NDArray[np.int64]
_Description = tuple[int, int, tuple[str, int, str], str]


@dataclass(frozen=True)
class _Trace:
    """The events of a stream, written so that the depth shows in integers only; every field is of shape (events,)."""

    kinds: Integers
    """What happens to which kind of block; equal numbers in both traces mean the same, whatever the depth."""
    block_kinds: Integers
    """The kind of block alone."""
    ranks: Integers
    """Live blocks of the same kind that are younger than the one released; 0 at births."""
    layers: Integers
    """Layer of the block's module; 0 without one."""
    sizes_bytes: Integers
    """Size of the block."""


@dataclass(frozen=True)
class _Weave:
    """How the events of the full depth come from those of two traces."""

    matches: Integers
    """For each event of the shallower trace its match in the deeper one; shape (shallow events,)."""
    stretches: tuple[tuple[int, int], ...]
    """Begin and end of each stretch of events of the deeper trace that match none; these are repeated."""
    steps: int
    """How often."""
    neighbors: Integers
    """For each event of a stretch the like event one period away that is matched, or -1; shape (deep events,)."""
    sources: Integers
    """For each event of the full depth the event of the deeper trace that it is like; shape (events,)."""
    copies: Integers
    """For each event of the full depth the number of the repetition, from 1; 0 outside of stretches; (events,)."""


def extend_stream(shallow: Stream, deep: Stream, steps: int, period: int) -> Stream:
    """The stream of the full depth.

    Args:
        shallow: Stream of the shallower trace.
        deep: Stream of the trace with one period more.
        steps: How many periods the full depth has more than the shallower trace.
        period: Layers of one period.

    Raises:
        DepthMismatch: When the traces do not differ by repeated periods.
    """
    known: dict[object, int] = {}
    telling = set(_descriptions(shallow, period)) & set(_descriptions(deep, period))
    low, high = _read(shallow, period, known, telling), _read(deep, period, known, telling)
    weave = _weave(low.kinds, high.kinds, steps)
    births = deep.events[weave.sources] > 0
    born = np.abs(deep.events[weave.sources[births]]) - 1
    ranks = _interpolate(weave, low.ranks, high.ranks)
    layers = _interpolate(weave, low.layers, high.layers)
    sizes_bytes = _interpolate(weave, low.sizes_bytes, high.sizes_bytes)
    names, modules = _rename(deep.module_names, deep.modules[born], layers[births])
    return Stream(
        sizes_bytes=sizes_bytes[births],
        categories=deep.categories[born],
        modules=modules,
        module_names=names,
        operations=deep.operations[born],
        operation_names=deep.operation_names,
        events=_play(births, high.block_kinds[weave.sources], ranks),
        phases=deep.phases[weave.sources],
        cuda_streams=deep.cuda_streams[born],
    )


def _read(stream: Stream, period: int, known: dict[object, int], telling: Container[_Description]) -> _Trace:
    """Reads the events of a stream; `known` numbers the kinds, and grows.

    Sizes tell kinds apart that both traces have for the same operation. One that a single trace has is that of something
    that spans all layers (a flat buffer of all weights, a rank's part of it), and grows with depth.
    """
    layer_of_module = np.array([_split_path(name)[1] for name in stream.module_names])
    kind_of_block = []
    for description in _descriptions(stream, period):
        size, *rest = description
        tells = size > SMALL_BYTES and description in telling
        kind_of_block.append(known.setdefault((size if tells else 0, *rest), len(known)))
    live: dict[int, list[int]] = {}
    kinds, ranks = [], []
    for event, phase in zip(stream.events.tolist(), stream.phases.tolist(), strict=True):
        block = abs(event) - 1
        kind = kind_of_block[block]
        kinds.append(known.setdefault((kind, phase, event > 0), len(known)))
        same = live.setdefault(kind, [])
        if event > 0:
            same.append(block)
            ranks.append(0)
        else:
            position = same.index(block)
            ranks.append(len(same) - 1 - position)
            del same[position]
    blocks = np.abs(stream.events) - 1
    return _Trace(
        kinds=np.array(kinds),
        block_kinds=np.array(kind_of_block)[blocks],
        ranks=np.array(ranks),
        layers=layer_of_module[stream.modules[blocks]],
        sizes_bytes=stream.sizes_bytes[blocks],
    )


def _descriptions(stream: Stream, period: int) -> list[_Description]:
    """Size, category, place in a period and operation of each block."""
    paths = [_split_path(name) for name in stream.module_names]
    places = [(before, layer % period, after) for before, layer, after in paths]
    return list(
        zip(
            stream.sizes_bytes.tolist(),
            stream.categories.tolist(),
            [places[module] for module in stream.modules.tolist()],
            [stream.operation_names[operation] for operation in stream.operations.tolist()],
            strict=True,
        )
    )


def _split_path(path: str) -> tuple[str, int, str]:
    """What stands before the layer's number, the number, and what stands after it."""
    found = LAYER.search(path)
    if found is None:
        return path, 0, ""
    return path[: found.start()], int(found.group()), path[found.end() :]


def _weave(short: Integers, long: Integers, steps: int) -> _Weave:
    matches = np.array(match(short.tolist(), long.tolist()))
    edges = np.array([-1, *matches, len(long)])
    gaps = np.flatnonzero(np.diff(edges) > 1)
    stretches = tuple((int(edges[gap]) + 1, int(edges[gap + 1])) for gap in gaps)
    is_matched = np.zeros(len(long), dtype=bool)
    is_matched[matches] = True
    neighbors = np.full(len(long), -1)
    sources, copies, done = [], [], 0
    for begin, end in stretches:
        neighbors[begin:end] = _neighbors(long, is_matched, begin, end)
        sources += [np.arange(done, begin), np.tile(np.arange(begin, end), steps)]
        copies += [np.zeros(begin - done, dtype=np.int64), np.repeat(np.arange(1, steps + 1), end - begin)]
        done = end
    sources.append(np.arange(done, len(long)))
    copies.append(np.zeros(len(long) - done, dtype=np.int64))
    return _Weave(matches, stretches, steps, neighbors, np.concatenate(sources), np.concatenate(copies))


def _neighbors(kinds: Integers, is_matched: NDArray[np.bool_], begin: int, end: int) -> Integers:
    """The like events one period before or after a stretch, as far as the trace is periodic around it."""
    length = end - begin
    first, last = begin, end
    while first > 0 and is_matched[first - 1] and kinds[first - 1] == kinds[first - 1 + length]:
        first -= 1
    while last < len(kinds) and is_matched[last] and kinds[last] == kinds[last - length]:
        last += 1
    inside = np.arange(begin, end)
    after = np.where(inside + length < last, inside + length, -1)
    return np.where(inside - length >= first, inside - length, after)


def _interpolate(weave: _Weave, low: Integers, high: Integers) -> Integers:
    """A value of every event of the full depth, from its values in two traces.

    In a stretch it is `first + by_copy * copy + by_step * steps`. Copy 0 is the period before the stretch and copy
    `steps + 1` the one after it, so a neighbour in one of them, known at both depths, tells all three.

    Args:
        weave: How the events come from those of the traces.
        low: Values in the shallower trace; shape (shallow events,).
        high: Values in the deeper trace; shape (deep events,).

    Raises:
        DepthMismatch: When no event of a stretch has a neighbour.
    """
    first, by_copy, by_step = np.zeros_like(high), np.zeros_like(high), np.zeros_like(high)
    shallow = np.zeros_like(high)
    shallow[weave.matches] = low
    first[weave.matches], by_step[weave.matches] = low, high[weave.matches] - low
    for begin, end in weave.stretches:
        inside = np.arange(begin, end)
        other = weave.neighbors[begin:end]
        known = other >= 0
        if not known.any():
            raise DepthMismatch(f"nothing is like events {begin} to {end} of the deeper trace")
        slope = np.sign(other - inside) * (high[other] - high[inside])
        rest = np.where(other < inside, high[other], high[inside]) - shallow[other]
        if not known.all():  # they stand where the first or the last period differs: as most of the others do
            pairs = zip(slope[known].tolist(), rest[known].tolist(), strict=True)
            slope[~known], rest[~known] = Counter(pairs).most_common(1)[0][0]
        by_copy[begin:end], by_step[begin:end] = slope, rest
        first[begin:end] = high[inside] - slope - rest
    return first[weave.sources] + by_copy[weave.sources] * weave.copies + by_step[weave.sources] * weave.steps


def _play(births: NDArray[np.bool_], block_kinds: Integers, ranks: Integers) -> Integers:
    """Numbers the blocks, and finds the one of each release by its rank."""
    live: dict[int, list[int]] = {}
    events: list[int] = []
    num_blocks = 0
    for birth, kind, rank in zip(births.tolist(), block_kinds.tolist(), ranks.tolist(), strict=True):
        same = live.setdefault(kind, [])
        if birth:
            num_blocks += 1
            same.append(num_blocks)
            events.append(num_blocks)
        elif 0 <= rank < len(same):
            events.append(-same.pop(-1 - rank))
        else:
            raise DepthMismatch(
                f"event {len(events)} releases one of {len(same)} blocks that has {rank} younger ones"
            )
    return np.array(events, dtype=np.int64)


def _rename(
    known: tuple[str, ...], modules: NDArray[np.int32], layers: Integers
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Puts the right layers into the paths of modules; returns all names, and the index of each block's."""
    pairs, index = np.unique(np.stack([modules, layers]), axis=1, return_inverse=True)
    names = []
    for module, layer in pairs.T.tolist():
        before, _, after = _split_path(known[module])
        names.append(f"{before}{layer}{after}" if LAYER.search(known[module]) else before)
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return tuple(numbers), np.array([numbers[name] for name in names], dtype=np.int32)[index.reshape(-1)]


def check_peaks(stream: Stream, peaks: Iterable[PhasePeak]) -> None:
    """Compares a stream with the peaks of the skyline that comes from the same traces.

    Raises:
        DepthMismatch: When they differ.
    """
    wanted = {peak.phase: peak.allocated_bytes for peak in peaks}
    for peak in phase_peaks(stream):
        if abs(peak.allocated_bytes - wanted[peak.phase]) > PEAK_TOLERANCE * wanted[peak.phase]:
            raise DepthMismatch(f"{peak.phase.value}: {peak.allocated_bytes} bytes, not {wanted[peak.phase]}")
