"""Writes down for people what was found out about a plan: a page, or pictures (`report=html`, `report=png`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.config import hardware_entries
from launcher.documents import read_document, write_bytes, write_text
from launcher.errors import LaunchError
from launcher.explanation import Explanation
from launcher.job import JobSpec, ReportFormat
from launcher.memory import Bill, Timeline
from launcher.plan import Plan, PlanChoice
from launcher.planner.bill import build_bill
from launcher.planner.forecast import Forecaster
from launcher.planner.surfaces import what_if
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import needed_libraries, settled, trace_cache
from launcher.report import tables
from launcher.report.findings import Findings
from launcher.run.cache import cache_folder
from launcher.run.calibrate import device_rates
from launcher.run.status import ordered_run
from launcher.run_record import WorkerOrder
from launcher.workflow import Answer

NO_PLAN = "No plan fits; everything here is about the plan that is nearest to fitting."


def published(
    job: JobSpec, choice: PlanChoice, answer: Answer, explanation: Explanation | None = None
) -> Answer:
    """An answer about a plan, and the files that the job asks for beside it.

    Args:
        job: The job, resolved.
        choice: What its search found; where nothing fits, the nearest plan is written about.
        answer: What is said about it.
        explanation: What each knob buys; None where nobody asked.
    """
    if job.report.format is ReportFormat.NONE:
        return answer
    plan = choice.plan if choice.plan is not None else choice.nearest.plan if choice.nearest else None
    if plan is None:
        return answer
    job = settled(job)
    measured, run_notes = _measured(job, plan)
    with Tracer(needed_libraries(job)) as tracer:
        rates = device_rates(job.hardware, cache_folder("rates"))
        forecaster = Forecaster(job, tracer, trace_cache(job), rates=rates)
        estimate = choice.estimate or forecaster.estimate(plan)
        findings = Findings(
            job=job,
            plan=plan,
            estimate=estimate,
            capacity_bytes=choice.capacity_bytes,
            headroom_bytes=choice.headroom_bytes,
            choice=choice,
            explanation=explanation,
            bill=build_bill(forecaster.stream(plan)),
            measured=measured,
            what_if=what_if(job, plan, forecaster, _memories(job)),
            notes=(*(() if choice.feasible else (NO_PLAN,)), *choice.notes, *run_notes),
            versions=library_versions(),
        )
    return _with_files(answer, _write(findings))


def published_run(
    order: WorkerOrder, asked: JobSpec, bill: Bill, measured: Timeline | None, answer: Answer
) -> Answer:
    """The same about a past run: its plan is not searched again.

    Args:
        order: What was run.
        asked: The job that names the run and the report.
        bill: What was alive at the plan's highest moment.
        measured: Its measured step; None where none was.
        answer: What is said about it.
    """
    if asked.report.format is ReportFormat.NONE:
        return answer
    job = settled(replace(order.job, report=asked.report, run_dir=asked.run_dir))
    budget = job.hardware.memory_bytes
    share = job.planner.headroom
    with Tracer(needed_libraries(job)) as tracer:
        rates = device_rates(job.hardware, cache_folder("rates"))
        forecaster = Forecaster(job, tracer, trace_cache(job), rates=rates)
        findings = Findings(
            job=job,
            plan=order.plan,
            estimate=order.predicted,
            capacity_bytes=budget,
            headroom_bytes=round(share * budget) if isinstance(share, float) else 0,
            choice=None,
            explanation=None,
            bill=bill,
            measured=measured,
            what_if=what_if(job, order.plan, forecaster, _memories(job)),
            notes=(f"The run is {Path(asked.run_dir).resolve()}.",),
            versions=library_versions(),
        )
    return _with_files(answer, _write(findings))


def _memories(job: JobSpec) -> list[tuple[str, int]]:
    """Memories of the built-in devices of the job's kind."""
    return [
        (str(entry["name"]), int(entry["memory_bytes"]))
        for entry in hardware_entries()
        if int(entry.get("memory_bytes") or 0)
    ]


def _measured(job: JobSpec, plan: Plan) -> tuple[Timeline | None, tuple[str, ...]]:
    """The measured step of the run in `run_dir`, if that run had this plan; and what to say of it.

    Raises:
        ConfigError: When the folder is no run directory.
    """
    if not job.run_dir:
        return None, ()
    paths, order = ordered_run(Path(job.run_dir).resolve())
    if (order.plan, order.job.model, order.job.hardware.name) != (plan, job.model, job.hardware.name):
        had = tables.plan_words(order.plan)
        text = f"the run in {paths.root} had another plan, so its measured step is not shown: {had}"
        return None, (f"{text}; `action=memory` with this `run_dir` is about the run itself",)
    if not paths.timeline(0).exists():
        return None, (f"the run in {paths.root} left no measured step",)
    return read_document(paths.timeline(0), Timeline), (f"The measured step is that of {paths.root}.",)


def report_file(job: JobSpec) -> Path:
    """The page that a job asks for; pictures have its name and what they show."""
    suffix = f".{job.report.format.value}"
    if job.report.file:
        file = Path(job.report.file)
        return file if file.suffix else file.with_suffix(suffix)
    return Path(job.run_dir or ".") / f"{job.recipe}-{job.hardware.name}{suffix}"


def _write(findings: Findings) -> tuple[Path, ...]:
    """Writes the files, and says which.

    Raises:
        LaunchError: When a file can't be written.
    """
    file = report_file(findings.job).resolve()
    try:
        if findings.job.report.format is ReportFormat.HTML:
            from launcher.report.html import page  # noqa: PLC0415  # with it comes the plotting library

            write_text(file, page(findings))
            return (file,)
        from launcher.report.plot import pictures  # noqa: PLC0415  # as above

        drawn: Mapping[Path, bytes] = {
            file.with_name(f"{file.stem}-{name}.png"): png for name, png in pictures(findings).items()
        }
        for picture, png in drawn.items():
            write_bytes(picture, png)
        return tuple(drawn)
    except OSError as failure:
        raise LaunchError(
            f"`{file}` can't be written: {failure.strerror or failure}", "report.file=<another file>"
        ) from failure


def _with_files(answer: Answer, files: tuple[Path, ...]) -> Answer:
    lines = "\n".join(f"report    {file}" for file in files)
    document = {**answer.document, "report": {"files": [str(file) for file in files]}}
    return Answer(f"{answer.text}\n\n{lines}", document, answer.failure)
