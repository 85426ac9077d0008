"""Out of memory: the next plan, with the same global batch and every knob that changes the result as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from launcher.checkpoints import last_checkpoint, step_of
from launcher.documents import read_document
from launcher.errors import WorkerOutOfMemory
from launcher.job import ChoicesSpec, JobSpec
from launcher.memory import MemoryEstimate, Phase
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.interval import EVIDENCE, read_residuals, with_interval
from launcher.planner.tracer import Tracer
from launcher.planning import find_plan, needed_libraries, trace_cache
from launcher.run.launch import launch_worker, nodes_of, rewrite_run
from launcher.run.ledger import note_replan
from launcher.run.node import clear_leftovers
from launcher.run.ranks import deciding_outcome, noted_phase, read_outcomes
from launcher.run.rehearse import is_due
from launcher.run.secret import with_secret
from launcher.run.supervise import interrupts_held
from launcher.run.waiting_room import waiting_room
from launcher.run_paths import RunPaths
from launcher.run_record import Replan, Status, WorkerOrder, WorkerOutcome
from launcher.run_status import NodeFailure

SHRINK: Final = 0.9
"""Share of the failed plan's predicted memory that the next plan may take: a convention. What failed by a little would
fail again by a little less."""
UNSHRINKABLE: Final = (Phase.LOAD, Phase.RESUME, Phase.SAVE, Phase.MERGE)
"""Phases that a smaller micro batch does not make smaller."""


def next_order(order: WorkerOrder, phase: Phase | None, is_continued: bool) -> tuple[WorkerOrder, str] | None:
    """What to try when a plan ran out of memory, and what is different, in words; None when there is nothing.

    Args:
        order: What ran out of memory.
        phase: Phase in which it did; None, unknown, counts as a step of training.
        is_continued: Whether it goes on from a checkpoint: then the engine that wrote it must read it.

    Raises:
        UnsupportedByPlanner: When the tracer can't follow a plan.
    """
    if phase in (Phase.EVALUATION, Phase.GENERATION):
        return _with_smaller_look(order, phase)
    choice = find_plan(_restricted(order, is_continued))
    if choice.plan is None or choice.estimate is None:
        return None
    taken, estimate = choice.plan, choice.estimate
    if phase in UNSHRINKABLE and not _is_smaller(estimate, order.predicted, phase):
        return None
    estimate = with_interval(estimate, taken, order.job, read_residuals(EVIDENCE))
    following = replace(order, plan=taken, predicted=estimate, predicted_step=choice.step)
    return following, difference(order.plan, taken)


def difference(before: Plan, after: Plan) -> str:
    """What is different between two plans: `micro_batch_size 8 -> 4, gradient_accumulation_steps 2 -> 4`."""
    changes: list[str] = []
    for name in before.__dataclass_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if name == "buckets" and old != new:
            changes.append("buckets that follow from it" if changes else "other buckets")
        elif old != new:
            changes.append(f"{name} {getattr(old, 'value', old)} -> {getattr(new, 'value', new)}")
    return ", ".join(changes)


def _restricted(order: WorkerOrder, is_continued: bool) -> JobSpec:
    """The job, on a device that the failed plan does not fit."""
    job, plan = order.job, order.plan
    pin = replace(job.planner.pin, method=plan.method, rank=plan.rank or None, max_length=plan.max_length)
    if is_continued:
        pin = replace(
            pin,
            optimizer=plan.optimizer,
            engine=plan.engine,
            zero_stage=plan.zero_stage,
            offload_optimizer=plan.offload_optimizer,
            offload_parameters=plan.offload_parameters,
        )
    memory_bytes = min(job.hardware.memory_bytes, int(SHRINK * order.predicted.peak_device_bytes))
    return replace(
        job,
        planner=replace(job.planner, pin=pin, choices=ChoicesSpec(), headroom=0.0, refused_grades=()),
        hardware=replace(job.hardware, memory_bytes=memory_bytes),
    )


def _is_smaller(estimate: MemoryEstimate, failed: MemoryEstimate, phase: Phase) -> bool:
    peak, before = estimate.phase(phase), failed.phase(phase)
    return peak is not None and before is not None and peak.allocated_bytes < before.allocated_bytes


def _with_smaller_look(order: WorkerOrder, phase: Phase) -> tuple[WorkerOrder, str] | None:
    """A smaller batch to evaluate or to generate in; the training's stays."""
    job, plan = order.job, order.plan
    evaluation, generation = job.evaluation, job.generation
    if phase is Phase.GENERATION:
        if generation.batch_size == 1:
            return None
        size = generation.batch_size // 2
        job = replace(job, generation=replace(generation, batch_size=size))
        change = f"generation.batch_size {generation.batch_size} -> {size}"
    elif evaluation.keep_logits and evaluation.accumulation_steps is None:
        job = replace(job, evaluation=replace(evaluation, accumulation_steps=1))
        change = "evaluation.accumulation_steps -> 1: kept logits wait in host memory"
    else:
        before = evaluation.batch_size or plan.micro_batch_size
        if before == 1:
            return None
        job = replace(job, evaluation=replace(evaluation, batch_size=before // 2))
        change = f"evaluation.batch_size {before} -> {before // 2}"
    with Tracer(needed_libraries(job)) as tracer:
        estimate = Forecaster(job, tracer, trace_cache(job)).estimate(plan, exact=True)
    estimate = with_interval(estimate, plan, job, read_residuals(EVIDENCE))
    return replace(order, job=job, predicted=estimate), change


def run_to_the_end(
    order: WorkerOrder,
    paths: RunPaths,
    show: Callable[[str], None],
    rehearsed: Callable[[WorkerOrder], None],
    describe: Callable[[WorkerOrder], dict[str, Any]],
) -> tuple[WorkerOrder, WorkerOutcome]:
    """Runs the worker of a prepared run; out of memory, again with the next plan, as often as the job allows.

    To be called by who holds the run directory (`sole_launcher`): between two plans it is rewritten. What was tried is
    added to what earlier launches tried in it, and the count begins anew with each launch: who resumes a run has seen
    how it ended, and may have made room.

    Args:
        order: What the worker does.
        paths: The run directory.
        show: Called with every line that the worker reports.
        rehearsed: Called with the order whose rehearsal has ended well.
        describe: The plan document of an order, for the run directory.

    Returns:
        The last order, and how it ended.

    Raises:
        LauncherError: When a run ended without an outcome, and not for want of memory.
    """
    for replans_left in range(order.job.launch.max_replans, -1, -1):
        outcome = _outcome(order, paths, show, rehearsed)
        if outcome.status is not Status.OUT_OF_MEMORY or not replans_left:
            break
        main = with_secret(nodes_of(order)[0], paths.secret, 0.0)
        with waiting_room(main, order.plan.num_nodes) as room:
            if room.missing:
                show(f"no next plan: {room.missing}")
                break
            found = _following(order, paths, outcome, show)
            if found is None:
                break
            order, replan = found
            _take(order, replan, paths, describe)
            room.call_back(paths.worker)
    return order, outcome


def _following(
    order: WorkerOrder, paths: RunPaths, outcome: WorkerOutcome, show: Callable[[str], None]
) -> tuple[WorkerOrder, Replan] | None:
    """What to try after an outcome for want of memory, and the note of it; None when there is nothing."""
    checkpoint = last_checkpoint(paths.checkpoints)
    found = next_order(order, outcome.phase, checkpoint is not None)
    if found is None:
        return None
    following, change = found
    step = 0 if checkpoint is None else step_of(checkpoint)
    message, phase = outcome.message.splitlines()[0], outcome.phase
    in_rehearsal = _is_in_rehearsal(paths, order.plan.world_size)
    replan = Replan(phase, message, in_rehearsal, order.plan, following.plan, change, step, outcome.held)
    show(f"out of memory in {phase.value if phase else 'an unknown phase'}: {message}")
    show(f"trying    {change}, {f'from the checkpoint of step {step}' if step else 'from the beginning'}")
    return following, replan


def _take(
    order: WorkerOrder, replan: Replan, paths: RunPaths, describe: Callable[[WorkerOrder], dict[str, Any]]
) -> None:
    """Gives a run its next order; an interrupt comes before that or after it."""
    with interrupts_held():
        rewrite_run(paths, order, describe(order))
        note_replan(paths, replan)


def left_without_memory(order: WorkerOrder, paths: RunPaths) -> WorkerOutcome | None:
    """How a run ended for want of memory where `launch` was not there: on a cluster's machines.

    None where it ended otherwise, where `launch` itself tried the next plans, or where the job wants none.
    """
    launch = order.job.launch
    return ended_without_memory(order, paths) if launch.max_replans and launch.cluster.is_elsewhere else None


def ended_without_memory(order: WorkerOrder, paths: RunPaths) -> WorkerOutcome | None:
    """How a run ended for want of memory, by what its machines left; None where it ended otherwise, or has not."""
    act = paths.rehearsal if _is_in_rehearsal(paths, order.plan.world_size) else paths
    decided = deciding_outcome(read_outcomes(act, order.plan.world_size), order.plan.world_size)
    if decided is not None and decided.status is Status.OUT_OF_MEMORY:
        return replace(decided, phase=decided.phase or noted_phase(act, decided.rank))
    notes = [paths.failure(machine) for machine in range(order.plan.num_nodes)]
    for failure in (read_document(note, NodeFailure) for note in notes if note.exists()):
        if failure.exit_code == WorkerOutOfMemory.exit_code:
            # the kernel ended a worker, which left no outcome
            return replace(_killed(failure.message, order), phase=noted_phase(act, 0))
    return None


def go_on_with_less(
    order: WorkerOrder,
    paths: RunPaths,
    outcome: WorkerOutcome,
    show: Callable[[str], None],
    describe: Callable[[WorkerOrder], dict[str, Any]],
    host_memory_bytes: int = 0,
) -> WorkerOrder | None:
    """Gives a run that ended for want of memory the next plan, before it goes on; None where there is none.

    To be called by who holds the run directory, while nobody works in it.

    Args:
        order: What ran out of memory.
        paths: The run directory.
        outcome: How it ended.
        show: Called with each line that is worth one.
        describe: The plan document of an order.
        host_memory_bytes: Host memory that a process may take; 0: what the job's hardware has.
    """
    whole = order.job.hardware
    limited = replace(whole, host_memory_bytes=host_memory_bytes or whole.host_memory_bytes)
    found = _following(replace(order, job=replace(order.job, hardware=limited)), paths, outcome, show)
    if found is None:
        return None
    following, replan = found
    following = replace(
        following, job=replace(following.job, hardware=whole)
    )  # the limit was for this plan alone
    with interrupts_held():
        clear_leftovers(paths, order.plan, show)  # of the old plan there may be more than of the new one
        _take(following, replan, paths, describe)
    return following


def _is_in_rehearsal(paths: RunPaths, world_size: int) -> bool:
    """Whether a run that has just ended did so before its rehearsal had; without `launch` nobody notes findings."""
    if not is_due(paths) or paths.rehearsal.findings.exists():
        return False
    ended = read_outcomes(paths.rehearsal, world_size)
    return len(ended) < world_size or any(outcome.status is not Status.DONE for outcome in ended)


def _outcome(
    order: WorkerOrder,
    paths: RunPaths,
    show: Callable[[str], None],
    rehearsed: Callable[[WorkerOrder], None],
) -> WorkerOutcome:
    """How a run ended; that the kernel ended it for want of memory is an outcome too."""
    try:
        outcome = launch_worker(paths, order, show, rehearsed=lambda: rehearsed(order))
    except WorkerOutOfMemory as failure:
        outcome = replace(_killed(str(failure), order), rank=failure.rank)
    act = paths.rehearsal if _is_in_rehearsal(paths, order.plan.world_size) else paths
    return replace(outcome, phase=outcome.phase or noted_phase(act, outcome.rank))


def _killed(message: str, order: WorkerOrder) -> WorkerOutcome:
    """The outcome of a worker that the kernel ended for want of memory."""
    return WorkerOutcome(
        status=Status.OUT_OF_MEMORY,
        message=message,
        steps=0,
        first_loss=None,
        last_loss=None,
        train_seconds=0.0,
        tokens_per_second=None,
        step_seconds=None,
        rank=0,
        world_size=order.plan.world_size,
    )
