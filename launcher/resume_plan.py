"""`launch resume=<run dir>` with other keys: the run's job planned again with them, and the run given its new order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoints import last_checkpoint, step_of
from launcher.config import with_changes
from launcher.errors import ConfigError, LaunchError
from launcher.job import ChoicesSpec, JobSpec, PinSpec
from launcher.plan import PlanChoice
from launcher.planning import plan_job, resolve
from launcher.recovery import difference
from launcher.resume_limits import (
    EVALUATION,
    asks_for_plan,
    checkpoint_limits,
    checkpoint_pins,
    continued_pins,
    pins_of,
    readable_words,
)
from launcher.run.detect import DetectedDevice, is_here
from launcher.run.launch import rewrite_run
from launcher.run.ledger import note_replan
from launcher.run.lock import end_orphans
from launcher.run.node import clear_leftovers
from launcher.run.status import run_status
from launcher.run_paths import RunPaths
from launcher.run_record import Replan, WorkerOrder
from launcher.run_status import RunState

PIN = "planner.pin."


@dataclass(frozen=True)
class Resumption:
    """A run's job with other values of some keys."""

    job: JobSpec
    """The job from now on."""
    choice: PlanChoice | None
    """What the search found for it; None where the plan stays, because no key asks for another."""

    def order(self, before: WorkerOrder) -> WorkerOrder:
        """What the workers do from now on; to be asked for where there is a plan."""
        found = self.choice
        if found is None or found.plan is None or found.estimate is None:
            return replace(before, job=self.job)
        plan, predicted = found.plan, found.estimate
        return replace(before, job=self.job, plan=plan, predicted=predicted, predicted_step=found.step)


def resumption(
    order: WorkerOrder,
    changes: Mapping[str, Any],
    checkpoint: Path | None,
    devices: tuple[DetectedDevice, ...],
    trace_cache: str = "",
) -> Resumption:
    """Plans a run's job again with other values of some keys; nothing is written.

    Method, rank and length stay those of the plan, and so does the global batch. From a checkpoint the new plan must be
    able to read it. Where only the evaluation's batch is another, the training's plan stays, and is priced with it.

    Args:
        order: What the run's workers did.
        changes: Values by dotted key, of those that `resume_limits.is_changeable` names.
        checkpoint: What the run goes on from; None: it begins anew.
        devices: CUDA devices of this machine.
        trace_cache: Folder of cached traces; empty: the run's.

    Raises:
        ConfigError: When a value is impossible, or no engine could go on so; with what can.
        LaunchError: When this machine lacks the devices.
    """
    job = with_changes(order.job, changes)
    asked = {key.removeprefix(PIN): value for key, value in changes.items() if key.startswith(PIN)}
    pins: dict[str, Any] = {}
    if checkpoint is not None and asks_for_plan(changes):
        world_size = job.hardware.world_size
        if found := checkpoint_limits(order.plan, asked, world_size):
            raise ConfigError(
                f"`{checkpoint}` can't be continued so: {'; '.join(found)}",
                f"it can be on {readable_words(order.plan)}",
            )
        pins = checkpoint_pins(order.plan, asked, world_size)
    pin = continued_pins(job.planner.pin, asked, pins)
    job = replace(job, planner=replace(job.planner, pin=pin), trace_cache=trace_cache or job.trace_cache)
    job = replace(resolve(job, devices), model=order.job.model)
    if not job.launch.cluster.is_elsewhere and not is_here(job.hardware, devices):
        raise LaunchError(f"this machine has no {job.hardware.product or job.hardware.name}")
    if asks_for_plan(changes):
        return Resumption(job, plan_job(_search_job(job, order, replace(pin, **pins))))
    if EVALUATION in changes:
        return Resumption(job, plan_job(_search_job(job, order, pins_of(order.plan))))
    return Resumption(job, None)


