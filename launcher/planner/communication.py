"""What several devices exchange per step, with each other and with the host, and how long that takes over their links.

Bytes are those of the algorithms that the engines run. A ring moves (n - 1)/n of a tensor per device to gather or to
reduce-scatter it, and twice that to all-reduce it (Patarasuk and Yuan, 2009). What an engine sends while it computes is
hidden as far as the computation lasts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.hardware import HardwareSpec
from launcher.job import Checkpointing, Engine, JobSpec, OffloadDevice, Precision
from launcher.memory import TRAINING, MemoryEstimate
from launcher.plan import Plan
from launcher.step_time import StepTime

BACKWARD_SHARE = 2 / 3
"""Share of a pass that is backward: it multiplies twice as much as forward."""
LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collectives of large tensors reach: NCCL's bus bandwidth of all-reduce on eight A100 or
H100 is about 230 of 300 and 360 to 370 of 450 GB/s (NVIDIA nccl-tests, README and published logs, read 2026-11)."""


HOST_ADAM_SECONDS = 2.6e-10
"""Time per parameter of DeepSpeed's CPU Adam on a whole node: 10 billion in 2.57 s on the host of a DGX-2 (Ren et al.,
ZeRO-Offload, 2021, arXiv 2101.06840, table 4). Another host differs."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends per optimizer step."""

    hidden_bytes: int
    """While it computes."""
    exposed_bytes: int
    """While it waits."""


def traffic(plan: Plan, trained_bytes: int, weight_bytes: int) -> Traffic:
    """What a device sends per optimizer step.

    Args:
        plan: The plan.
        trained_bytes: Gradients of all trained weights, as they are exchanged.
        weight_bytes: All weights, as they are held for computing.
    """
    devices = plan.num_devices if plan.shard_within_node else plan.world_size
    if devices == 1 and plan.num_nodes == 1:
        return Traffic(0, 0)
    ring = (devices - 1) / devices
    passes = plan.gradient_accumulation_steps
    if plan.engine is Engine.DDP:  # nothing is exchanged but in the last micro batch
        return Traffic(round(2 * ring * trained_bytes), 0)
    if plan.zero_stage < 3:
        # stages 1 and 2 all-reduce whole buckets (`use_multi_rank_bucket_allreduce`, deepspeed 0.19.8), stage 2 in
        # every micro batch; then the updated weights are gathered
        reductions = passes if plan.zero_stage == 2 else 1
        reduced, gathered = round(2 * ring * trained_bytes * reductions), round(ring * trained_bytes)
        return Traffic(0, reduced + gathered) if plan.has_small_buckets else Traffic(reduced, gathered)
    sent = ring * passes * (gathers(plan) * weight_bytes + trained_bytes)
    if plan.has_small_buckets:
        return Traffic(0, round(sent))
    if plan.shard_within_node and plan.num_nodes > 1:
        sent += 2 * trained_bytes / devices * (plan.num_nodes - 1) / plan.num_nodes
    return Traffic(round(sent), 0)


def gathers(plan: Plan) -> int:
    """How often a micro batch needs each sharded weight: for the forward and for the backward pass.

    With small buckets none waits from the pass that recomputes for the one that follows.
    """
    recomputes = plan.activation_checkpointing is not Checkpointing.NONE
    return 3 if recomputes and plan.has_small_buckets else 2


def communication_seconds(
    plan: Plan, hardware: HardwareSpec, sent: Traffic, computing_seconds: float
) -> float:
    """What communication adds to a step.

    Args:
        plan: The plan.
        hardware: Its links. Between nodes every device has its own share of the network.
        sent: What a device sends.
        computing_seconds: How long it computes.
    """
    if plan.world_size == 1:
        return 0.0
    across = plan.num_nodes > 1 and not plan.shard_within_node
    rate = LINK_EFFICIENCY * link_bytes_per_second(hardware, across_nodes=across)
    if not rate:
        return 0.0
    window = computing_seconds * (1.0 if plan.zero_stage == 3 else BACKWARD_SHARE)
    return sent.exposed_bytes / rate + max(0.0, sent.hidden_bytes / rate - window)


