"""The results file: what was predicted and measured for each job, and what of it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import combinations

from launcher.hardware import HardwareSpec
from launcher.job import Method
from launcher.memory import Category, Phase
from launcher.planner.interval import Residual
from scripts.gpu_validation.jobs import ValidationJob, architecture

MAX_ATTEMPTS = 2
"""A job that failed is tried again by the next call, once."""
NEAR_BYTES = 1 << 20
"""What a category may differ by and count as right."""
PHASES = (Phase.LOAD, Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP, Phase.EVALUATION, Phase.SAVE)


class Status(StrEnum):
    """How a job ended."""

    DONE = "done"
    OUT_OF_MEMORY = "out_of_memory"
    """The card was too small although the prediction fits: a result too."""
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"
    """It was not run: it does not fit, or a package is missing."""


@dataclass(frozen=True)
class PhaseBytes:
    """Peaks of one phase."""

    allocated_bytes: int
    """Live tensors."""
    reserved_bytes: int | None = None
    """Held by the caching allocator; None: not predicted, or no such allocator."""
    device_bytes: int | None = None
    """Used on the device by the process; None: not told."""
    by_category_bytes: Mapping[Category, int] | None = None
    """What live tensors are for; None: not told."""


@dataclass(frozen=True)
class Prediction:
    """What the launcher says of a job, before it runs."""

    phases: Mapping[Phase, PhaseBytes]
    resident_bytes: Mapping[Category, int]
    device_bytes: int
    """Highest bytes on the device, context included: what decides whether the job fits."""
    seconds: float
    """What predicting took."""
    step_seconds: float | None = None
    """One optimizer step; None: the device's rates are unknown."""


@dataclass(frozen=True)
class Outcome:
    """How one run on the device went."""

    status: Status
    message: str = ""
    """What went wrong, or what is worth knowing."""
    seconds: float = 0.0
    """From the order to the end of the process."""
    measured: Mapping[Phase, PhaseBytes] = field(default_factory=dict)
    resident_bytes: Mapping[Category, int] = field(default_factory=dict)
    allocator_retries: int | None = None
    """How often the allocator had to give back its cache to go on."""
    step_seconds: tuple[float, ...] = ()
    """Of each optimizer step, the device waited for; the first ones include the kernels' warming up."""


@dataclass(frozen=True)
class JobResult:
    """One job, predicted and measured."""

    name: str
    options: ValidationJob
    predicted: Mapping[Phase, PhaseBytes]
    measured: Mapping[Phase, PhaseBytes]
    seconds: float
    status: Status
    message: str
    attempts: int = 1
    predicted_resident_bytes: Mapping[Category, int] = field(default_factory=dict)
    measured_resident_bytes: Mapping[Category, int] = field(default_factory=dict)
    predicted_device_bytes: int = 0
    """See `Prediction`."""
    allocator_retries: int | None = None
    """See `Outcome`."""
    snapshot: str = ""
    """Name of the file with the timeline of a rerun, beside this one."""
    step_seconds: tuple[float, ...] = ()
    """See `Outcome`."""
    predicted_step_seconds: float | None = None
    """See `Prediction`."""


@dataclass(frozen=True)
class Machine:
    """The device and the software, read in a bare process (see `probe`)."""

    device: str
    driver: str
    memory_bytes: int
    versions: Mapping[str, str]
    context_bytes: int | None = None
    """Used on the device after one matrix product, less what the allocator reserved; None: no CUDA device."""
    initialised_bytes: int | None = None
    """Used on the device once torch.cuda is initialised and nothing was allocated."""
    with_bitsandbytes_bytes: int | None = None
    """As `context_bytes`, once bitsandbytes is imported."""
    attention_kernels: Mapping[str, str] = field(default_factory=dict)
    """What torch's scaled-dot-product attention takes here, by case."""


@dataclass(frozen=True)
class TraceInSight:
    """Whether a tracer that sees the card does what one does that sees none."""

    job: str
    same_prediction: bool
    card_bytes: int
    """The most that the card held meanwhile beyond what it held before; 0: the tracer leaves it alone."""


@dataclass(frozen=True)
class Results:
    """The whole file."""

    device: str
    driver: str
    versions: Mapping[str, str]
    context_bytes: int | None
    machine: Machine
    hardware: HardwareSpec
    jobs: tuple[JobResult, ...] = ()
    trace_in_sight: TraceInSight | None = None


def new_results(machine: Machine, hardware: HardwareSpec) -> Results:
    """A file without jobs."""
    return Results(machine.device, machine.driver, machine.versions, machine.context_bytes, machine, hardware)


def pending(jobs: Iterable[ValidationJob], results: Iterable[JobResult]) -> list[ValidationJob]:
    """The jobs that are still to run, in order; those that failed come last, and only once more."""
    known = {result.name: result for result in results}
    new = [job for job in jobs if job.name not in known]
    again = [job for job in jobs if job.name in known and _may_run_again(known[job.name])]
    return new + again


