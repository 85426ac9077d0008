"""Options of a job that contradict each other whatever the hardware; all of them are told at once."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.job import DataFormat, Grade, JobSpec, Loss, Task

AUTO = "auto"


def job_limits(job: JobSpec) -> Iterator[str]:
    """What a job can't have, a sentence each."""
    yield from _length_limits(job)
    if Grade.COMFORTABLE in job.planner.refused_grades:
        yield "`planner.refused_grades=[comfortable]` refuses every plan; legal: tight, squeezed"
    yield from _task_limits(job)


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
