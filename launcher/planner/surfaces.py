"""Skylines for a page: all that `read_estimate` adds to one is folded into its rows, so that products and sums are left.

What can't be folded without a doubt is a gap: every regime is compared with the planner's own prices over the whole map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from launcher.domain import Domain, Exponents
from launcher.errors import LauncherError
from launcher.hardware import DeviceKind
from launcher.job import Engine, JobSpec
from launcher.memory import TRAINING, Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.estimate import WORKSPACES, context_bytes
from launcher.planner.forecast import Forecaster
from launcher.planner.host import weight_bytes
from launcher.planner.polynomial import CONSTANT
from launcher.planner.skyline import Skyline
from launcher.planner.space import batch_splits
from launcher.whatif import (
    CATEGORIES,
    EXACT_BELOW,
    Card,
    Gap,
    PhaseRows,
    Point,
    Regime,
    Split,
    Surface,
    WhatIf,
)

Rows = NDArray[np.float64]
MOST_REGIMES = 24
"""Regimes that are traced for a page at most; a job has six, Liger's loss makes one of every doubling."""
LENGTH_STEP = 16
"""Tokens between the stops of a slider."""
LARGER_BATCHES = (2, 4)
"""Micro batches beyond the job's batch, in multiples of it: then every step has one, and the global batch grows."""
LENGTH_FACTORS = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Lengths of the map, in lengths of the plan."""


class NotFoldable(Exception):
    """A skyline has something that depends on the shape in a way that rows can't say."""


def what_if(job: JobSpec, plan: Plan, forecaster: Forecaster, memories: Iterable[tuple[str, int]]) -> WhatIf:
    """Everything that sliders over a plan can reach.

    Args:
        job: The job, resolved, its headroom a number.
        plan: The plan whose batch and length vary.
        forecaster: Prices plans; traces the regimes that the search did not.
        memories: Names and usable bytes of other devices.

    Raises:
        ValueError: When the headroom is not a number yet.
    """
    splits = _splits(job, plan)
    lengths = _lengths(job, plan)
    found = _regime_plans(plan, splits, lengths, forecaster)
    refused = _not_traced(job, found, forecaster)
    forecaster.prepare(inside for inside in found if inside not in refused)
    regimes: list[Regime] = []
    gaps: list[Gap] = []
    points: dict[tuple[Split, int], Point] = {}
    for inside in found:
        domain, traced = forecaster.domain(inside), min(inside.gradient_accumulation_steps, 2)
        if inside in refused:
            gaps.append(Gap(domain, traced, refused[inside]))
            continue
        try:
            regime = fold(forecaster.skyline(inside), inside, job, forecaster)
            points |= _checked(regime, plan, splits, lengths, forecaster)
            regimes.append(regime)
        except (NotFoldable, LauncherError) as failure:
            gaps.append(Gap(domain, traced, str(failure).split("\n")[0]))
    empty = {(split, length): Point(split, length, None, None) for split in splits for length in lengths}
    share = job.planner.headroom
    if isinstance(share, str):
        raise ValueError(f"planner.headroom={share} is not settled")
    on_cpu = job.hardware.kind is DeviceKind.CPU
    return WhatIf(
        plan=plan,
        splits=splits,
        lengths=lengths,
        length_step=_length_step(plan),
        cards=_cards(job, memories),
        headroom=share,
        context_bytes=context_bytes(job.hardware, plan),
        host_memory_bytes=0 if on_cpu else job.hardware.host_memory_bytes,
        regimes=tuple(regimes),
        gaps=tuple(gaps),
        points=tuple((empty | points).values()),
    )


def at(plan: Plan, split: Split, length: int) -> Plan:
    """The plan at another micro batch and length."""
    return replace(
        plan,
        micro_batch_size=split.micro_batch_size,
        gradient_accumulation_steps=split.gradient_accumulation_steps,
        max_length=length,
    )


def _splits(job: JobSpec, plan: Plan) -> tuple[Split, ...]:
    """Micro batches that divide the job's batch, and larger ones, which make it grow."""
    pin = replace(job.planner.pin, micro_batch_size=None, gradient_accumulation_steps=None)
    free = replace(job, planner=replace(job.planner, pin=pin))
    total = job.training.global_batch_size
    within = [Split(micro, steps, total) for micro, steps in batch_splits(free)]
    largest = within[-1].micro_batch_size
    beyond = [Split(largest * factor, 1, total * factor) for factor in LARGER_BATCHES]
    return (*within, *beyond)


