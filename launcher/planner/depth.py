"""Depth: decoder layers repeat, so traces of a few periods answer for all of them.

Two traces whose depths differ by one period are aligned instant by instant; what the deeper one has more of are
whole periods of forward, backward and optimizer work. The bytes alive at an instant are affine in the number of
periods when the instant keeps its distance from the first period, and when it keeps its distance from the last.
So every instant is extended twice, once with the extra period aligned as late as possible and once as early as
possible, and both versions count: the highest moment of a deep model lies in its first or its last period.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launcher.memory import Category
from launcher.planner.polynomial import Exponents
from launcher.planner.skyline import Instant, Profile

if TYPE_CHECKING:  # the parent process extends profiles without loading the heavy libraries
    from transformers import PretrainedConfig

WINDOW = 24
"""Instants that must agree after a gap before the gap is believed."""


class DepthMismatch(Exception):
    """Two depths do not differ by repeated periods; the full depth must be traced."""


@dataclass(frozen=True)
class DepthPlan:
    """Which depths to trace, and how far to extend."""

    depths: tuple[int, ...]
    """Numbers of layers to trace: two for extension, one for the full depth."""
    steps: float
    """How many times the difference of the two is added to the shallower one."""


def layer_period(config: PretrainedConfig) -> int:
    """The smallest period of the layer pattern (sliding and full attention, dense and sparse layers)."""
    depth = config.num_hidden_layers
    patterns = [value for value in _per_layer_lists(config).values()]
    for period in range(1, depth + 1):
        if all(pattern[i] == pattern[i % period] for pattern in patterns for i in range(depth)):
            return period
    return depth


def _per_layer_lists(config: PretrainedConfig) -> dict[str, list[object]]:
    depth = config.num_hidden_layers
    return {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }


def plan_depths(config: PretrainedConfig) -> DepthPlan:
    """Chooses the depths to trace: two and three periods (and what is left of an incomplete one)."""
    depth, period = config.num_hidden_layers, layer_period(config)
    rest = depth % period
    shallow, deep = (rest + 2 * period, rest + 3 * period) if period < 4 else (rest + period, rest + 2 * period)
    if deep >= depth:
        return DepthPlan((depth,), 0.0)
    return DepthPlan((shallow, deep), (depth - shallow) / period)


def truncate(config: PretrainedConfig, depth: int) -> None:
    """Cuts a config (in place, it is the caller's own copy) to its first `depth` layers."""
    lists = _per_layer_lists(config)
    for name, value in lists.items():
        setattr(config, name, value[:depth])
    config.num_hidden_layers = depth


def extend(shallow: Profile, deep: Profile, steps: float) -> tuple[Profile, list[NDArray[np.float64]]]:
    """Extends a profile to the full depth.

    Args:
        shallow: Profile of the shallower trace.
        deep: Profile of the trace with one period more.
        steps: How many times the difference is added to the shallower one.

    Returns:
        The profile with its residents extended, and the two versions of its live bytes.

    Raises:
        DepthMismatch: When the traces do not differ by repeated periods.
    """
    exponents = tuple(sorted(set(shallow.exponents) | set(deep.exponents)))
    low, high = _spread(shallow, exponents), _spread(deep, exponents)
    left, right = _signatures(shallow.instants), _signatures(deep.instants)
    late = align(left, right)
    early = [len(right) - 1 - j for j in reversed(align(left[::-1], right[::-1]))]
    versions = [low + steps * (high[matches] - low) for matches in (late, early)]
    resident = {
        category: _extend_polynomial(size, deep.resident[category], steps)
        for category, size in shallow.resident.items()
    }
    return Profile(shallow.instants, exponents, low, resident, shallow.batch_inputs), versions


def _signatures(instants: Sequence[Instant]) -> list[int]:
    return [hash((instant.signature, instant.phase)) for instant in instants]


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
            j += _gap(short[i:], long[j:])
        matches.append(j)
        j += 1
    return matches


def _gap(short: Sequence[int], long: Sequence[int]) -> int:
    window = list(short[:WINDOW])
    for gap in range(1, len(long) - len(window) + 1):
        if list(long[gap : gap + len(window)]) == window:
            return gap
    raise DepthMismatch(f"{len(short)} instants left of the shallower trace, {len(long)} of the deeper one")


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
