"""The course of a validation: predictions beside the device, one job after another on it, a file after each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pynvml
from pydantic import TypeAdapter

from launcher.documents import read_document, write_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.run.detect import detect_cpu_memory_bytes, detect_cuda, resolve_hardware
from scripts.gpu_validation.jobs import ROOT, ValidationJob, hardware_facts, missing_package
from scripts.gpu_validation.orders import Answer
from scripts.gpu_validation.processes import Device, Predictor, child_environment, probe, tracer_environment
from scripts.gpu_validation.results import (
    JobResult,
    Outcome,
    Prediction,
    Results,
    Status,
    TraceInSight,
    comparable,
    job_result,
    new_results,
    pending,
    with_changed,
    with_prediction,
    with_result,
    worst,
)

HEADROOM = 0.05
"""Share of the card that a prediction must leave free, as in the launcher's own plans."""
NUM_TIMELINES = 3
TIMELINE_SHARE = 0.15
"""Share of the time budget kept for the timelines of the worst jobs."""
TRACE_SECONDS = 60.0
"""How long one prediction may take; usual is half a second, and a quarter of a minute for the first."""


@dataclass(frozen=True)
class Order:
    """What to do."""

    out: Path
    """The results file; one that exists is continued."""
    jobs: tuple[ValidationJob, ...]
    """Most informative first."""
    hardware: HardwareSpec
    """The device at hand."""
    budget_seconds: float
    limit_seconds: float
    """For each job."""
    timelines: bool
    """Whether the worst jobs are run again with a timeline."""


def detect_hardware(*, cpu: bool) -> HardwareSpec:
    """The device at hand, with the launcher's facts of it.

    Raises:
        LaunchError: When a CUDA device is asked for and none is there.
    """
    devices = () if cpu else detect_cuda()
    if not cpu and not devices:
        raise LaunchError("no CUDA device is here", "`--cpu` proves the plumbing, `--dry-run` only predicts")
    names = sorted(file.stem for file in (ROOT / "conf" / "hardware").glob("*.yaml"))
    known = [hardware_facts(name) for name in names]
    kind = DeviceKind.CPU if cpu else DeviceKind.AUTO
    wanted = HardwareSpec(kind=kind) if not cpu else named_hardware("cpu")
    return resolve_hardware(wanted, known, devices, detect_cpu_memory_bytes())


def _facts_of(hardware: HardwareSpec) -> HardwareSpec:
    """Today's facts of a device, with the memory that was detected."""
    known = (named_hardware(file.stem) for file in sorted((ROOT / "conf" / "hardware").glob("*.yaml")))
    same = next((facts for facts in known if facts.product and facts.product == hardware.product), hardware)
    return replace(same, memory_bytes=hardware.memory_bytes)


def named_hardware(name: str) -> HardwareSpec:
    """A device of conf/hardware."""
    return TypeAdapter(HardwareSpec).validate_python(hardware_facts(name))


def validate(order: Order, folder: Path, say: Callable[[str], None]) -> Results:
    """Runs what is left of the jobs until the time is up.

    Args:
        order: What to do.
        folder: For logs and documents of the processes.
        say: Called with a line after each job.

    Raises:
        LaunchError: When the results file is of another device.
    """
    ends_at = time.monotonic() + order.budget_seconds
    jobs_end_at = ends_at - (TIMELINE_SHARE * order.budget_seconds if order.timelines else 0.0)
    known = _known(order)
    waiting = pending(order.jobs, known.jobs if known is not None else ())
    names = [job.name for job in waiting]
    environment = tracer_environment(os.environ)
    with (
        Predictor(names, order.hardware, environment, folder) as predictor,
        Device(order.hardware, folder) as device,
    ):
        if waiting:
            device.get_ready(waiting[0])
        results = new_results(probe(order.hardware, folder), order.hardware) if known is None else known
        for position, job in enumerate(waiting):
            if time.monotonic() + order.limit_seconds > jobs_end_at:
                say(f"time is up, {len(waiting) - position} jobs are left for another call")
                break
            answer = predictor.answer(job.name, TRACE_SECONDS) or Answer(job.name, None, "not in time")
            following = next(iter(waiting[position + 1 :]), None)
            outcome = _run(order, job, answer, device, following)
            result = job_result(job, answer.prediction, outcome)
            results = with_result(results, result)
            write_document(order.out, results)
            say(line(result))
        if order.timelines:
            results = _add_timelines(order, results, device, ends_at, say)
    if order.hardware.kind is not DeviceKind.CPU and time.monotonic() + order.limit_seconds < ends_at:
        results = _trace_in_sight(order, results, folder)
    return results


