"""What a plan's memory would be at other batches, lengths and memories: the peaks of every regime, ready for a page.

A skyline and what is added to it (planner/estimate.py, planner/host.py) are written as one thing: rows of whole numbers,
one per moment that can be the highest of its phase. Whoever reads them needs no more than products and sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.domain import Domain, Exponents, monomial
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan

CATEGORIES = tuple(Category)
EXACT_BELOW = 1 << 53
"""Whole numbers up to here are exact as floating-point numbers, which are all that a browser's numbers are."""


@dataclass(frozen=True)
class PhaseRows:
    """The moments of one phase that can be its highest."""

    phase: Phase
    """Which phase."""
    rows: tuple[tuple[tuple[int, ...], ...], ...]
    """Live bytes: moments, categories (in the order of `Category`), monomials."""


@dataclass(frozen=True)
class Surface:
    """Peaks over all phases as functions of batch, length and accumulation, bytes."""

    exponents: tuple[Exponents, ...]
    """The monomials, last axis of all rows."""
    waiting: tuple[int, ...]
    """Inputs of one more micro batch, by monomial."""
    phases: tuple[PhaseRows, ...]
    """One per phase, in order."""

    def peaks(self, batch: int, length: int, more: int) -> tuple[PhasePeak, ...]:
        """The peak of each phase.

        Args:
            batch: Sequences per micro batch.
            length: Tokens per sequence.
            more: Micro batches per optimizer step beyond those traced, whose inputs wait.
        """
        monomials = [monomial(item, batch, length) for item in self.exponents]
        waiting = more * _dot(self.waiting, monomials)
        peaks = []
        for item in self.phases:
            moments = [[_dot(size, monomials) for size in row] for row in item.rows]
            amounts = dict(zip(CATEGORIES, max(moments, key=sum), strict=True))
            amounts[Category.INPUTS] += waiting
            peaks.append(PhasePeak(item.phase, sum(amounts.values()), amounts))
        return tuple(peaks)

    def largest_number(self, batch: int, length: int, more: int) -> int:
        """A bound of every number that `peaks` meets on its way, for shapes up to this one."""
        monomials: list[int] = [batch**i * length**j * max(1, step) for i, j, step in self.exponents]
        rows = [row for item in self.phases for row in item.rows]
        most = max(
            sum(abs(size) * m for part in row for size, m in zip(part, monomials, strict=True))
            for row in rows
        )
        return most + more * sum(abs(size) * m for size, m in zip(self.waiting, monomials, strict=True))


def _dot(left: tuple[int, ...], right: list[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class Regime:
    """What one trace answers for."""

    bounds: Domain
    """Shapes."""
    traced_accumulation: int
    """1: steps of one micro batch; 2: steps of two and more."""
    device: Surface
    """Live tensors on the device."""
    host: Surface | None
    """Tensors in host memory; None where there are none, or where they are the device's own."""
    process_bytes: int
    """Host memory of the process before anything is loaded."""

    def answers(self, batch: int, length: int, accumulation: int) -> bool:
        """Whether a shape lies in the regime."""
        return self.traced_accumulation == min(accumulation, 2) and self.bounds.contains(batch, length)


@dataclass(frozen=True)
class Gap:
    """A regime that the sliders reach and that is not held, with the reason."""

    bounds: Domain
    """Shapes."""
    traced_accumulation: int
    """As in `Regime`."""
    reason: str
    """Why not."""


@dataclass(frozen=True)
class Split:
    """A micro batch that the job can have."""

    micro_batch_size: int
    """Sequences."""
    gradient_accumulation_steps: int
    """Micro batches per optimizer step."""
    global_batch_size: int
    """Sequences per optimizer step over all devices; another one than the job's where its own is too small."""


@dataclass(frozen=True)
class Point:
    """One place of the map, as the planner prices it."""

    split: Split
    """Micro batch."""
    length: int
    """Tokens per sequence."""
    estimate: MemoryEstimate | None
    """Its memory; None: in a gap."""
    tokens_per_second: float | None
    """Predicted; None where nobody knows how fast the device is."""


@dataclass(frozen=True)
class Card:
    """A memory that a device could have."""

    name: str
    """The built-in device that has it, or several."""
    memory_bytes: int
    """Usable bytes."""


@dataclass(frozen=True)
class WhatIf:
    """Everything that sliders over a plan can reach."""

    plan: Plan
    """The plan; its other knobs hold everywhere."""
    splits: tuple[Split, ...]
    """Micro batches, smallest first."""
    lengths: tuple[int, ...]
    """Lengths of the map, ascending; a slider goes over all between the first and the last one."""
    length_step: int
    """Distance of the lengths that a slider stops at: kernels round other lengths up."""
    cards: tuple[Card, ...]
    """Memories, smallest first; the device's own is among them."""
    headroom: float
    """Share of the memory that a plan must leave free."""
    context_bytes: int
    """What the runtime takes on the device beside tensors."""
    host_memory_bytes: int
    """Host memory per device; 0: not known, or the device's own."""
    regimes: tuple[Regime, ...]
    """What is held."""
    gaps: tuple[Gap, ...]
    """What is not."""
    points: tuple[Point, ...]
    """The map: every micro batch with every length."""

    def budget_bytes(self, memory_bytes: int) -> int:
        """What a plan may take of a device."""
        return memory_bytes - round(self.headroom * memory_bytes)

    def by_split(self) -> Mapping[Split, tuple[Point, ...]]:
        """The rows of the map."""
        return {split: tuple(p for p in self.points if p.split == split) for split in self.splits}