def _search_job(job: JobSpec, order: WorkerOrder, pin: PinSpec) -> JobSpec:
    """The job with the knobs pinned that make the model what it is."""
    plan = order.plan
    pin = replace(pin, method=plan.method, rank=plan.rank or None, max_length=plan.max_length)
    return replace(job, planner=replace(job.planner, pin=pin, choices=ChoicesSpec()))


def require_idle(paths: RunPaths, order: WorkerOrder) -> None:
    """Checks that no cluster runs a run, or will, whose order is to be changed.

    Raises:
        LaunchError: When one does.
    """
    if not order.job.launch.cluster.is_elsewhere:
        return  # the lock of the run directory says so
    status = run_status(paths, order)
    if status.state in (RunState.PENDING, RunState.RUNNING):
        raise LaunchError(
            f"`{paths.root}` is {status.state.value} on a cluster, and its plan can't change under it",
            f"`launch action=status run_dir={paths.root}` says how far it is; cancel it first",
        )


def require_not_queued(paths: RunPaths, order: WorkerOrder) -> None:
    """Checks that no cluster is seen to run a run, or will run it, that is handed over again.

    Where a cluster can't be asked, and its processes can't be seen, the user is who knows.

    Raises:
        LaunchError: When one does.
    """
    if not order.job.launch.cluster.is_elsewhere:
        return  # the lock of the run directory says so
    status = run_status(paths, order)
    is_seen = bool(status.slurm_state) or any(rank.is_alive for rank in status.ranks)
    if is_seen and status.state in (RunState.PENDING, RunState.RUNNING):
        raise LaunchError(
            f"`{paths.root}` is {status.state.value} on a cluster, and two jobs can't train in one run directory",
            f"`launch action=status run_dir={paths.root}` says how far it is; cancel it first",
        )


def change_words(before: WorkerOrder, after: WorkerOrder, changes: Mapping[str, Any]) -> str:
    """What is different between two orders; empty when nothing is."""
    words = [difference(before.plan, after.plan)]
    for key in changes:
        old, new = _value(before.job, key), _value(after.job, key)
        if not key.startswith((PIN, "hardware.")) and old != new:
            words.append(f"{key} {getattr(old, 'value', old)} -> {getattr(new, 'value', new)}")
    return ", ".join(filter(None, words))


def _value(job: JobSpec, key: str) -> Any:
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value


def give_order(
    paths: RunPaths,
    before: WorkerOrder,
    after: WorkerOrder,
    changes: Mapping[str, Any],
    document: Mapping[str, Any],
    show: Callable[[str], None],
) -> None:
    """Gives a run another order, and writes down that the user asked for it; to be called by who holds the directory.

    Args:
        paths: The run directory.
        before: Its order so far.
        after: Its order from now on.
        changes: What the user asked for, by dotted key.
        document: The plan document of the new order.
        show: Called with a line for each thing that is worth one.

    Raises:
        LaunchError: When it can't be written.
    """
    end_orphans(paths, before.plan.world_size, show)  # of the old plan there may be more than of the new one
    clear_leftovers(paths, before.plan, show)
    checkpoint, change = last_checkpoint(paths.checkpoints), change_words(before, after, changes)
    show(f"changed   {change or 'nothing: the plan is what it was'}")
    if checkpoint is not None and before.plan.world_size != after.plan.world_size:
        show(
            f"random    states were saved by {before.plan.world_size} processes, and {after.plan.world_size} go on: "
            "dropout draws anew"
        )
    rewrite_run(paths, after, document)
    if not after.job.launch.cluster.is_elsewhere:
        paths.submitted.unlink(missing_ok=True)
    if change:
        asked = " ".join(f"{key}={getattr(value, 'value', value)}" for key, value in changes.items())
        step = 0 if checkpoint is None else step_of(checkpoint)
        replan = Replan(None, asked, False, before.plan, after.plan, change, step, by_user=True)
        note_replan(paths, replan)
