"""Depth: decoder layers repeat, so traces of a few periods answer for all of them.

Two traces whose depths differ by one period are aligned instant by instant; what the deeper one has more of are
whole periods of forward, backward and optimizer work. The bytes alive at an instant are affine in the number of
periods when the instant keeps its distance from the first period, and when it keeps its distance from the last.
So in every repeated stretch the extra period is put in the middle: what comes before keeps its distance from the
stretch's begin, what comes after that from its end. Each instant is then far from the edge that moves; near it,
something is released that a deeper model still needs (a mask, by its last user), and nothing is affine. The
periods between grow or shrink from one edge to the other, so the highest moment of a deep model lies in one of
the halves that are kept.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launcher.domain import Domain, Exponents
from launcher.planner.skyline import Instant, Profile, Skyline, build_skyline
from launcher.planner.swapping import Swapping
from launcher.planner.work import extend_tally

if TYPE_CHECKING:  # the parent process extends profiles without loading the heavy libraries
    from transformers import PretrainedConfig

GAP_RULES = (
    ((24, 0.75), (6, 1.0)),
    ((12, 0.75),),
    ((6, 0.75),),
    ((3, 1.0),),
    ((1, 1.0),),
    ((24, 0.0),),
    ((12, 0.0),),
    ((6, 0.0),),
)
"""When a gap is believed, best first: how many instants must agree after it, and which share of it must repeat what
stands before or after it. An extra period repeats its neighbours, but for what the first and the last one do
otherwise; two lists together that both grow with depth (matrices, then norms) do not. Few instants agree after a
gap where such a list, of some instants per period, follows soon."""


class DepthMismatch(Exception):
    """Two depths do not differ by repeated periods; the full depth must be traced."""


@dataclass(frozen=True)
class DepthPlan:
    """Which depths to trace, and how far to extend."""

    depths: tuple[int, ...]
    """Numbers of layers to trace: two for extension, one for the full depth."""
    steps: float
    """How many times the difference of the two is added to the shallower one."""

    def attempts(self, num_layers: int) -> Iterator[DepthPlan]:
        """This plan; one period deeper, where two periods are too few to tell what repeats; every layer at last.

        Args:
            num_layers: Of the whole model.
        """
        yield self
        if len(self.depths) == 2:
            shallow, deep = self.depths
            if 2 * deep - shallow < num_layers:
                yield DepthPlan((deep, 2 * deep - shallow), self.steps - 1)
            yield DepthPlan((num_layers,), 0.0)


LAYER_STEPS = ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "expert_layer_period")
"""Config keys that say every how many layers a layer has experts."""
FIRST_LAYERS = ("first_k_dense_replace", "moe_layer_start_index")
"""Config keys that say how many of the first layers have none."""


def layer_period(config: PretrainedConfig) -> tuple[int, int]:
    """The layer pattern (sliding and full attention, dense and sparse layers): what comes first, and what repeats.

    Returns:
        Number of first layers outside the pattern, and the smallest period of all others.
    """
    depth = int(config.num_hidden_layers)
    patterns = list(_per_layer_lists(config).values())
    step = math.lcm(*(_count(config, name) or 1 for name in LAYER_STEPS))
    start = max(_count(config, name) for name in FIRST_LAYERS)
    for prefix in (start, *range(start + 1, min(depth, 4))):
        repeats = 2 if prefix == start else 3  # what nobody announced has to be plainer to see
        for period in range(step, (depth - prefix) // repeats + 1, step):
            if all(p[i] == p[i + period] for p in patterns for i in range(prefix, depth - period)):
                return prefix, period
    return 0, depth


def _count(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and 0 < value <= config.num_hidden_layers else 0


def _per_layer_lists(config: PretrainedConfig) -> dict[str, list[object]]:
    depth = config.num_hidden_layers
    return {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }


def plan_depths(config: PretrainedConfig) -> DepthPlan:
    """Chooses the depths to trace: two and three periods (and what is left of an incomplete one)."""
    depth = config.num_hidden_layers
    prefix, period = layer_period(config)
    rest = prefix + (depth - prefix) % period
    shallow, deep = (
        (rest + 2 * period, rest + 3 * period) if period < 4 else (rest + period, rest + 2 * period)
    )
    if deep >= depth:
        return DepthPlan((depth,), 0.0)
    return DepthPlan((shallow, deep), (depth - shallow) / period)


def truncate(config: PretrainedConfig, depth: int) -> None:
    """Cuts a config (in place, it is the caller's own copy) to its first `depth` layers."""
    lists = _per_layer_lists(config)
    for name, value in lists.items():
        setattr(config, name, value[:depth])
    config.num_hidden_layers = depth


def extend(shallow: Profile, deep: Profile, steps: float) -> Profile:
    """Extends a profile to the full depth.

    Args:
        shallow: Profile of the shallower trace.
        deep: Profile of the trace with one period more.
        steps: How many times the difference is added to the shallower one.

    Raises:
        DepthMismatch: When the traces do not differ by repeated periods.
    """
    exponents = tuple(sorted(set(shallow.exponents) | set(deep.exponents)))
    below, above = _spread(shallow, exponents), _spread(deep, exponents)
    left, right = _signatures(shallow.instants, deep.instants)
    live = below + steps * (above[match(left, right)] - below)
    resident = {
        category: _extend_polynomial(size, deep.resident[category], steps)
        for category, size in shallow.resident.items()
    }
    host = None
    if shallow.host is not None and deep.host is not None:
        host = extend(shallow.host, deep.host, steps)
    pinned = extended_blocks(shallow.pinned, deep.pinned, steps)
    disk = {
        name: round(size + steps * (deep.disk_bytes[name] - size))
        for name, size in shallow.disk_bytes.items()
    }
    return Profile(
        shallow.instants,
        exponents,
        live,
        resident,
        shallow.batch_inputs,
        host=host,
        disk_bytes=disk,
        work=extend_tally(shallow.work, deep.work, steps),
        pinned=pinned,
        swapping=extended_swapping(shallow.swapping, deep.swapping, steps),
    )


def extended_swapping(low: Swapping | None, high: Swapping | None, steps: float) -> Swapping | None:
    """What is swapped to NVMe at full depth; None where nothing is.

    Raises:
        DepthMismatch: When two depths do not tell.
    """
    if low is None or high is None:
        return None
    whole = replace(
        low,
        groups_bytes=extended_blocks(low.groups_bytes, high.groups_bytes, steps),
        locked_bytes=extended_blocks(low.locked_bytes, high.locked_bytes, steps),
        files_bytes=extended_blocks(low.files_bytes, high.files_bytes, steps),
    )
    if reason := whole.why_not_extended(low, high, steps):
        raise DepthMismatch(reason)
    return whole


def extended_blocks(low: Sequence[int], high: Sequence[int], steps: float) -> tuple[int, ...]:
    """Sizes of pinned blocks at full depth: each larger, or those of one period more for each step, or some of both.

    Raises:
        DepthMismatch: When a block of the deeper trace is neither.
    """
    if len(low) == len(high):
        return tuple(round(size + steps * (other - size)) for size, other in zip(low, high, strict=True))
    shrunk, gained = Counter(low) - Counter(high), Counter(high) - Counter(low)
    repeated = [size for size in gained.elements() if size in low]
    smaller, larger = list(shrunk.elements()), [size for size in gained.elements() if size not in low]
    if len(smaller) != len(larger) or not float(steps).is_integer():
        raise DepthMismatch(f"{len(low)} and {len(high)} pinned blocks")
    grown = [round(size + steps * (other - size)) for size, other in zip(smaller, larger, strict=True)]
    return (*(Counter(low) - shrunk).elements(), *round(steps) * repeated, *grown)


def _signatures(*traces: Sequence[Instant]) -> list[list[int]]:
    """What happens at each instant, for each of several traces.

    A size that an operation has in one trace and in another not grows with depth (what engines gather over all layers),
    and does not tell instants apart.
    """
    known: list[defaultdict[object, set[object]]] = []
    for instants in traces:
        known.append(defaultdict(set))
        for instant in instants:
            known[-1][instant.signature, instant.phase] |= instant.sizes

    def telling(instant: Instant) -> frozenset[object]:
        own = instant.signature, instant.phase
        return instant.sizes.intersection(*(sizes[own] for sizes in known))

    return [
        [hash((instant.signature, instant.phase, telling(instant))) for instant in instants]
        for instants in traces
    ]


def match(short: Sequence[int], long: Sequence[int]) -> list[int]:
    """Matches every element of `short` to one of `long`, in order, leaving out the middles of repeated stretches.

    Raises:
        DepthMismatch: When no such matching is found.
    """
    late = align(short, long)
    early = [len(long) - 1 - j for j in reversed(align(short[::-1], long[::-1]))]
    matches = meet_in_the_middle([*late, len(long)], [*early, len(long)])[:-1]
    if any(short[i] != long[j] for i, j in enumerate(matches)):
        raise DepthMismatch(
            f"{len(short)} and {len(long)} instants match from the front or from the back, not both"
        )
    return matches


def align(short: Sequence[int], long: Sequence[int]) -> list[int]:
    """Matches every element of `short` to one of `long`, in order, leaving out whole stretches of `long`.

    A stretch is left out as late as possible: elements are matched one to one until they differ.

    Raises:
        DepthMismatch: When no such matching is found.
    """
    matches: list[int] = []
    j = 0
    for i in range(len(short)):
        if j >= len(long) or short[i] != long[j]:
            j += _gap(short, i, long, j)
        matches.append(j)
        j += 1
    return matches


def meet_in_the_middle(late: Sequence[int], early: Sequence[int]) -> list[int]:
    """Joins two matchings: where they differ, the first half is matched late and the second half early.

    One element out of its place, in the first or the last period, makes a matching leave out a stretch in pieces.
    So a stretch is from one point to the next at which both have left out equally much.

    Args:
        late: For each element its match when stretches are left out as late as possible.
        early: The same, when they are left out as early as possible.
    """
    leaving, reaching = _left_out(late), _left_out(early)
    joined: list[int] = []
    before = 0
    for total in sorted(leaving.keys() & reaching.keys()):
        late_begins = min(i for left_out, i in leaving.items() if left_out > before)
        middle = (reaching[total] + late_begins) // 2
        joined += range(len(joined) + before, middle + before)
        before = total
    joined += range(len(joined) + before, len(late) + before)
    return joined


def _left_out(matches: Sequence[int]) -> dict[int, int]:
    """How many elements are left out in total, at each index from which on they are more than before."""
    totals = [j - i for i, j in enumerate(matches)]
    return {
        total: i for i, (total, last) in enumerate(zip(totals, [0, *totals], strict=False)) if total > last
    }


def _gap(short: Sequence[int], at: int, long: Sequence[int], begin: int) -> int:
    """How many instants to leave out of `long` at `begin`, so that it goes on as `short` does at `at`."""
    left = len(short) - at, len(long) - begin
    last = len(long) - left[0]  # what is left of the shallower trace must still find room
    follows = [end for end in range(begin + 1, last + 1) if long[end] == short[at]]
    agreeing = {end: _agreeing(short, at, long, end) for end in follows}
    for rules in GAP_RULES:
        for end in follows:
            for window, share in rules:
                agrees = agreeing[end] >= min(window, left[0])
                if agrees and (not share or _repeated_share(long, begin, end) >= share):
                    return end - begin
    raise DepthMismatch(f"{left[0]} instants left of the shallower trace, {left[1]} of the deeper one")


def _agreeing(short: Sequence[int], at: int, long: Sequence[int], end: int) -> int:
    """How many instants agree from two places on, counted to the largest number that a rule asks for."""
    most = min(GAP_RULES[0][0][0], len(short) - at, len(long) - end)
    return next((i for i in range(most) if short[at + i] != long[end + i]), most)


def _repeated_share(long: Sequence[int], begin: int, end: int) -> float:
    """The share of a stretch that is found in as many instants before or after it, in whatever order."""
    inside = Counter(long[begin:end])
    neighbors = (long[max(0, 2 * begin - end) : begin], long[end : 2 * end - begin])
    return max((inside & Counter(neighbor)).total() for neighbor in neighbors) / (end - begin)


def _spread(profile: Profile, exponents: Sequence[Exponents]) -> NDArray[np.float64]:
    column = {key: index for index, key in enumerate(exponents)}
    spread = np.zeros((*profile.live.shape[:2], len(exponents)))
    spread[:, :, [column[key] for key in profile.exponents]] = profile.live
    return spread


def _extend_polynomial(
    low: Mapping[Exponents, int], high: Mapping[Exponents, int], steps: float
) -> dict[Exponents, int]:
    keys = set(low) | set(high)
    return {key: round(low.get(key, 0) + steps * (high.get(key, 0) - low.get(key, 0))) for key in keys}


def assemble(domain: Domain, profiles: Sequence[Profile], steps: float, accumulation: int) -> Skyline:
    """The skyline of a full-depth profile, or of two shallow ones extended to the full depth.

    Args:
        domain: Shapes for which the traces hold.
        profiles: One profile of the full depth, or the shallower and the deeper one.
        steps: How many times the difference of the two is added to the shallower one.
        accumulation: Micro batches per optimizer step in the trace.

    Raises:
        DepthMismatch: When the traces do not differ by repeated periods.
    """
    profile = profiles[0] if len(profiles) == 1 else extend(profiles[0], profiles[1], steps)
    return build_skyline(domain, profile, accumulation)


def assemble_first(
    domain: Domain,
    attempts: Iterable[DepthPlan],
    accumulation: int,
    trace: Callable[[Sequence[int]], Sequence[Profile]],
) -> tuple[Skyline, dict[int, Profile]]:
    """The skyline of the first depths that differ by repeated periods, and the profiles that it is made of, by depth.

    Args:
        domain: Shapes for which the traces hold.
        attempts: Depths, the cheapest first; the last is a single one.
        accumulation: Micro batches per optimizer step in the trace.
        trace: Traces at each of several depths; is asked for each depth once.

    Raises:
        DepthMismatch: When none of the attempts do.
    """
    known: dict[int, Profile] = {}
    reasons = []
    for attempt in attempts:
        missing = [depth for depth in attempt.depths if depth not in known]
        known |= zip(missing, trace(missing), strict=True)
        used = {depth: known[depth] for depth in attempt.depths}
        try:
            return assemble(domain, list(used.values()), attempt.steps, accumulation), used
        except DepthMismatch as mismatch:
            reasons.append(f"{attempt.depths} layers: {mismatch}")
            logging.getLogger(__name__).info("tracing deeper: %s", reasons[-1])
    raise DepthMismatch("; ".join(reasons))
