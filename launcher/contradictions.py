"""What a job, its hardware and its pinned knobs can't all have, as far as it is known without a trace or a network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.cluster_limits import cluster_limits
from launcher.config import catalogue_entry, hardware_entries
from launcher.errors import ConfigError, DataError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Action, JobSpec, ModelSpec, ReportFormat
from launcher.knob_limits import knob_limits, model_limits, offload_is_refused
from launcher.planner.pins import pin_limits
from launcher.reading import Reading
from launcher.run.detect import (
    DetectedDevice,
    detect_cpu_memory_bytes,
    detect_cuda,
    is_installed,
    resolve_hardware,
)
from launcher.run.fetch import PACKAGED_PREFIX
from launcher.run.model_facts import resolve_model
from launcher.run_paths import run_of

Problem = tuple[str, str]
"""What is wrong, and a hint."""


def contradictions(job: JobSpec, hardware: HardwareSpec, model: ModelSpec | None) -> tuple[Problem, ...]:
    """What a job can't have together, each with a hint; empty when nothing is wrong.

    Args:
        job: The job, as composed: its hardware may still be `auto`.
        hardware: Where it is to run, resolved.
        model: What is trained, resolved; None where it is not known.
    """
    planner, pin = job.planner, job.planner.pin
    if offload_is_refused(job, hardware):  # told once is enough
        pin = replace(pin, offload_optimizer=None, offload_parameters=None, offload_device=None)
    resolved = replace(job, hardware=hardware, model=model or replace(job.model, architecture={}))
    return (
        *cluster_limits(job, job.model.path.startswith(PACKAGED_PREFIX)),
        *knob_limits(job, hardware, is_installed),
        *(() if model is None else model_limits(resolved)),
        *pin_limits(replace(resolved, planner=replace(planner, pin=pin))),
        *_report_limits(job),
    )


def _report_limits(job: JobSpec) -> tuple[Problem, ...]:
    """The page of a plan shows the measured step of a past run, if one is named."""
    if (
        job.action in (Action.PLAN, Action.EXPLAIN)
        and job.report.format is not ReportFormat.NONE
        and job.run_dir
    ):
        try:
            run_of("run_dir", Path(job.run_dir).resolve())
        except ConfigError as failure:
            return ((failure.message, failure.hint),)
    return ()


def refusal(problems: Sequence[Problem]) -> ConfigError:
    """Contradictions as one error."""
    return ConfigError("; ".join(what for what, _ in problems), "; ".join(hint for _, hint in problems))


def checked_job(reading: Reading) -> JobSpec:
    """The job that a command line describes, if it can be had, as far as that is known before the planner is imported.

    Raises:
        ConfigError: With every mistake of the command line, and all that would be refused after it.
    """
    problems = _foreseen(reading)
    if problems and not reading.mistakes:
        raise refusal(problems)
    return reading.with_mistakes(f"{what}; {hint}" for what, hint in problems).settled()


def _foreseen(reading: Reading) -> tuple[Problem, ...]:
    """What planning will refuse; nothing of hardware that was misread, nor of a model that only its hub describes."""
    job = reading.job
    misread_groups = {key.partition(".")[0] for key in reading.misread}
    if job is None or not _is_planned(job) or "hardware" in misread_groups:
        return ()
    hardware = hardware_here(job.hardware, detect_cuda() if job.hardware.kind is DeviceKind.AUTO else ())
    model: ModelSpec | None = None
    if "model" not in misread_groups and _is_described_here(job):
        try:
            model = resolve_model(job.model, catalogue_entry)
        except ConfigError as failure:
            return (*contradictions(job, hardware, None), (failure.message, failure.hint))
        except DataError:
            pass  # told with its own exit code, once the configuration is right
    return contradictions(job, hardware, model)


def hardware_here(wanted: HardwareSpec, devices: tuple[DetectedDevice, ...]) -> HardwareSpec:
    """A job's hardware, with what it leaves to this machine filled in.

    Args:
        wanted: The hardware.
        devices: CUDA devices of this machine.
    """
    return resolve_hardware(wanted, hardware_entries(), devices, detect_cpu_memory_bytes())


def _is_planned(job: JobSpec) -> bool:
    """Whether a plan is made of the job, and not of what a past run was."""
    is_past = bool(job.resume) if job.action is Action.RUN else bool(job.run_dir)
    return job.action in (Action.PLAN, Action.EXPLAIN) or (
        job.action in (Action.RUN, Action.MEMORY) and not is_past
    )


def _is_described_here(job: JobSpec) -> bool:
    """Whether a model's facts are on this machine: built in, or in a folder."""
    path = job.model.path
    is_built_in = path in ("", job.model.id) or catalogue_entry(path) is not None
    is_built_in |= path.startswith(PACKAGED_PREFIX)
    with suppress(OSError, RuntimeError):  # a name too long, `~name` of nobody
        return is_built_in or Path(path).expanduser().is_dir()
    return False