def _may_run_again(result: JobResult) -> bool:
    return result.status in (Status.FAILED, Status.TIMED_OUT) and result.attempts < MAX_ATTEMPTS


def with_result(results: Results, result: JobResult) -> Results:
    """The file with one more result; it takes the place of an earlier one of the same job."""
    earlier = next((known for known in results.jobs if known.name == result.name), None)
    if earlier is None:
        return replace(results, jobs=(*results.jobs, result))
    counted = replace(result, attempts=earlier.attempts + 1)
    return replace(results, jobs=tuple(counted if known is earlier else known for known in results.jobs))


def with_changed(results: Results, changed: JobResult) -> Results:
    """The file with a result replaced by a version of itself."""
    return replace(
        results, jobs=tuple(changed if known.name == changed.name else known for known in results.jobs)
    )


def job_result(job: ValidationJob, prediction: Prediction | None, outcome: Outcome) -> JobResult:
    """Joins prediction and outcome."""
    result = JobResult(
        name=job.name,
        options=job,
        predicted={},
        measured=outcome.measured,
        seconds=round(outcome.seconds, 2),
        status=outcome.status,
        message=outcome.message,
        measured_resident_bytes=outcome.resident_bytes,
        allocator_retries=outcome.allocator_retries,
        step_seconds=tuple(round(seconds, 4) for seconds in outcome.step_seconds),
    )
    return result if prediction is None else with_prediction(result, prediction)


def with_prediction(result: JobResult, prediction: Prediction) -> JobResult:
    """The result with another prediction: after a change of the tracer, measurements stay what they are."""
    return replace(
        result,
        predicted=prediction.phases,
        predicted_resident_bytes=prediction.resident_bytes,
        predicted_device_bytes=prediction.device_bytes,
        predicted_step_seconds=prediction.step_seconds,
    )


def phase_error_percent(result: JobResult, phase: Phase) -> float | None:
    """Signed error of the allocated peak of a phase, percent of the measurement; None where one is missing."""
    if phase not in result.measured or phase not in result.predicted:
        return None
    measured = result.measured[phase].allocated_bytes
    return 100.0 * (result.predicted[phase].allocated_bytes - measured) / measured


def peaks_bytes(result: JobResult) -> tuple[int, int]:
    """Predicted and measured allocated peak over the phases that were measured."""
    phases = [phase for phase in result.measured if phase in result.predicted]
    predicted = max(result.predicted[phase].allocated_bytes for phase in phases)
    return predicted, max(result.measured[phase].allocated_bytes for phase in phases)


def peak_error_percent(result: JobResult) -> float:
    """Signed error of the highest allocated peak, percent of the measurement."""
    predicted, measured = peaks_bytes(result)
    return 100.0 * (predicted - measured) / measured


def category_differences_bytes(result: JobResult) -> list[int]:
    """Predicted less measured bytes of each category at each phase's peak, where both are known.

    Loading counts where it is the launcher's.
    """
    found = []
    for phase, peak in result.measured.items():
        predicted = result.predicted[phase].by_category_bytes if phase in result.predicted else None
        if predicted is None or peak.by_category_bytes is None:
            continue
        if phase is Phase.LOAD and not result.options.stored:
            continue
        names = {*predicted, *peak.by_category_bytes}
        found += [predicted.get(name, 0) - peak.by_category_bytes.get(name, 0) for name in names]
    return found


def reserved_error_percent(result: JobResult) -> float | None:
    """Signed error of the highest reserved peak, percent; None where nothing was predicted."""
    measured = [peak.reserved_bytes for peak in result.measured.values() if peak.reserved_bytes]
    predicted = [peak.reserved_bytes for peak in result.predicted.values() if peak.reserved_bytes]
    if not measured or not predicted:
        return None
    return 100.0 * (max(predicted) - max(measured)) / max(measured)


def device_error_percent(result: JobResult) -> float | None:
    """Signed error of what the process holds on the device, percent; None where nothing told it."""
    measured = [peak.device_bytes for peak in result.measured.values() if peak.device_bytes]
    if not measured or not result.predicted_device_bytes:
        return None
    return 100.0 * (result.predicted_device_bytes - max(measured)) / max(measured)


def measured_step_seconds(result: JobResult) -> float | None:
    """The shortest step after the first, in which kernels warm up; None where no other was timed."""
    return min(result.step_seconds[1:], default=None)


def step_error_percent(result: JobResult) -> float | None:
    """Signed error of the step's time, percent of the measurement; None where one is missing."""
    measured = measured_step_seconds(result)
    if not measured or not result.predicted_step_seconds:
        return None
    return 100.0 * (result.predicted_step_seconds - measured) / measured


