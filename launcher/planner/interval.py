"""How far off a prediction may be: conformal intervals from what predictions were measured to miss before.

Nothing is assumed about how errors are distributed, only that the next run is one like those before. Of n earlier
runs of a kind, the next one's ratio of measured to predicted is at most the k-th smallest with probability
k / (n + 1) (split conformal prediction; Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from launcher.hardware import DeviceKind
from launcher.job import JobSpec, Method
from launcher.memory import Interval, MemoryEstimate
from launcher.plan import Plan

EVIDENCE = Path(__file__).resolve().parent / "evidence"
"""Recorded residuals: written by scripts/accuracy.py, scripts/published.py and scripts/gpu_validation."""
COVERAGE = 0.95
"""Probability with which a measurement lies below the upper end of an interval; and above the lower one."""
CONVENTION = 0.05
"""Share of the device kept free where nothing has been measured yet: what peers keep, no evidence."""
RUNS_FOR_HEADROOM = 9
"""Runs of a kind that replace the convention: with nine, the next one is as good as the worst with 90 %."""


@dataclass(frozen=True)
class Residual:
    """One run's measurement beside its prediction."""

    device_kind: DeviceKind
    """Where it ran."""
    method: Method
    """How it was trained."""
    model_type: str
    """Architecture, by its transformers name."""
    predicted_bytes: int
    """Predicted peak."""
    measured_bytes: int
    """Measured peak of the same quantity."""

    @property
    def ratio(self) -> float:
        """Measured over predicted; above 1 is an under-prediction."""
        return self.measured_bytes / self.predicted_bytes


def read_residuals(folder: Path) -> tuple[Residual, ...]:
    """Recorded residuals: those of every JSON file in a folder."""
    reader = TypeAdapter(tuple[Residual, ...])
    files = sorted(folder.glob("*.json"))
    return tuple(
        residual
        for file in files
        for residual in reader.validate_python(json.loads(file.read_text(encoding="utf-8")))
    )


def like(residuals: Iterable[Residual], kind: DeviceKind, method: Method) -> tuple[Residual, ...]:
    """Residuals of the same kind: the same device and method, or the same device where the method is new."""
    here = tuple(residual for residual in residuals if residual.device_kind is kind)
    same = tuple(residual for residual in here if residual.method is method)
    return same or here


def interval(num_bytes: int, residuals: Sequence[Residual], model_type: str) -> Interval | None:
    """The interval around a predicted peak; None without residuals.

    Where no run of the architecture is among them, the architectures stand for the runs: each counts with its worst
    run, since what is asked is how far off the first run of yet another one may be.

    Args:
        num_bytes: The predicted peak.
        residuals: Residuals of the same kind.
        model_type: Architecture of the job.
    """
    types = sorted({residual.model_type for residual in residuals})
    if not types:
        return None
    by_type = [[r.ratio for r in residuals if r.model_type == name] for name in types]
    if model_type in types:
        highest = lowest = [residual.ratio for residual in residuals]
    else:
        highest, lowest = [max(ratios) for ratios in by_type], [min(ratios) for ratios in by_type]
    above, coverage = quantile(highest)
    below, _ = quantile([-ratio for ratio in lowest])
    return Interval(
        low_bytes=round(num_bytes * -below),
        high_bytes=round(num_bytes * above),
        coverage=coverage,
        num_runs=len(residuals),
        is_new_architecture=model_type not in types,
    )


def with_interval(
    estimate: MemoryEstimate, plan: Plan, job: JobSpec, residuals: Sequence[Residual]
) -> MemoryEstimate:
    """The estimate of a job's plan, with its interval.

    Args:
        estimate: Memory of the plan.
        plan: The plan.
        job: The job, resolved.
        residuals: Recorded residuals of all kinds.
    """
    same = like(residuals, job.hardware.kind, plan.method)
    found = interval(estimate.peak_allocated_bytes, same, job.model.architecture.get("model_type", ""))
    return replace(estimate, interval=found)


def quantile(values: Sequence[float]) -> tuple[float, float]:
    """The smallest of some values that the next one exceeds with 1 - COVERAGE at most, and its true coverage.

    With too few values that is the largest, and its coverage is lower.
    """
    count = len(values)
    rank = min(count, math.ceil((count + 1) * COVERAGE))
    return sorted(values)[rank - 1], rank / (count + 1)


def headroom_fraction(residuals: Sequence[Residual]) -> float | None:
    """The share of a device that evidence asks to keep free; None where it is too thin to say."""
    if len(residuals) < RUNS_FOR_HEADROOM:
        return None
    above, _ = quantile([residual.ratio for residual in residuals])
    return max(0.0, 1.0 - 1.0 / above)