def _lengths(job: JobSpec, plan: Plan) -> tuple[int, ...]:
    """Lengths around the plan's, as far as the model has positions, and those that the job lists."""
    positions = job.model.architecture.get("max_position_embeddings")
    most = max(plan.max_length, positions) if isinstance(positions, int) else 4 * plan.max_length
    step = _length_step(plan)
    around = {max(step, round(factor * plan.max_length / step) * step) for factor in LENGTH_FACTORS}
    listed = {*job.planner.choices.max_length, plan.max_length, min(most, 4 * plan.max_length)}
    return tuple(sorted(length for length in around | listed if 8 <= length <= most))


def _length_step(plan: Plan) -> int:
    """A small power of two that divides the plan's length."""
    step = LENGTH_STEP
    while plan.max_length % step:
        step //= 2
    return step


def _cards(job: JobSpec, memories: Iterable[tuple[str, int]]) -> tuple[Card, ...]:
    names: dict[int, list[str]] = {job.hardware.memory_bytes: [job.hardware.name]}
    for name, size in memories:
        if size and name != job.hardware.name:
            names.setdefault(size, []).append(name)
    return tuple(Card(" / ".join(names[size]), size) for size in sorted(names))


def _regime_plans(
    plan: Plan, splits: Sequence[Split], lengths: Sequence[int], forecaster: Forecaster
) -> list[Plan]:
    """A plan in every regime between the shortest and the longest length; the plan's own first, then the widest."""
    found: dict[tuple[Domain, int], Plan] = {}
    reach: dict[tuple[Domain, int], int] = {}
    for split in splits:
        length = lengths[0]
        while length <= lengths[-1]:
            inside = at(plan, split, length)
            try:
                domain = forecaster.domain(inside)
            except LauncherError:  # shorter than an example's images
                length += 1
                continue
            key = (domain, min(split.gradient_accumulation_steps, 2))
            last = domain.last_length(split.micro_batch_size, lengths[-1])
            found.setdefault(key, inside)
            reach[key] = reach.get(key, 0) + sum(length <= other <= last for other in lengths)
            if _is_one_shape(domain):  # the map's lengths stand for all such
                last = next((other for other in lengths if other > length), lengths[-1] + 1) - 1
            length = max(last, length) + 1
    own = (forecaster.domain(plan), min(plan.gradient_accumulation_steps, 2))
    order = sorted(found, key=lambda key: (key != own, -reach[key]))
    return [found[key] for key in order]


def _not_traced(job: JobSpec, found: Sequence[Plan], forecaster: Forecaster) -> dict[Plan, str]:
    """Plans in regimes that no trace is made for, with the reason; the first one is the plan's own regime."""
    refused = {}
    for number, inside in enumerate(found):
        if number == 0 or forecaster.is_prepared(inside):
            continue
        if inside.engine is not Engine.NONE:
            refused[inside] = "a trace of an engine takes minutes, and the search needed none here"
        elif _is_one_shape(forecaster.domain(inside)):
            refused[inside] = "every shape needs a trace of its own here, and the search needed none"
        elif number >= MOST_REGIMES:
            refused[inside] = f"a page holds {MOST_REGIMES} regimes at most"
    return refused


def _is_one_shape(domain: Domain) -> bool:
    return domain.length_min == domain.length_max


def _checked(
    regime: Regime, plan: Plan, splits: Sequence[Split], lengths: Sequence[int], forecaster: Forecaster
) -> dict[tuple[Split, int], Point]:
    """The map's points in a regime, as the planner prices them.

    Raises:
        NotFoldable: When the regime's rows say something else, or when a browser's numbers would not be exact.
    """
    points = {}
    most = max(
        regime.device.largest_number(split.micro_batch_size, lengths[-1], split.gradient_accumulation_steps)
        for split in splits
    )
    if most >= EXACT_BELOW:
        raise NotFoldable(f"numbers up to {most:.1e} are not exact in a browser")
    for split in splits:
        batch, steps = split.micro_batch_size, split.gradient_accumulation_steps
        for length in lengths:
            if not regime.answers(batch, length, steps):
                continue
            priced = forecaster.estimate(at(plan, split, length))
            more = steps - regime.traced_accumulation
            if regime.device.peaks(batch, length, more) != priced.phases or not _same_host(
                regime, priced, batch, length, more
            ):
                raise NotFoldable(f"its rows differ from the planner's price of {batch} x {length}")
            step = forecaster.step_time(at(plan, split, length))
            points[split, length] = Point(
                split, length, priced, None if step is None else step.tokens_per_second
            )
    return points


def _same_host(regime: Regime, priced: MemoryEstimate, batch: int, length: int, more: int) -> bool:
    if regime.host is None:
        return priced.host is None or not priced.host.phases or priced.host.phases == priced.phases
    return priced.host is not None and regime.host.peaks(batch, length, more) == priced.host.phases


