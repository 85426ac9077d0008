"""One rank among several: its number, its connection to the others, how they stop and end together."""

from __future__ import annotations

from contextlib import suppress

from torch import distributed

from launcher.errors import LaunchError
from launcher.job import Engine
from launcher.plan import Plan
from launcher.worker.ranks import rank, world_size


def connect(plan: Plan) -> None:
    """Checks that as many processes were started as planned, and that they can talk; lets DeepSpeed talk too.

    Raises:
        LaunchError: When they are not.
    """
    if world_size() != plan.world_size:
        raise LaunchError(
            f"{world_size()} processes were started, the plan has {plan.world_size}",
            "accelerate chose another way to launch",
        )
    if plan.world_size == 1:
        return
    connected = distributed.get_world_size() if distributed.is_initialized() else 1
    if connected != plan.world_size:
        raise LaunchError(
            f"rank {rank()} is in a group of {connected} processes, the plan has {plan.world_size}",
            "accelerate made no process group; see the log for what it took this machine for",
        )
    if plan.engine is Engine.DEEPSPEED:
        import deepspeed  # noqa: PLC0415  # half a second, for runs with DeepSpeed only

        # on a CPU accelerate connects the processes without it, and weights that are loaded now would not be sharded
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


STOP_KEY = "launcher/stop_after_step"


def all_stop_now(plan: Plan, steps: int, is_asked: bool) -> bool:
    """Whether training stops after this optimizer step, on all ranks alike.

    Rank 0 is asked, and tells the others through the store by which they met: stop after the next step. No rank can be
    done with that step before rank 0 has begun it, because gradients are exchanged in it.

    Args:
        plan: The plan.
        steps: Optimizer steps that are done.
        is_asked: Whether this rank was asked to stop.
    """
    if plan.world_size == 1:
        return is_asked
    store = distributed.distributed_c10d._get_default_store()
    if store.check([STOP_KEY]):
        return steps >= int(store.get(STOP_KEY))
    if is_asked and rank() == 0:
        store.set(STOP_KEY, str(steps + 1))
    return False


def leave_together() -> None:
    """Waits for the other ranks, so that torchrun ends none that has not said how it ended."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        with suppress(RuntimeError):  # a rank that is gone already has failed, and will be named
            distributed.barrier()
            distributed.destroy_process_group()
