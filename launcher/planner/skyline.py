"""The skyline of a step: the few moments that can be its highest, as polynomials in batch and length.

A trace is a list of births and releases. Its prefix sums say, for every instant, how many bytes of each category
are alive, as a polynomial; the peak at any (batch, length) is the maximum over the instants. An instant that no
batch and length can make the highest is dropped; what stays answers every shape of the skyline's domain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launcher.domain import Domain, Exponents
from launcher.errors import UnsupportedByPlanner
from launcher.memory import Category, Phase, PhasePeak
from launcher.planner.polynomial import evaluate, monomials
from launcher.planner.stream import CATEGORIES, Stream
from launcher.planner.swapping import Swapping
from launcher.planner.work import WorkTable, WorkTally, build_table

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Instant:
    """One moment of the trace, right after an operation allocated."""

    signature: tuple[object, ...]
    """What happened, for matching instants of traces of different depth."""
    phase: Phase
    """Phase of the moment."""
    sizes: frozenset[object] = frozenset()
    """Sizes of the blocks that were born, but for small ones."""


@dataclass(frozen=True)
class Profile:
    """Memory over a whole trace: one row per instant."""

    instants: tuple[Instant, ...]
    """What each row is."""
    exponents: tuple[Exponents, ...]
    """The monomials, last axis of `live`."""
    live: NDArray[np.float64]
    """Live bytes; shape (instants, categories, monomials)."""
    resident: Mapping[Category, Mapping[Exponents, int]]
    """Full size of each resident category, bytes."""
    batch_inputs: Mapping[Exponents, int]
    """Bytes of the inputs of one micro batch."""
    stream: Stream | None = None
    """The same trace block by block; traces with symbols have none."""
    host: Profile | None = None
    """Host memory while the job runs on a GPU; None where the trace put nothing there."""
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the folders that were saved, by name."""
    work: WorkTally = field(default_factory=dict)
    """The operations of one optimizer step."""
    pinned: tuple[int, ...] = ()
    """Of host memory: sizes of the blocks that an engine pins and keeps, in the order of their births, bytes."""
    swapping: Swapping | None = None
    """What is on NVMe; None where nothing is."""


@dataclass(frozen=True)
class PhaseSkyline:
    """The moments of one phase that can be its highest."""

    phase: Phase
    """Which phase."""
    rows: NDArray[np.float64]
    """Live bytes; shape (rows, categories, monomials)."""


