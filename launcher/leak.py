"""Memory that grows from step to step: told from noise, and followed to the step at which it would not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from launcher.units import GIB, MIB, format_bytes

NUM_READINGS: Final = 64
"""Readings that are looked at together."""
NUM_PARTS: Final = 4
"""Consecutive parts of them, each of which must lie above the one before."""
LEAST_GROWTH_BYTES: Final = 2 * MIB
"""Growth over all readings that is worth a word: below it lie a training loop's own lists of what it has logged."""
LEAST_SHARE: Final = 0.5
"""Each part must have risen by at least this share of the mean rise: what fills up and then stays is no leak."""


@dataclass(frozen=True)
class Reading:
    """What was allocated after one optimizer step."""

    step: int
    """Optimizer steps finished."""
    allocated_bytes: int
    """Bytes allocated then."""


@dataclass(frozen=True)
class Leak:
    """Memory after each step that grows steadily."""

    from_step: int
    """First step of those looked at."""
    to_step: int
    """Last of them."""
    bytes_per_step: float
    """Median growth."""
    lasts_until_step: int | None = None
    """Last step at which the plan's predicted peak and the growth since `from_step` fit the device; None where nobody
    knows how much the device has."""

    @property
    def gib_per_1000_steps(self) -> float:
        """The growth in GiB per 1,000 steps."""
        return 1000 * self.bytes_per_step / GIB

    def words(self, max_steps: int | None) -> str:
        """The finding, for a person.

        Args:
            max_steps: Where the run is to end; None where that is not known.
        """
        text = (
            f"what is allocated after each step grows by {self.gib_per_1000_steps:.3f} GiB per 1,000 steps "
            f"({format_bytes(round(self.bytes_per_step * (self.to_step - self.from_step)))} from step {self.from_step} "
            f"to {self.to_step}): something keeps tensors of past steps"
        )
        if self.lasts_until_step is None:
            return text
        text += f"; it would not fit after step {self.lasts_until_step:,}"
        if max_steps is None:
            return text
        return f"{text}, {'before' if self.lasts_until_step < max_steps else 'beyond'} the end at step {max_steps:,}"


def find_leak(readings: Sequence[Reading], spare_bytes: int | None = None) -> Leak | None:
    """The leak that readings in order of their steps show; None where they show none.

    Batches of unequal length make single readings go up and down, a buffer made at some moment makes one step, and a
    cache fills up and stays. So each quarter must lie wholly above the median of the one before, and have risen by no
    less than half of what they rise on average.

    Args:
        readings: At least `NUM_READINGS` for an answer.
        spare_bytes: What the device has above the plan's predicted peak.
    """
    if len(readings) < NUM_READINGS:
        return None
    size = len(readings) // NUM_PARTS
    parts = [readings[part * size : (part + 1) * size] for part in range(NUM_PARTS)]
    middles = [median(reading.allocated_bytes for reading in part) for part in parts]
    lows = [min(reading.allocated_bytes for reading in part) for part in parts]
    rises = [after - before for before, after in pairwise(middles)]
    mean_rise = sum(rises) / len(rises)
    rises_steadily = all(rise >= LEAST_SHARE * mean_rise for rise in rises)
    is_above_noise = all(low > before for before, low in zip(middles, lows[1:], strict=False))
    if not (rises_steadily and is_above_noise) or mean_rise * NUM_PARTS < LEAST_GROWTH_BYTES:
        return None
    steps = median(reading.step for reading in parts[-1]) - median(reading.step for reading in parts[0])
    bytes_per_step = (middles[-1] - middles[0]) / steps
    first, last = readings[0].step, readings[-1].step
    lasts = None if spare_bytes is None else first + int(max(0, spare_bytes) / bytes_per_step)
    return Leak(first, last, bytes_per_step, lasts)
