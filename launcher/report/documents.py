"""The machine-readable document that `output=json` prints: one shape for plans and for runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.cluster import SubmittedJob
from launcher.memory import Category, HeldMemory, MemoryEstimate, MemoryMeasurement
from launcher.plan import Plan, PlanChoice, Squeeze
from launcher.run_record import Rehearsal, Replan, RunRecord, WorkerOrder
from launcher.step_time import StepTime


def plan_document(
    choice: PlanChoice, versions: Mapping[str, str], planning_seconds: float, run_dir: str
) -> dict[str, Any]:
    """A plan, before its run."""
    return {
        "feasible": choice.feasible,
        "plan": plan_fields(choice.plan) if choice.plan else None,
        "reason": choice.reason,
        "predicted": predicted_fields(choice.estimate, choice.step) if choice.estimate else None,
        "runner_up": plan_fields(choice.runner_up) if choice.runner_up else None,
        "capacity_bytes": choice.capacity_bytes,
        "headroom_bytes": choice.headroom_bytes,
        "rejected": [
            {
                "plan": plan_fields(item.plan),
                "reason": item.reason,
                "short_by_bytes": item.short_by_bytes,
                "peak_device_bytes": item.peak_bytes or None,
                "step_seconds": item.step_seconds,
                "is_refused": item.is_refused,
                "is_host_short": item.is_host_short,
                "is_nvme_short": item.is_nvme_short,
            }
            for item in choice.rejected
        ],
        "num_considered": choice.num_considered,
        "squeeze": None if choice.squeeze is None else squeeze_fields(choice.squeeze),
        "notes": list(choice.notes),
        "run_dir": run_dir,
        "versions": dict(versions),
        "planning_seconds": planning_seconds,
    }


def ordered_document(order: WorkerOrder, versions: Mapping[str, str], run_dir: str) -> dict[str, Any]:
    """A plan of which only the order is left: what else was considered is not known."""
    reason = "as ordered; why is no longer known"
    choice = PlanChoice(order.plan, reason, order.predicted, None, None, (), 0, 0, 0, order.predicted_step)
    unknown = ("capacity_bytes", "headroom_bytes", "num_considered", "planning_seconds")
    document = plan_document(choice, versions, 0.0, run_dir)
    return {**document, **dict.fromkeys(unknown), "profile": order.job.profile.value}


def squeeze_fields(squeeze: Squeeze) -> dict[str, Any]:
    """How tight a plan is, as plain values."""
    return {**asdict(squeeze), "grade": squeeze.grade.value, "savers": list(squeeze.savers)}


def handed_over_fields(command: str, job: SubmittedJob | None) -> dict[str, Any]:
    """What it adds to a plan's document that a cluster runs it; `job_id` is null where the user submits."""
    return {
        "measured": None,
        "state": "submitted" if job else "prepared",
        "job_id": job.job_id if job else None,
        "submit_command": command,
    }


def run_fields(record: RunRecord) -> dict[str, Any]:
    """What a run adds to its plan's document."""
    return {
        "measured": measured_fields(record.measured, record) if record.measured else None,
        "measured_ranks": [
            {"rank": measured.rank, **measured_fields(measured, record)} for measured in record.measured_ranks
        ],
        "predicted_as_run": (
            None
            if record.predicted_as_run is None
            else predicted_fields(record.predicted_as_run, record.predicted_step_as_run)
        ),
        "outcome": {
            **asdict(record.outcome),
            "status": record.outcome.status.value,
            "phase": record.outcome.phase.value if record.outcome.phase else None,
            "held": held_fields(record.outcome.held),
        },
        **rehearsal_fields(record.rehearsal, record.replans),
        "leak": (
            None
            if record.leak is None
            else {**asdict(record.leak), "gib_per_1000_steps": record.leak.gib_per_1000_steps}
        ),
        "run_dir": record.run_dir,
    }


def record_document(record: RunRecord) -> dict[str, Any]:
    """A past run."""
    return {
        "recipe": record.recipe,
        "model": record.model,
        "hardware": record.hardware,
        "started": record.started,
        "plan": plan_fields(record.plan),
        "predicted": predicted_fields(record.predicted, record.predicted_step),
        "versions": dict(record.versions),
        **run_fields(record),
    }


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    fields = {
        name: value.value if hasattr(value, "value") else value
        for name, value in ((name, getattr(plan, name)) for name in plan.__dataclass_fields__)
    }
    return {**fields, "buckets": asdict(plan.buckets) if plan.buckets else None}


