"""From a job to its plan: what this machine and past runs say of it, then the search."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from launcher.config import catalogue_entry
from launcher.contradictions import contradictions, hardware_here, refusal
from launcher.hardware import DeviceKind
from launcher.job import Attention, JobSpec
from launcher.libraries import uses_bitsandbytes
from launcher.plan import PlanChoice
from launcher.planner.explain import squeeze
from launcher.planner.forecast import Forecaster
from launcher.planner.interval import (
    CONVENTION,
    EVIDENCE,
    RUNS_FOR_HEADROOM,
    Residual,
    headroom_fraction,
    read_residuals,
    with_interval,
)
from launcher.planner.refusal import judge
from launcher.planner.search import search
from launcher.planner.space import headroom_bytes, semantic_plans
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.detect import DetectedDevice
from launcher.run.ledger import find_records
from launcher.run.model_facts import resolve_model


def resolve(job: JobSpec, devices: tuple[DetectedDevice, ...]) -> JobSpec:
    """Fills in what the job leaves to this machine and to the model's own config.

    Raises:
        ConfigError: When job, hardware and pinned knobs contradict each other.
    """
    hardware, model = hardware_here(job.hardware, devices), resolve_model(job.model, catalogue_entry)
    if found := contradictions(job, hardware, model):
        raise refusal(found)
    return replace(job, hardware=hardware, model=model)


def plan_job(job: JobSpec, tracer: Tracer | None = None) -> PlanChoice:
    """Finds the best plan of a resolved job, with the headroom and the interval that measured runs ask for.

    Args:
        job: The job.
        tracer: Makes the traces, with the libraries that the job needs; None: one for this job alone.
    """
    job, note = with_headroom(job, _past_residuals(Path("runs")))
    choice = find_plan(job, tracer)
    recorded = read_residuals(EVIDENCE)
    estimates = {
        name: with_interval(estimate, plan, job, recorded)
        for name, plan, estimate in (
            ("estimate", choice.plan, choice.estimate),
            ("runner_up_estimate", choice.runner_up, choice.runner_up_estimate),
        )
        if plan is not None and estimate is not None
    }
    notes = (*choice.notes, *note, *trust_notes(job), *_offload_notes(job, choice))
    choice = replace(choice, **estimates, notes=notes)  # type: ignore[arg-type]  # the names are above
    if choice.plan is None or choice.estimate is None:
        return choice
    return replace(choice, squeeze=squeeze(choice.plan, choice.estimate, choice.capacity_bytes))


def settled(job: JobSpec) -> JobSpec:
    """The job with its headroom as a number, as `plan_job` settles it."""
    return with_headroom(job, _past_residuals(Path("runs")))[0]


def trust_notes(job: JobSpec) -> tuple[str, ...]:
    """What a plan says of a job that lets code run which came with its weights."""
    model = job.model
    if not model.trust_remote_code:
        return ()
    if Path(model.path).expanduser().is_dir():
        which = "the files that are there now"
    elif model.revision:
        which = f"revision {model.revision}"
    else:
        which = "whatever revision is newest: model.revision pins one"
    return (f"model.trust_remote_code=true: Python code from `{model.path}` ({which}) runs with your rights",)


def _offload_notes(job: JobSpec, choice: PlanChoice) -> tuple[str, ...]:
    """What a plan that offloads asks of the machine."""
    plan, notes = choice.plan, []
    if plan is None or not plan.uses_offload:
        return ()
    if job.hardware.kind is not DeviceKind.CPU:
        notes.append(
            "DeepSpeed compiles its CPU Adam when it first runs: a C++ compiler and ninja must be there"
        )
    if plan.swaps:
        notes.append(
            "DeepSpeed compiles async_io when it first runs, for minutes: libaio with its headers must be there; no "
            "checkpoint is saved, and an interrupted run begins anew"
        )
    return tuple(notes)


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


def find_plan(job: JobSpec, tracer: Tracer | None = None) -> PlanChoice:
    """Searches the plans of a resolved job whose headroom is a number; see `plan_job`."""
    with nullcontext(tracer) if tracer else Tracer(needed_libraries(job)) as tracer:
        budget = job.hardware.memory_bytes - headroom_bytes(job)
        rates = device_rates(job.hardware, cache_folder("rates"))
        forecaster = Forecaster(job, tracer, trace_cache(job), budget, rates)
        first = next(semantic_plans(job))
        refuse = judge(job, read_residuals(EVIDENCE))
        if job.planner.pin.attention or forecaster.supports_sdpa(first):
            return search(job, forecaster, refuse)
        pin = replace(job.planner.pin, attention=Attention.EAGER)
        choice = search(replace(job, planner=replace(job.planner, pin=pin)), forecaster, refuse)
        model_type = job.model.architecture["model_type"]
        note = f"attention is eager: transformers has no scaled-dot-product attention for {model_type}"
        return replace(choice, notes=(*choice.notes, note))


def needed_libraries(job: JobSpec) -> tuple[str, ...]:
    """Optional libraries that the tracer of a job must not hide."""
    quantizes = any(uses_bitsandbytes(plan) for plan in semantic_plans(job))
    pin, several = job.planner.pin, job.hardware.world_size > 1
    is_sharded = several or bool(pin.offload_optimizer or pin.offload_parameters)
    return (("bitsandbytes",) if quantizes else ()) + (("deepspeed",) if is_sharded else ())


def trace_cache(job: JobSpec) -> TraceCache:
    """Where a job's traces are kept."""
    return TraceCache(None if job.trace_cache == "off" else Path(job.trace_cache or cache_folder("traces")))