def pairs_in_order(results: Sequence[JobResult]) -> tuple[int, int]:
    """Of the pairs of jobs whose steps differ by more than a twentieth, how many are predicted in the right order."""
    timed = [
        (measured, result.predicted_step_seconds)
        for result in results
        if (measured := measured_step_seconds(result)) and result.predicted_step_seconds
    ]
    apart = [
        (one[0] < other[0]) is (one[1] < other[1])
        for one, other in combinations(timed, 2)
        if abs(one[0] - other[0]) > 0.05 * max(one[0], other[0])
    ]
    return sum(apart), len(apart)


def residuals(results: Results) -> list[Residual]:
    """What the planner's intervals rest on: the peaks of every job that was measured, beside today's predictions."""
    found = []
    for result in comparable(results):
        model_type = str(architecture(result.options)["model_type"])
        found.append(
            Residual(results.hardware.kind, Method(result.options.method), model_type, *peaks_bytes(result))
        )
    return found


def comparable(results: Results) -> list[JobResult]:
    """Jobs that were measured and predicted, the worst under-prediction first."""
    done = [
        job for job in results.jobs if job.status is Status.DONE and set(job.measured) & set(job.predicted)
    ]
    return sorted(done, key=peak_error_percent)


def worst(results: Results, count: int) -> list[JobResult]:
    """The jobs that are furthest off in any phase, either way."""

    def error(result: JobResult) -> float:
        errors = [phase_error_percent(result, phase) for phase in result.measured]
        return max(abs(value) for value in errors if value is not None)

    return sorted(comparable(results), key=error, reverse=True)[:count]


def table(results: Results) -> str:
    """The comparison as a markdown table, under-predictions first."""
    heads = [
        "job",
        "predicted, GiB",
        "measured, GiB",
        "allocated",
        "reserved",
        "device",
        *PHASES,
        "step, s",
        "step",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for result in comparable(results):
        predicted, measured = peaks_bytes(result)
        errors = [
            peak_error_percent(result),
            reserved_error_percent(result),
            device_error_percent(result),
            *(phase_error_percent(result, phase) for phase in PHASES),
        ]
        words = ["" if error is None else f"{error:+.2f} %" for error in errors]
        seconds, error = measured_step_seconds(result), step_error_percent(result)
        words += ["" if seconds is None else f"{seconds:.3f}", "" if error is None else f"{error:+.0f} %"]
        cells = [result.name, f"{predicted / 2**30:.3f}", f"{measured / 2**30:.3f}", *words]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """How far off the predictions are, what a process holds beside its tensors, and which jobs have no result."""
    lines = [f"{results.device}, driver {results.driver}, {_words(results.versions)}"]
    compared = comparable(results)
    if compared:
        errors = [peak_error_percent(result) for result in compared]
        lines.append(
            f"{len(errors)} jobs: median absolute error {statistics.median(map(abs, errors)):.2f} %, "
            f"worst {max(errors, key=abs):+.2f} %, under-predicted {sum(error < 0 for error in errors)}"
        )
    slips = [error for result in compared if (error := step_error_percent(result)) is not None]
    if slips:
        right, pairs = pairs_in_order(compared)
        lines.append(
            f"step times: median error {statistics.median(slips):+.0f} %, median absolute error "
            f"{statistics.median(map(abs, slips)):.0f} %, worst {max(slips, key=abs):+.0f} %; {right} of {pairs} pairs "
            "of jobs more than 5 % apart are predicted in the right order"
        )
    differences = [size for result in compared for size in category_differences_bytes(result)]
    if differences:
        near = sum(abs(size) <= NEAR_BYTES for size in differences)
        lines.append(
            f"{near} of {len(differences)} category sizes at the peaks of phases within {NEAR_BYTES / 2**20:g} MiB, "
            f"lowest {min(differences) / 2**20:+.2f} MiB, highest {max(differences) / 2**20:+.2f} MiB"
        )
    outside = _outside_bytes(compared)
    if outside:
        lines.append(
            f"held outside the allocator: {min(outside) / 2**20:.0f} to {max(outside) / 2**20:.0f} MiB, "
            f"{(results.context_bytes or 0) / 2**20:.0f} MiB in a bare process, "
            f"{results.hardware.context_bytes / 2**20:.0f} MiB assumed"
        )
    if results.trace_in_sight is not None:
        seen = results.trace_in_sight
        lines.append(
            f"traced with the card in sight: {'the same' if seen.same_prediction else 'ANOTHER'} prediction, "
            f"{seen.card_bytes / 2**20:.0f} MiB of the card taken"
        )
    others = [result for result in results.jobs if result.status is not Status.DONE]
    lines += [f"- {result.name}: {result.status}, {_last_line(result.message)}" for result in others]
    return "\n".join(lines)


def _outside_bytes(compared: Sequence[JobResult]) -> list[int]:
    """What each process held on the device beyond what its allocator reserved, at its peak."""
    peaks = [peak for result in compared for peak in result.measured.values()]
    return [
        peak.device_bytes - peak.reserved_bytes for peak in peaks if peak.device_bytes and peak.reserved_bytes
    ]


def _last_line(message: str) -> str:
    return next(reversed(message.splitlines()), "")


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