def predicted_fields(estimate: MemoryEstimate, step: StepTime | None) -> dict[str, Any]:
    """A prediction as plain values.

    `peak_reserved_bytes` is null where there is no caching allocator; `step_seconds` and `tokens_per_second` where
    nobody knows how fast the device is; `nvme_bytes` where nothing is swapped.
    `disk_bytes.num_checkpoints` is null where the number of steps is not known.
    """
    host, disk = estimate.host, estimate.disk
    return {
        "peak_allocated_bytes": estimate.peak_allocated_bytes,
        "peak_reserved_bytes": estimate.peak_reserved_bytes,
        "peak_device_bytes": estimate.peak_device_bytes,
        "peak_phase": estimate.peak.phase.value,
        "by_category_bytes": {name.value: size for name, size in estimate.peak.by_category_bytes.items()},
        "by_phase_bytes": {peak.phase.value: peak.allocated_bytes for peak in estimate.phases},
        "by_phase_and_category_bytes": {
            peak.phase.value: _named(peak.by_category_bytes) for peak in estimate.phases
        },
        "reserved_by_phase_bytes": {peak.phase.value: peak.reserved_bytes for peak in estimate.phases},
        "resident_bytes": {name.value: size for name, size in estimate.resident_bytes.items()},
        "interval": None if estimate.interval is None else asdict(estimate.interval),
        "host_peak_bytes": None if host is None else host.peak_bytes,
        "host_by_category_bytes": None if host is None else dict(host.by_category_bytes),
        "pinned_bytes": None if host is None else host.pinned_bytes,
        "disk_bytes": None if disk is None else {**asdict(disk), "total_bytes": disk.total_bytes},
        "nvme_bytes": None if estimate.nvme is None else estimate.nvme.file_bytes,
        "locked_bytes": None if estimate.nvme is None else estimate.nvme.locked_bytes,
        "step_seconds": None if step is None else step.seconds,
        "tokens_per_second": None if step is None else step.tokens_per_second,
        "rates": None if step is None else step.rates,
        "is_calibrated": step is not None and step.is_calibrated,
    }


def measured_fields(measured: MemoryMeasurement, record: RunRecord) -> dict[str, Any]:
    """A measurement as plain values, with the keys of a prediction.

    Where the meter can't tell what memory was for, `by_category_bytes` holds what can be weighed on live objects
    (parameters, buffers, gradients, optimizer state) and the rest of the peak as `working_set`, and a phase has null in
    `by_phase_and_category_bytes`.
    """
    reserved = [phase.reserved_bytes for phase in measured.phases if phase.reserved_bytes is not None]
    device = [phase.device_bytes for phase in measured.phases if phase.device_bytes is not None]
    highest = max(measured.phases, key=lambda phase: phase.allocated_bytes)
    weighed = {
        **{name.value: size for name, size in measured.resident_bytes.items()},
        "working_set": measured.peak_allocated_bytes - sum(measured.resident_bytes.values()),
    }
    return {
        "peak_allocated_bytes": measured.peak_allocated_bytes,
        "peak_reserved_bytes": max(reserved, default=None),
        "peak_device_bytes": max(device, default=None),
        "peak_phase": highest.phase.value,
        "by_category_bytes": _named(highest.by_category_bytes) or weighed,
        "by_phase_bytes": {phase.phase.value: phase.allocated_bytes for phase in measured.phases},
        "by_phase_and_category_bytes": {
            phase.phase.value: _named(phase.by_category_bytes) for phase in measured.phases
        },
        "resident_bytes": {name.value: size for name, size in measured.resident_bytes.items()},
        "host_peak_bytes": measured.host_peak_bytes,
        "disk_bytes": {f"{name}_bytes": size for name, size in measured.disk_bytes.items()},
        "step_seconds": record.outcome.step_seconds,
        "tokens_per_second": record.outcome.tokens_per_second,
        "meter": measured.meter,
        "shapes": [[shape.micro_batch_size, shape.length] for shape in measured.shapes],
    }


def _named(by_category_bytes: Mapping[Category, int] | None) -> dict[str, int] | None:
    if by_category_bytes is None:
        return None
    return {name.value: size for name, size in by_category_bytes.items()}


def held_fields(held: HeldMemory | None) -> dict[str, Any] | None:
    """What a worker had when it ran out of memory; null where it could not say."""
    if held is None:
        return None
    return {
        **asdict(held),
        "resident_bytes": {name.value: size for name, size in held.resident_bytes.items()},
    }


def rehearsal_fields(rehearsal: Rehearsal | None, replans: Sequence[Replan]) -> dict[str, Any]:
    """What rehearsal and recoveries add to a run's document."""
    shown = None
    if rehearsal is not None:
        predicted, measured = rehearsal.predicted, rehearsal.measured
        shown = {
            "predicted_by_phase_bytes": {peak.phase.value: peak.allocated_bytes for peak in predicted.phases},
            "measured_by_phase_bytes": {
                phase.phase.value: phase.allocated_bytes for phase in measured.phases
            },
            "shapes": [[shape.micro_batch_size, shape.length] for shape in measured.shapes],
            "seconds": rehearsal.seconds,
            "findings": [{**vars(finding), "phase": finding.phase.value} for finding in rehearsal.findings],
        }
    return {
        "rehearsal": shown,
        "replans": [
            {
                "phase": replan.phase.value if replan.phase else None,
                "message": replan.message,
                "in_rehearsal": replan.in_rehearsal,
                "failed": plan_fields(replan.failed),
                "taken": plan_fields(replan.taken),
                "change": replan.change,
                "from_step": replan.from_step,
                "by_user": replan.by_user,
                "held": held_fields(replan.held),
            }
            for replan in replans
        ],
    }