def _known(order: Order) -> Results | None:
    """The results file, if there is one."""
    if not order.out.exists():
        return None
    results = read_document(order.out, Results)
    if results.hardware.product != order.hardware.product:
        raise LaunchError(
            f"`{order.out}` was measured on {results.hardware.product}, this is {order.hardware.product}",
            "give another file",
        )
    return results


def _run(
    order: Order, job: ValidationJob, answer: Answer, device: Device, following: ValidationJob | None
) -> Outcome:
    missing = missing_package(job)
    if missing is not None:
        return Outcome(Status.SKIPPED, f"needs {missing}")
    if answer.prediction is None:
        return Outcome(Status.FAILED, f"not predicted: {answer.message}")
    shortage = reason_against(answer.prediction, order.hardware)
    if shortage is not None:
        return Outcome(Status.SKIPPED, shortage)
    return device.run(job, order.limit_seconds, following)


def reason_against(prediction: Prediction, hardware: HardwareSpec) -> str | None:
    """Why a job is not worth running on a device; None when it fits."""
    usable = int(hardware.memory_bytes * (1 - HEADROOM))
    if prediction.device_bytes <= usable:
        return None
    return f"predicted {prediction.device_bytes / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB are usable"


def _add_timelines(
    order: Order, results: Results, device: Device, ends_at: float, say: Callable[[str], None]
) -> Results:
    names = [job.name for job in order.jobs]
    for result in worst(results, NUM_TIMELINES):
        if result.snapshot or result.name not in names:
            continue
        if time.monotonic() + order.limit_seconds > ends_at:
            break
        number = names.index(result.name)
        target = order.out.with_name(f"{order.out.stem}-timeline-{number}.json.gz")
        job = order.jobs[number]
        outcome = device.run(job, order.limit_seconds, None, str(target.resolve()))
        say(f"timeline of {result.name}: {outcome.status} {outcome.message}")
        if target.exists():
            results = with_changed(results, replace(result, snapshot=target.name))
            write_document(order.out, results)
    return results


def _trace_in_sight(order: Order, results: Results, folder: Path) -> Results:
    """Predicts one job again by a tracer that sees the card, as the launcher's own does."""
    measured = comparable(results)
    if results.trace_in_sight is not None or not measured:
        return results
    subject = measured[0]
    environment = child_environment(order.hardware, {}, os.environ)
    before = highest = card_bytes()
    with Predictor([subject.name], order.hardware, environment, folder) as predictor:
        deadline = time.monotonic() + order.limit_seconds
        answer = None
        while answer is None and time.monotonic() < deadline:
            answer = predictor.answer(subject.name, 0.2)
            highest = max(highest, card_bytes())
    if answer is None or answer.prediction is None:
        return results
    same = with_prediction(subject, answer.prediction) == subject
    seen = replace(results, trace_in_sight=TraceInSight(subject.name, same, highest - before))
    write_document(order.out, seen)
    return seen


def card_bytes() -> int:
    """What all processes hold on the first card, by the driver."""
    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def predict_again(path: Path, folder: Path) -> Results:
    """Replaces the predictions of a results file by those of today's tracer; measurements stay.

    The device's facts are those of today, too, where its product is known.
    """
    results = read_document(path, Results)
    results = replace(results, hardware=_facts_of(results.hardware))
    names = [result.name for result in results.jobs if result.predicted]
    with Predictor(names, results.hardware, tracer_environment(os.environ), folder) as predictor:
        for result in results.jobs:
            answer = predictor.answer(result.name, TRACE_SECONDS) if result.predicted else None
            if answer is not None and answer.prediction is not None:
                results = with_changed(results, with_prediction(result, answer.prediction))
    write_document(path, results)
    return results


def dry_run(jobs: Sequence[ValidationJob], hardware: HardwareSpec, folder: Path) -> list[Answer]:
    """Only predicts."""
    names = [job.name for job in jobs]
    with Predictor(names, hardware, tracer_environment(os.environ), folder) as predictor:
        found = [predictor.answer(name, TRACE_SECONDS) for name in names]
    return [answer or Answer(name, None, "not in time") for name, answer in zip(names, found, strict=True)]


def line(result: JobResult) -> str:
    """A result in one line."""
    peaks = [
        f"{phase} {result.predicted[phase].allocated_bytes / 2**20:.0f}/{peak.allocated_bytes / 2**20:.0f}"
        for phase, peak in result.measured.items()
        if phase in result.predicted
    ]
    words = ", ".join(peaks) if result.status is Status.DONE else result.message
    return f"{result.status} {result.seconds:.0f} s  {result.name}: {words}"