def fold(skyline: Skyline, plan: Plan, job: JobSpec, forecaster: Forecaster) -> Regime:
    """Writes a skyline, and what the planner adds to it, as rows.

    Args:
        skyline: The skyline.
        plan: A plan that it answers for.
        job: The job.
        forecaster: Prices the plan.

    Raises:
        NotFoldable: When rows can't say it.
    """
    estimate = forecaster.estimate(replace(plan, gradient_accumulation_steps=skyline.traced_accumulation))
    rows = {item.phase: item.rows for item in skyline.phases}
    exponents = skyline.exponents
    if CONSTANT not in exponents:
        raise NotFoldable("its sizes have no constant part")
    workspaces = WORKSPACES * job.hardware.blas_workspace_bytes
    for phase in rows.keys() - {Phase.LOAD}:
        rows[phase] = rows[phase].copy()
        rows[phase][:, CATEGORIES.index(Category.WORKSPACES), exponents.index(CONSTANT)] += workspaces
    on_gpu = job.hardware.kind is not DeviceKind.CPU
    host = skyline.host if on_gpu else None
    if not on_gpu:
        for category in (Category.PARAMETERS, Category.GRADIENTS):
            if set(skyline.resident.get(category, {})) - {CONSTANT}:
                raise NotFoldable(f"its {category.value} depend on the shape")
        rows[Phase.LOAD] = _constant(rows, exponents, estimate.phases)
    if host is not None and Phase.RESUME in rows:
        rows[Phase.RESUME] = _with_unpaged_states(rows, exponents, host)
    held = None
    if host is not None and estimate.host is not None:
        host_rows = {item.phase: item.rows for item in host.phases}
        stored_as_held = len(set(weight_bytes(plan, job))) == 1
        if Phase.LOAD in host_rows and not stored_as_held:
            host_rows[Phase.LOAD] = _constant(host_rows, host.exponents, estimate.host.phases)
        held = _surface(host_rows, host.exponents, host.batch_inputs)
    return Regime(
        bounds=skyline.domain,
        traced_accumulation=skyline.traced_accumulation,
        device=_surface(rows, exponents, skyline.batch_inputs),
        host=held,
        process_bytes=estimate.host.process_bytes if estimate.host is not None and on_gpu else 0,
    )


def _constant(
    rows: Mapping[Phase, Rows], exponents: Sequence[Exponents], priced: Sequence[PhasePeak]
) -> Rows:
    """Loading with the copy of the weights that the planner adds, in one row: weights are as large at every shape."""
    varying = [index for index, pair in enumerate(exponents) if pair != CONSTANT]
    if rows[Phase.LOAD][:, :, varying].any():
        raise NotFoldable("loading depends on the shape")
    (peak,) = (peak for peak in priced if peak.phase is Phase.LOAD)
    row = np.zeros((1, len(CATEGORIES), len(exponents)))
    row[0, :, exponents.index(CONSTANT)] = [peak.by_category_bytes.get(name, 0) for name in CATEGORIES]
    return row


def _with_unpaged_states(rows: Mapping[Phase, Rows], exponents: Sequence[Exponents], host: Skyline) -> Rows:
    """The moments of a resumed run: its own, and those of training with the paged states on the device."""
    states = CATEGORIES.index(Category.OPTIMIZER_STATE)
    steps = [item.rows[:, states] for item in host.phases if item.phase is Phase.OPTIMIZER_STEP]
    if not steps or not steps[0].any():
        return rows[Phase.RESUME]
    first = host.exponents.index(CONSTANT)
    if (steps[0] != steps[0][0]).any() or np.delete(steps[0], first, axis=1).any():
        raise NotFoldable("its paged optimizer states depend on the shape")
    training = [rows[phase] for phase in TRAINING if phase in rows]
    lifted = np.concatenate(training).copy()
    lifted[:, states, exponents.index(CONSTANT)] += steps[0][0, first]
    return np.concatenate([rows[Phase.RESUME], lifted])


def _surface(
    rows: Mapping[Phase, Rows], exponents: Sequence[Exponents], batch_inputs: Mapping[Exponents, int]
) -> Surface:
    missing = {pair for pair, size in batch_inputs.items() if size} - set(exponents)
    if missing:
        raise NotFoldable(f"its inputs have the powers {sorted(missing)}, which nothing else has")
    for phase, sizes in rows.items():
        if (sizes != np.rint(sizes)).any():
            raise NotFoldable(f"{phase.value} has parts of bytes (shares of more ranks than are traced)")
    return Surface(
        exponents=tuple(exponents),
        waiting=tuple(batch_inputs.get(pair, 0) for pair in exponents),
        phases=tuple(
            PhaseRows(phase, tuple(tuple(tuple(map(int, part)) for part in row) for row in rows[phase]))
            for phase in Phase
            if phase in rows
        ),
    )