@dataclass(frozen=True)
class Skyline:
    """Peak memory of a step for every shape in a domain."""

    domain: Domain
    """Shapes for which it holds."""
    exponents: tuple[Exponents, ...]
    """The monomials (polynomial.py), last axis of every `rows`."""
    phases: tuple[PhaseSkyline, ...]
    """One per phase, in order."""
    resident: Mapping[Category, Mapping[Exponents, int]]
    """Full size of each resident category, bytes."""
    batch_inputs: Mapping[Exponents, int]
    """Bytes of the inputs of one micro batch."""
    traced_accumulation: int
    """Micro batches per optimizer step in the trace: 1 or 2; 2 stands for every larger number."""
    host: Skyline | None = None
    """Host memory while the job runs on a GPU; None where the trace put nothing there."""
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the folders that were saved, by name."""
    work: WorkTable = field(default_factory=lambda: build_table({}))
    """The operations of one optimizer step."""
    pinned: tuple[int, ...] = ()
    """Of host memory: sizes of the blocks that an engine pins and keeps, bytes."""
    swapping: Swapping | None = None
    """What is on NVMe; None where nothing is."""

    @property
    def drive_bytes(self) -> int:
        """What crosses the NVMe in an optimizer step: all files are read and written once."""
        return 0 if self.swapping is None else 2 * sum(self.swapping.files_bytes)

    @cached_property
    def is_whole(self) -> bool:
        """Whether all coefficients are whole numbers, so that sums need no rounding and are the same in any order."""
        return all(bool((part.rows == np.rint(part.rows)).all()) for part in self.phases)

    def peaks(self, batch: int, length: int, accumulation: int) -> tuple[PhasePeak, ...]:
        """Peak of each phase.

        Args:
            batch: Sequences per micro batch.
            length: Tokens per sequence.
            accumulation: Micro batches per optimizer step; the loop holds the inputs of all of them.

        Raises:
            UnsupportedByPlanner: When the shape lies outside the domain.
        """
        self._check(batch, length, accumulation)
        powers = monomials(self.exponents, batch, length)
        waiting = (accumulation - self.traced_accumulation) * evaluate(self.batch_inputs, batch, length)
        peaks = []
        for skyline in self.phases:
            by_category = skyline.rows @ powers
            row = by_category[int(by_category.sum(axis=1).argmax())]
            amounts = {category: round(value) for category, value in zip(CATEGORIES, row, strict=True)}
            amounts[Category.INPUTS] += waiting
            peaks.append(PhasePeak(skyline.phase, sum(amounts.values()), amounts))
        return tuple(peaks)

    def floor_bytes(
        self, batch: int, length: int, accumulation: int, without: Collection[Category], *, only_steps: bool
    ) -> int:
        """The highest moment, had some categories nothing in training steps.

        Args:
            batch: Sequences per micro batch.
            length: Tokens per sequence.
            accumulation: Micro batches per optimizer step.
            without: What is left out.
            only_steps: Whether other phases count for nothing.

        Raises:
            UnsupportedByPlanner: When the shape lies outside the domain.
        """
        columns = [CATEGORIES.index(category) for category in without]
        phases = []
        for skyline in self.phases:
            kept = skyline.rows.copy()
            if skyline.phase is Phase.TRAIN_STEP:
                kept[:, columns] = 0
            if skyline.phase is Phase.TRAIN_STEP or not only_steps:
                phases.append(PhaseSkyline(skyline.phase, kept))
        peaks = replace(self, phases=tuple(phases)).peaks(batch, length, accumulation)
        return max((peak.allocated_bytes for peak in peaks), default=0)

    def highest_bytes(
        self, batches: NDArray[np.int64], lengths: NDArray[np.int64], accumulation: int
    ) -> Matrix:
        """Highest bytes over all phases for many shapes at once; shape (shapes,).

        Args:
            batches: Sequences per micro batch; shape (shapes,).
            lengths: Tokens per sequence; shape (shapes,).
            accumulation: Micro batches per optimizer step.

        Raises:
            UnsupportedByPlanner: When a shape lies outside the domain.
        """
        for batch, length in zip(batches.tolist(), lengths.tolist(), strict=True):
            self._check(batch, length, accumulation)
        powers = monomials(self.exponents, batches, lengths)
        rows = np.concatenate([skyline.rows.sum(axis=1) for skyline in self.phases])
        waiting = np.array([[self.batch_inputs.get(pair, 0)] for pair in self.exponents], dtype=np.float64)
        waits = (accumulation - self.traced_accumulation) * (powers @ waiting)[:, 0]
        highest: Matrix = (powers @ rows.T).max(axis=1) + waits
        return highest

    def resident_bytes(self, batch: int, length: int) -> dict[Category, int]:
        """Full size of each resident category at a shape, bytes."""
        return {category: evaluate(size, batch, length) for category, size in self.resident.items()}

    def _check(self, batch: int, length: int, accumulation: int) -> None:
        legal = accumulation == 1 if self.traced_accumulation == 1 else accumulation >= 2
        if not (legal and self.domain.contains(batch, length)):
            raise UnsupportedByPlanner(
                f"no trace answers batch {batch} x length {length} with accumulation {accumulation}; this one "
                f"holds for {self.domain} with accumulation {'1' if self.traced_accumulation == 1 else '>= 2'}",
                "trace the regime that holds this shape",
            )


def build_skyline(domain: Domain, profile: Profile, accumulation: int) -> Skyline:
    """Keeps the moments that can be the highest of their phase.

    Args:
        domain: Shapes for which the trace holds.
        profile: All moments.
        accumulation: Micro batches per optimizer step in the trace.
    """
    phases = []
    for phase in Phase:
        chosen = [i for i, instant in enumerate(profile.instants) if instant.phase is phase]
        if chosen:
            phases.append(PhaseSkyline(phase, undominated(profile.live[chosen])))
    return Skyline(
        domain,
        profile.exponents,
        tuple(phases),
        profile.resident,
        profile.batch_inputs,
        min(accumulation, 2),
        None if profile.host is None else build_skyline(domain, profile.host, accumulation),
        profile.disk_bytes,
        build_table(profile.work),
        profile.pinned,
        profile.swapping,
    )


def undominated(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drops every row whose total is, monomial by monomial, at most that of another row.

    Monomials are never negative, so such a row is never higher than the other one.

    Args:
        rows: Live bytes; shape (rows, categories, monomials).
    """
    totals = rows.sum(axis=1)
    order = np.lexsort(totals.T[::-1])[::-1]  # a row can only be dominated by one that sorts before it
    kept: list[int] = []
    for index in order:
        if not kept or not (totals[kept] >= totals[index]).all(axis=1).any():
            kept.append(int(index))
    return rows[sorted(kept)]
