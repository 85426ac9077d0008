"""Options of a job that contradict each other whatever the hardware; all of them are told at once."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.job import Action, DataFormat, Grade, JobSpec, Loss, ReportFormat, Task

AUTO = "auto"
PAST = ("recipe", "model", "hardware", "status", "export", "compare", "check")
"""Keys of `report` that are about past runs."""
REPORTED = (Action.PLAN, Action.EXPLAIN, Action.MEMORY)
"""Actions that write files about a plan."""


def job_limits(job: JobSpec) -> Iterator[str]:
    """What a job can't have, a sentence each."""
    if job.action is Action.RUN and not job.resume and not job.data.path:
        yield "`data.path` is empty, and `action=run` needs examples: `data.path=<file, folder or hub id>`"
    if job.resume and job.action is not Action.RUN:
        yield f"`resume={job.resume}` with `action={job.action}`: a run is continued by `action=run` alone"
    if job.action is Action.STATUS and not job.run_dir:
        yield "`action=status` needs the run: `run_dir=<run directory>`"
    yield from _report_limits(job)
    yield from _length_limits(job)
    if Grade.COMFORTABLE in job.planner.refused_grades:
        yield "`planner.refused_grades=[comfortable]` refuses every plan; legal: tight, squeezed"
    yield from _task_limits(job)


def _report_limits(job: JobSpec) -> Iterator[str]:
    """What `report.*` asks for and can't have."""
    spec = job.report
    if spec.format is not ReportFormat.NONE and job.action not in REPORTED:
        legal = ", ".join(action.value for action in REPORTED)
        yield f"`report={spec.format}` with `action={job.action}`: a report is written about a plan, by {legal}"
    asked = [name for name in PAST if getattr(spec, name)]
    if asked and job.action is not Action.REPORT:
        yield f"`report.{asked[0]}` with `action={job.action}`: past runs are what `action=report` is about"
    if spec.compare and len(spec.compare) != 2:
        yield f"`report.compare` names {len(spec.compare)}: two runs or plans, as `[runs/a,runs/b]`"
    if spec.export and not spec.export.endswith((".csv", ".json")):
        yield f"`report.export={spec.export}`; legal: a file that ends in .csv or .json"


def _length_limits(job: JobSpec) -> Iterator[str]:
    """What `data.max_length=auto` can't do."""
    if job.data.max_length != AUTO:
        return
    if not job.data.path:
        yield "`data.max_length=auto` reads the data, and `data.path` is empty: `data.path=<file, folder or hub id>`"
    if job.planner.pin.max_length or job.planner.choices.max_length:
        yield (
            "`data.max_length=auto` chooses the length, and `planner.pin.max_length` or `planner.choices.max_length` "
            "gives it; leave one of the two out"
        )
    if job.model.task is Task.IMAGE_TEXT_TO_TEXT:
        yield (
            f"`data.max_length=auto` with `model.task={job.model.task}`: the tokens of images are not counted; "
            "`data.max_length=<tokens>`"
        )


def _task_limits(job: JobSpec) -> Iterator[str]:
    """Options that the job's task does not have."""
    task, layout = job.model.task, job.data.format
    own = {
        Task.SEQUENCE_CLASSIFICATION: DataFormat.LABELED,
        Task.IMAGE_TEXT_TO_TEXT: DataFormat.IMAGES,
    }
    if layout not in (DataFormat.AUTO, own.get(task)) and (task in own or layout in own.values()):
        yield f"`data.format={layout}` with `model.task={task}`: not its layout; leave `data.format=auto`"
    if task is Task.CAUSAL_LM:
        return
    if job.data.packing:
        yield f"`data.packing=true` with `model.task={task}`: its examples can't be joined; `data.packing=false`"
    if job.generation.enabled:
        yield f"`generation.enabled=true` with `model.task={task}`: only `{Task.CAUSAL_LM}` generates here"
    if task is Task.SEQUENCE_CLASSIFICATION and job.planner.pin.loss is Loss.CHUNKED:
        yield f"`planner.pin.loss=chunked` with `model.task={task}`: a classifier has no tiles; leave it unset"