def offload_seconds(
    plan: Plan, hardware: HardwareSpec, trained_bytes: int, weight_bytes: int, computing_seconds: float
) -> float:
    """What offload adds to a step: the link to the host, and the update there.

    Gradients of a rank's part are kept on the host in every micro batch, fetched to be added to, and sent once more in
    fp32; updated weights come back (deepspeed 0.19.8, `async_accumulate_grad_in_cpu_via_gpu` and
    `async_inplace_copy_grad_to_fp32_buffer_from_gpu` of stage 2, `partition_grads` of stage 3). Offloaded parameters
    come for the forward and for the backward pass, ahead of their use, and are hidden as far as the device computes; with
    small buckets nothing comes ahead.

    Args:
        plan: The plan.
        hardware: Its link to the host; one of unknown rate adds nothing.
        trained_bytes: Gradients of all trained weights, as they are exchanged.
        weight_bytes: All weights, as they are held for computing.
        computing_seconds: How long the device computes.
    """
    if not plan.uses_offload:
        return 0.0
    part, passes = trained_bytes / plan.world_size, plan.gradient_accumulation_steps
    elements = part / (4 if plan.precision is Precision.FP32 else 2)
    fetches = passes if plan.zero_stage == 3 else passes - 1
    kept = passes if plan.zero_stage == 3 or passes > 1 else 0
    returned = 0.0 if plan.offload_parameters else part
    moved = part * (kept + fetches) + 4 * elements + returned
    fetched = gathers(plan) * passes * weight_bytes / plan.world_size if plan.offload_parameters else 0.0
    update = HOST_ADAM_SECONDS * elements * plan.num_devices  # the ranks of a node share its processors
    rate = LINK_EFFICIENCY * hardware.host_link_bytes_per_second
    window = 0.0 if plan.has_small_buckets else computing_seconds
    return update + (moved / rate + max(0.0, fetched / rate - window) if rate else 0.0)


def with_paging(step: StepTime, hardware: HardwareSpec, estimate: MemoryEstimate) -> StepTime:
    """A step with what pages of optimizer states take over the link to the host.

    States that fit beside all else stay on the device. Others are fetched in every step (bitsandbytes 0.50,
    optim/optimizer.py, `prefetch_state`) as pages of managed memory, and each pushes out what was used longest ago, which
    in a loop over all states is always what comes next; so all of them cross the link, in and out. Nobody has measured it
    here.

    Args:
        step: The step by itself.
        hardware: Its link to the host; one of unknown rate adds nothing.
        estimate: The memory of its plan, whose optimizer is a paged one.
    """
    rate = LINK_EFFICIENCY * hardware.host_link_bytes_per_second
    paged = 0 if estimate.host is None else estimate.host.state_bytes
    taken = max((peak.allocated_bytes for peak in estimate.phases if peak.phase in TRAINING), default=0)
    if not rate or taken + estimate.context_bytes + paged <= hardware.memory_bytes:
        return step
    return replace(step, communication_seconds=step.communication_seconds + 2 * paged / rate)


def lacks_drive_rate(job: JobSpec) -> bool:
    """Whether states are to be swapped over a drive of which nobody knows how fast it is; then no step has a time."""
    return job.planner.pin.offload_device is OffloadDevice.NVME and not job.hardware.nvme_bytes_per_second


def with_drive(step: StepTime, hardware: HardwareSpec, moved_bytes: int) -> StepTime:
    """A step with what crosses the NVMe meanwhile.

    All of it is waited for: DeepSpeed's swapper reads a group of states, updates it, and writes it back before the next
    (deepspeed 0.19.8, swap_tensor/partitioned_optimizer_swapper.py), and gradients are flushed before the first.

    Args:
        step: The step without it.
        hardware: Its drive.
        moved_bytes: What is read and written.
    """
    rate = hardware.nvme_bytes_per_second
    if not moved_bytes or not rate:
        return step
    return replace(step, communication_seconds=step.communication_seconds + moved_bytes / rate)


def link_bytes_per_second(hardware: HardwareSpec, *, across_nodes: bool) -> float:
    """Rate of the slowest link that a ring passes, one direction; 0 where no link is known."""
    within = hardware.device_link_bytes_per_second / 2 or hardware.host_link_bytes_per_second
    if not across_nodes:
        return within
    return min(within, hardware.network_bytes_per_second) if within else hardware.network_bytes_per_second


def with_communication(
    step: StepTime,
    plan: Plan,
    hardware: HardwareSpec,
    held_weight_bytes: int,
    trained_bytes: int,
    all_weight_bytes: int = 0,
) -> StepTime:
    """A step with what its plan's devices exchange.

    Args:
        step: The step of one device by itself.
        plan: The plan.
        hardware: Its links; a link of unknown rate adds nothing.
        held_weight_bytes: Weights that a device holds: at stage 3 its share of them.
        trained_bytes: Gradients of all that is trained, as they are exchanged.
        all_weight_bytes: All weights; 0: nobody knows, and they are as many shares as there are devices.
    """
    if plan.engine is Engine.NONE:
        return step
    devices = plan.num_devices if plan.shard_within_node else plan.world_size
    weights = all_weight_bytes or held_weight_bytes * (devices if plan.zero_stage == 3 else 1)
    seconds = communication_seconds(plan, hardware, traffic(plan, trained_bytes, weights), step.seconds)
    seconds += offload_seconds(plan, hardware, trained_bytes, weights, step.seconds)
    return replace(step, communication_seconds=step.communication_seconds + seconds)
