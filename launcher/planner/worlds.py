"""Worlds of many ranks, of which few are traced: what ranks share gets smaller with their number, the rest does not."""

from __future__ import annotations

from dataclasses import replace

from launcher.job import Engine
from launcher.plan import Plan

TRACED_RANKS = 8
"""Ranks of a traced world at most: DeepSpeed's own bookkeeping takes minutes for a thousand."""


def traced_world(plan: Plan) -> Plan:
    """The plan with as many devices as are traced.

    Data parallelism without sharding is the same on any number of ranks. A world of more than `TRACED_RANKS` is traced
    as one of so many on one node; one that is sharded within nodes keeps its nodes' size, and one that swaps to NVMe all.
    """
    if plan.engine is Engine.DDP:
        return replace(plan, num_devices=2, num_nodes=1)
    if plan.shard_within_node and plan.num_nodes > 1:
        return replace(plan, num_nodes=2)
    if (
        plan.world_size <= TRACED_RANKS or plan.swaps
    ):  # which group is swapped hangs on how large a rank's part is
        return plan
    if plan.buckets is not None:  # a sub-group is so many elements of a rank's part
        elements = plan.buckets.sub_group_elements * plan.world_size // TRACED_RANKS
        plan = replace(plan, buckets=replace(plan.buckets, sub_group_elements=elements))
    return replace(plan, num_devices=TRACED_RANKS, num_nodes=1)


def part_share(plan: Plan) -> float:
    """How large a rank's part is in the plan, of what it is in the traced world."""
    if plan.shard_within_node or not plan.zero_stage:
        return 1.0
    return traced_world(plan).world_size / plan.world_size
