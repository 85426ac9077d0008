"""What the allocator holds for a plan, and the workspaces beside its tensors: on streams made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.planner.reserve import with_reserved, with_workspaces
from launcher.planner.stream import CATEGORIES, PHASES, Stream, phase_peaks
from launcher.units import MIB

LOAD, TRAIN = (PHASES.index(phase) for phase in (Phase.LOAD, Phase.TRAIN_STEP))


def made(sizes_mib: list[int], events: list[int], phases: list[int]) -> Stream:
    """A stream of blocks of parameters that no module made."""
    count = len(sizes_mib)
    return Stream(
        sizes_bytes=np.array(sizes_mib, dtype=np.int64) * MIB,
        categories=np.zeros(count, dtype=np.int8),
        modules=np.zeros(count, dtype=np.int32),
        module_names=("",),
        operations=np.zeros(count, dtype=np.int32),
        operation_names=("aten.empty",),
        events=np.array(events, dtype=np.int64),
        phases=np.array(phases, dtype=np.int8),
        cuda_streams=np.zeros(count, dtype=np.int8),
    )


def estimate_of(stream: Stream) -> MemoryEstimate:
    """An estimate with the peaks of a stream."""
    return MemoryEstimate(phase_peaks(stream), {}, context_bytes=7)


def test_pages_of_20_mib_are_held_after_their_blocks_are_freed() -> None:
    """30 MiB of weights take two pages; a block of 100 MiB ends 130 MiB up, in the seventh; nothing is given back."""
    stream = made([30, 100, 10], [1, 2, -2, 3], [LOAD, TRAIN, TRAIN, TRAIN])
    priced = with_reserved(estimate_of(stream), stream, 10_000 * MIB)
    assert [peak.reserved_bytes for peak in priced.phases] == [40 * MIB, 140 * MIB]
    assert priced.peak_reserved_bytes == 140 * MIB
    assert priced.peak_device_bytes == 140 * MIB + 7


def test_what_is_held_for_nothing_does_not_count_against_a_plan() -> None:
    """100 blocks of 1 MiB, then one of 100 MiB: two pools hold 200 MiB, until memory runs out; then one gives back."""
    small = list(range(1, 101))
    stream = made([1] * 100 + [100], [*small, *(-n for n in small), 101], [TRAIN] * 201)
    roomy, tight = (with_reserved(estimate_of(stream), stream, capacity * MIB) for capacity in (400, 120))
    assert roomy.peak_reserved_bytes == 200 * MIB
    assert tight.peak_reserved_bytes is not None and tight.peak_reserved_bytes <= 120 * MIB


def test_a_plan_that_can_not_fit_shows_what_it_would_hold() -> None:
    stream = made([100, 100], [1, 2], [TRAIN] * 2)
    priced = with_reserved(estimate_of(stream), stream, 150 * MIB)
    assert priced.peak_reserved_bytes == 200 * MIB


def test_workspaces_have_the_size_of_the_card() -> None:
    stream = made([30, 0, 100, 1], [1, 2, 3, -3, 4], [LOAD, *[TRAIN] * 4])
    workspaces = np.isin(np.arange(4), (1, 3))
    categories = np.where(workspaces, CATEGORIES.index(Category.WORKSPACES), stream.categories)
    stream = replace(stream, categories=categories.astype(np.int8))
    load, train = phase_peaks(with_workspaces(stream, 8 * MIB))
    assert load.allocated_bytes == 30 * MIB
    assert train.allocated_bytes == (30 + 8 + 100) * MIB
    assert with_workspaces(stream, 8 * MIB).sizes_bytes.tolist() == [30 * MIB, 8 * MIB, 100 * MIB, MIB]


def test_a_phase_that_the_stream_lacks_has_no_reserved_bytes() -> None:
    stream = made([30], [1], [LOAD])
    save = PhasePeak(Phase.SAVE, MIB, {Category.PARAMETERS: MIB})
    estimate = MemoryEstimate((*phase_peaks(stream), save), {}, 0)
    assert with_reserved(estimate, stream, 1000 * MIB).phases[-1].reserved_bytes is None
