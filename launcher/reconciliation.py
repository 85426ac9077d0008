"""Predicted beside measured: the record of a run that has ended."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from launcher.documents import read_document
from launcher.memory import MemoryEstimate, MemoryMeasurement
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import needed_libraries, trace_cache
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.ledger import write_record
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, WorkerOrder, WorkerOutcome
from launcher.step_time import StepTime


def reconcile(order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome, started: datetime) -> RunRecord:
    """Writes the record of a run that has ended: predicted beside measured."""
    files = [paths.measured(rank) for rank in range(order.plan.world_size)]
    measured = tuple(read_document(file, MemoryMeasurement) for file in files if file.exists())
    measurement = measured[0] if measured else None
    record = RunRecord(
        run_dir=str(paths.root),
        recipe=order.job.recipe,
        model=order.job.model.path,
        hardware=order.job.hardware.name,
        started=started.isoformat(timespec="seconds"),
        plan=order.plan,
        predicted=order.predicted,
        predicted_as_run=_predict_as_run(order, measurement) if measurement else None,
        measured=measurement,
        outcome=outcome,
        versions=library_versions(),
        measured_ranks=measured,
        predicted_step=order.predicted_step,
        predicted_step_as_run=_step_as_run(order, outcome),
    )
    write_record(paths, record)
    return record


def _predict_as_run(order: WorkerOrder, measurement: MemoryMeasurement) -> MemoryEstimate | None:
    """The prediction for the largest batch that ran under the meter, where that is not the plan's."""
    plan = order.plan
    if not measurement.shapes:
        return None
    largest = max(measurement.shapes, key=lambda shape: shape.micro_batch_size * shape.length)
    if (largest.micro_batch_size, largest.length) == (plan.micro_batch_size, plan.max_length):
        return None
    as_run = replace(plan, micro_batch_size=largest.micro_batch_size, max_length=largest.length)
    with Tracer(needed_libraries(order.job)) as tracer:
        return Forecaster(order.job, tracer, trace_cache(order.job)).estimate(as_run, exact=True)


def _step_as_run(order: WorkerOrder, outcome: WorkerOutcome) -> StepTime | None:
    """The predicted time of a step with as many tokens as the measured ones had; None where it is the plan's."""
    plan, tokens = order.plan, outcome.tokens_per_step
    if order.predicted_step is None or tokens is None or tokens == plan.tokens_per_step:
        return None
    as_run = replace(plan, max_length=round(plan.max_length * tokens / plan.tokens_per_step))
    with Tracer(needed_libraries(order.job)) as tracer:
        rates = device_rates(order.job.hardware, cache_folder("rates"))
        forecaster = Forecaster(order.job, tracer, trace_cache(order.job), 0, rates)
        return forecaster.step_time(as_run)
