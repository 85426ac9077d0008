"""The results file of jobs on several ranks: what was predicted and measured of each, and what of it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.hardware import HardwareSpec
from launcher.memory import MemoryEstimate, MemoryMeasurement
from launcher.plan import Plan
from scripts.accuracy_ranks import PHASES, WITHIN, RankJob
from scripts.gpu_validation.rank_run import RankRun
from scripts.gpu_validation.results import Status

PEAK = "peak"
MIB = 1 << 20


@dataclass(frozen=True)
class RankResult:
    """One job, predicted and measured."""

    name: str
    plan: Plan
    ranks: int
    status: Status
    message: str
    """What went wrong: the ends of the ranks' logs, or why nothing was predicted."""
    seconds: float
    """Wall time of the run, libraries included."""
    measured: tuple[MemoryMeasurement, ...] = ()
    """Of each rank that came so far, in order."""
    step_seconds: tuple[float | None, ...] = ()
    """Of each rank; ranks share the card, and exchange through sockets, so that it says little of the engine."""
    last_losses: tuple[float | None, ...] = ()
    """Of each rank: those that train together say the same."""
    predicted: MemoryEstimate | None = None
    """For the rank that takes most."""
    predicting_seconds: float = 0.0
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Predicted over measured allocated bytes less one, of each rank, by phase; `peak`: over all phases."""


@dataclass(frozen=True)
class RankResults:
    """The whole file."""

    date: str
    device: str
    hardware: HardwareSpec
    versions: Mapping[str, str]
    """Of libraries, CUDA, and NCCL."""
    environment: Mapping[str, str]
    """What every rank's environment had beyond what the launcher gives it."""
    architecture: Mapping[str, Any]
    jobs: tuple[RankResult, ...] = ()


def result_of(entry: RankJob, run: RankRun) -> RankResult:
    """What came of a run, before anybody says what was predicted."""
    return RankResult(
        name=entry.name,
        plan=entry.plan,
        ranks=entry.plan.world_size,
        status=run.status,
        message=run.message,
        seconds=run.seconds,
        measured=run.measured,
        step_seconds=tuple(outcome.step_seconds for outcome in run.outcomes),
        last_losses=tuple(outcome.last_loss for outcome in run.outcomes),
    )


def with_estimate(result: RankResult, estimate: MemoryEstimate, seconds: float) -> RankResult:
    """The result with a prediction, or with another one; measurements stay what they are."""
    errors = {
        PEAK: tuple(
            _error(estimate.peak_allocated_bytes, rank.peak_allocated_bytes) for rank in result.measured
        )
    }
    for phase in PHASES:
        expected = estimate.phase(phase)
        taken = [
            found.allocated_bytes for rank in result.measured if (found := rank.phase(phase)) is not None
        ]
        if expected is not None and taken:
            errors[phase.value] = tuple(_error(expected.allocated_bytes, size) for size in taken)
    return replace(result, predicted=estimate, predicting_seconds=seconds, errors=errors)


def _error(predicted_bytes: int, measured_bytes: int) -> float:
    return predicted_bytes / measured_bytes - 1 if measured_bytes else 0.0


def with_rank_result(results: RankResults, result: RankResult) -> RankResults:
    """The file with a result, which takes the place of an earlier one of the same job."""
    if all(known.name != result.name for known in results.jobs):
        return replace(results, jobs=(*results.jobs, result))
    return replace(
        results, jobs=tuple(result if known.name == result.name else known for known in results.jobs)
    )


def waiting_jobs(jobs: Sequence[RankJob], known: Iterable[RankResult]) -> list[RankJob]:
    """The jobs that are still to run, in order; those that did not end well come last."""
    statuses = {result.name: result.status for result in known}
    new = [job for job in jobs if job.name not in statuses]
    return new + [job for job in jobs if statuses.get(job.name, Status.DONE) is not Status.DONE]


def rank_line(result: RankResult) -> str:
    """A result in one line."""
    errors = ", ".join(f"{name} {_percents(values)}" for name, values in result.errors.items())
    words = errors if result.status is Status.DONE and errors else " ".join(result.message.split())[-300:]
    return f"{result.status} {result.seconds:.0f} s  {result.name}: {words}"


def compared(results: RankResults) -> list[RankResult]:
    """Jobs that were measured and predicted, the lowest prediction first."""
    both = [
        result for result in results.jobs if result.status is Status.DONE and result.predicted is not None
    ]
    return sorted(both, key=lambda result: min(result.errors[PEAK]))


def rank_table(results: RankResults) -> str:
    """The comparison as a markdown table, and a summary; phases are compared with the rank that takes most."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [f"{results.device}, {results.date}, {versions}", ""]
    shown = compared(results)
    if shown:
        lines += [_summary(shown), ""]
    heads = ["job", "predicted peak, MiB", "measured, MiB", "errors", *PHASES, "reserved", "outside, MiB"]
    lines += ["| " + " | ".join(heads) + " |", "|---|--:|---|---|" + "--:|" * (len(heads) - 5) + "---|"]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in shown]
    others = [result for result in results.jobs if result not in shown]
    lines += ["", *(f"- {result.name}: {result.status}, {_first_words(result)}" for result in others)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(shown: Sequence[RankResult]) -> str:
    errors = [error for result in shown for error in result.errors[PEAK]]
    within = sum(abs(error) <= WITHIN for error in errors)
    return (
        f"{within} of {len(errors)} ranks within {100 * WITHIN:.0f} %; the median error is "
        f"{100 * statistics.median(map(abs, errors)):.3f} %, the lowest {100 * min(errors):+.2f} %, the highest "
        f"{100 * max(errors):+.2f} %."
    )


def _cells(result: RankResult) -> list[str]:
    predicted = result.predicted
    assert predicted is not None  # as `compared` has it
    measured = [rank.peak_allocated_bytes for rank in result.measured]
    phases = [result.errors.get(phase.value) for phase in PHASES]
    return [
        result.name,
        f"{predicted.peak_allocated_bytes / MIB:.2f}",
        ", ".join(f"{size / MIB:.2f}" for size in measured),
        ", ".join(f"{100 * error:+.3f} %" for error in result.errors[PEAK]),
        # the lowest of the ranks' errors is that of the rank that takes most
        *("" if errors is None else f"{100 * min(errors):+.2f} %" for errors in phases),
        _reserved(predicted, result.measured),
        ", ".join(_outside(rank) for rank in result.measured),
    ]


def _reserved(predicted: MemoryEstimate, measured: Sequence[MemoryMeasurement]) -> str:
    """Error of what the caching allocator holds at most, of the rank that takes most."""
    held = [phase.reserved_bytes for rank in measured for phase in rank.phases if phase.reserved_bytes]
    if not held or predicted.peak_reserved_bytes is None:
        return ""
    return f"{100 * (predicted.peak_reserved_bytes / max(held) - 1):+.2f} %"


def _outside(rank: MemoryMeasurement) -> str:
    """What a rank holds on the device at its peak beyond what its allocator reserved: context, kernels, NCCL."""
    outside = [
        phase.device_bytes - phase.reserved_bytes
        for phase in rank.phases
        if phase.device_bytes and phase.reserved_bytes
    ]
    return f"{max(outside) / MIB:.0f}" if outside else ""


def _percents(errors: Sequence[float]) -> str:
    return "/".join(f"{100 * error:+.2f} %" for error in errors)


def _first_words(result: RankResult) -> str:
    return " ".join(result.message.split())[:200] or "not predicted"
