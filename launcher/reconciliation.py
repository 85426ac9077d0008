"""Predicted beside measured: the record of a run that has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from launcher.documents import read_document, write_document
from launcher.memory import (
    RESIDENT,
    Category,
    MeasuredPhase,
    MemoryEstimate,
    MemoryMeasurement,
    Phase,
    PhasePeak,
    StepShape,
)
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.interval import CONVENTION, EVIDENCE, read_residuals, with_interval
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import needed_libraries, trace_cache
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.ledger import read_replans, write_record
from launcher.run.ranks import read_outcomes
from launcher.run_paths import RunPaths
from launcher.run_record import Finding, Rehearsal, RunRecord, Status, WorkerOrder, WorkerOutcome
from launcher.step_time import StepTime

SEGMENT_BYTES = 2 << 20
"""What torch's caching allocator takes from the device at least (`kSmallBuffer`, c10/core/AllocatorConfig.h, torch 2.9 to
2.13): less changes nothing there."""


def reconcile(order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome, started: datetime) -> RunRecord:
    """Writes the record of a run that has ended: predicted beside measured."""
    record = reconciled(order, paths, outcome, started)
    write_record(paths, record)
    return record


def reconciled(order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome, started: datetime) -> RunRecord:
    """The record of a run that has ended; nothing is written of it."""
    files = [paths.measured(rank) for rank in range(order.plan.world_size)]
    measured = tuple(read_document(file, MemoryMeasurement) for file in files if file.exists())
    with Tracer(needed_libraries(order.job)) as tracer:  # it starts when there is something to trace
        rates = device_rates(order.job.hardware, cache_folder("rates"))
        forecaster = Forecaster(order.job, tracer, trace_cache(order.job), 0, rates)
        as_run = _predict_as_run(order.plan, measured[0], forecaster, exact=True) if measured else None
        step_as_run = _step_as_run(order, outcome, forecaster)
    return RunRecord(
        run_dir=str(paths.root),
        recipe=order.job.recipe,
        model=order.job.model.path,
        hardware=order.job.hardware.name,
        started=started.isoformat(timespec="seconds"),
        plan=order.plan,
        predicted=order.predicted,
        predicted_as_run=as_run,
        measured=measured[0] if measured else None,
        outcome=outcome,
        versions=library_versions(),
        measured_ranks=measured,
        predicted_step=order.predicted_step,
        predicted_step_as_run=step_as_run,
        rehearsal=rehearsal_of(order, paths),
        replans=read_replans(paths),
    )


def _predict_as_run(
    plan: Plan, measured: MemoryMeasurement, forecaster: Forecaster, *, exact: bool
) -> MemoryEstimate | None:
    """The prediction for the largest batches that ran under the meter; None where they are the plan's.

    Evaluation has batches of its own.
    """
    training = _largest(measured.shapes) or StepShape(plan.micro_batch_size, plan.max_length)
    evaluation = _largest(measured.evaluation_shapes)
    is_plans = (training.micro_batch_size, training.length) == (plan.micro_batch_size, plan.max_length)
    if is_plans and (evaluation is None or evaluation.length == plan.max_length):
        return None
    as_run = replace(plan, micro_batch_size=training.micro_batch_size, max_length=training.length)
    estimate = forecaster.estimate(as_run, exact=exact)
    if evaluation is None or evaluation.length == training.length:
        return estimate
    evaluated = forecaster.estimate(replace(plan, max_length=evaluation.length)).phase(Phase.EVALUATION)
    phases = [evaluated if peak.phase is Phase.EVALUATION else peak for peak in estimate.phases]
    return replace(estimate, phases=tuple(peak for peak in phases if peak is not None))


def _largest(shapes: Sequence[StepShape]) -> StepShape | None:
    """The shape with the most tokens; None of none."""
    return max(shapes, key=lambda shape: shape.micro_batch_size * shape.length, default=None)


def _step_as_run(order: WorkerOrder, outcome: WorkerOutcome, forecaster: Forecaster) -> StepTime | None:
    """The predicted time of a step with as many tokens as the measured ones had; None where it is the plan's."""
    plan, tokens = order.plan, outcome.tokens_per_step
    if order.predicted_step is None or tokens is None or tokens == plan.tokens_per_step:
        return None
    as_run = replace(plan, max_length=round(plan.max_length * tokens / plan.tokens_per_step))
    return forecaster.step_time(as_run)


def rehearsal_of(order: WorkerOrder, paths: RunPaths) -> Rehearsal | None:
    """What a rehearsal that has ended well showed; None when there was none. Worked out once, then read."""
    act = paths.rehearsal
    if act.findings.exists():
        return read_document(act.findings, Rehearsal)
    outcomes = read_outcomes(act, order.plan.world_size)
    files = [act.measured(rank) for rank in range(order.plan.world_size)]
    measured = [read_document(file, MemoryMeasurement) for file in files if file.exists()]
    if not measured or any(outcome.status is not Status.DONE for outcome in outcomes):
        return None
    highest = max(measured, key=lambda measurement: measurement.peak_allocated_bytes)
    rehearsed = read_document(act.worker, WorkerOrder)
    with Tracer(needed_libraries(order.job)) as tracer:
        forecaster = Forecaster(order.job, tracer, trace_cache(order.job))
        as_run = _predict_as_run(rehearsed.plan, highest, forecaster, exact=False)
    predicted = order.predicted
    if as_run is not None:
        predicted = with_interval(as_run, rehearsed.plan, order.job, read_residuals(EVIDENCE))
    seconds = max(outcome.train_seconds for outcome in outcomes)
    rehearsal = Rehearsal(predicted, highest, seconds, findings(predicted, highest))
    write_document(act.findings, rehearsal)
    return rehearsal


def findings(predicted: MemoryEstimate, measured: MemoryMeasurement) -> tuple[Finding, ...]:
    """Measured peaks above what was to be expected, and what there was more of.

    The interval is that of the highest peak; the other phases may exceed theirs by as many bytes. Where no runs of the
    kind were measured, the conventional headroom stands for it.
    """
    peak_bytes, interval, found = predicted.peak_allocated_bytes, predicted.interval, []
    slack = round(peak_bytes * CONVENTION) if interval is None else interval.high_bytes - peak_bytes
    for phase in measured.phases:
        peak = predicted.phase(phase.phase)
        if peak is None:
            continue
        expected = peak.allocated_bytes + max(slack, SEGMENT_BYTES)
        if phase.allocated_bytes <= expected:
            continue
        excess = _excess(predicted, peak, measured, phase)
        category = max(excess, key=lambda name: excess[name])
        found.append(
            Finding(
                phase.phase,
                phase.allocated_bytes,
                peak.allocated_bytes,
                expected,
                category,
                excess[category],
            )
        )
    return tuple(found)


def _excess(
    predicted: MemoryEstimate, peak: PhasePeak, measured: MemoryMeasurement, seen: MeasuredPhase
) -> dict[str, int]:
    """How much more than predicted a phase had of each category, bytes; sums to that of its peak."""
    if seen.by_category_bytes is not None:
        return {
            category.value: seen.by_category_bytes.get(category, 0) - peak.by_category_bytes.get(category, 0)
            for category in Category
        }
    excess = {
        category.value: measured.resident_bytes.get(category, 0) - predicted.resident_bytes.get(category, 0)
        for category in RESIDENT
    }
    return {**excess, "working_set": seen.allocated_bytes - peak.allocated_bytes - sum(excess.values())}
