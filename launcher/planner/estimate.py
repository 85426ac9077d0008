"""Reads a plan's memory off a skyline, and adds what no trace has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec, Method, StoredDtype
from launcher.memory import TRAINING, Category, HostEstimate, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.host import disk_estimate, host_estimate, nvme_estimate, weight_bytes
from launcher.planner.skyline import Skyline
from launcher.units import MIB

WORKSPACES = 2
"""Matrix-library workspaces of a training process: one for the forward thread, one for autograd's."""

COLLECTIVES_BYTES: Final = {
    Engine.DDP: 376 * MIB,
    Engine.DEEPSPEED: 394 * MIB,
    Engine.FSDP2: 434 * MIB,
}
"""What a rank holds on a card outside of the allocator beyond a process that trains alone: NCCL's buffers, and kernels of
the engine. Of two ranks that meet over sockets, NCCL 2.28, torch 2.11, H200, 2026-11-27 (docs/gpu.md). Over NVLink NCCL
has other buffers, and among more ranks more of them, which nobody has measured here."""


def context_bytes(hardware: HardwareSpec, plan: Plan) -> int:
    """What the runtime takes on a device, outside of the allocator."""
    if hardware.kind is DeviceKind.CUDA:
        return hardware.context_bytes + COLLECTIVES_BYTES.get(plan.engine, 0)
    return hardware.context_bytes


def read_estimate(skyline: Skyline, plan: Plan, job: JobSpec, process_bytes: int = 0) -> MemoryEstimate:
    """Reads a plan's memory off a skyline.

    Args:
        skyline: A trace that answers for the plan.
        plan: The plan.
        job: The job.
        process_bytes: Memory of a process that has imported the libraries; 0: not known.
    """
    batch, length = plan.micro_batch_size, plan.max_length
    resident = skyline.resident_bytes(batch, length)
    phases = tuple(
        _with_stored_copy(peak, resident, plan, job) if peak.phase is Phase.LOAD else peak
        for peak in skyline.peaks(batch, length, plan.gradient_accumulation_steps)
    )
    workspaces = WORKSPACES * job.hardware.blas_workspace_bytes
    if workspaces:
        phases = tuple(
            peak if peak.phase is Phase.LOAD else _with_workspaces(peak, workspaces) for peak in phases
        )
    host = host_estimate(skyline, phases, plan, job, process_bytes)
    phases = tuple(
        _with_unpaged_states(peak, phases, host) if peak.phase is Phase.RESUME else peak for peak in phases
    )
    disk = disk_estimate(skyline.disk_bytes, job.training)
    nvme = nvme_estimate(skyline.swapping)
    return MemoryEstimate(
        phases, resident, context_bytes(job.hardware, plan), host=host, disk=disk, nvme=nvme
    )


def _with_unpaged_states(peak: PhasePeak, phases: Sequence[PhasePeak], host: HostEstimate) -> PhasePeak:
    """A resumed run with a paged optimizer: bitsandbytes 0.50 reads the states into plain memory of the device.

    They stay there (optim/optimizer.py, `load_state_dict`), beside all that a step has on the device.
    """
    training = [known for known in phases if known.phase in TRAINING]
    paged = host.state_bytes
    highest = max(training, key=lambda known: known.allocated_bytes, default=peak)
    if host.phases == tuple(phases) or not paged or highest.allocated_bytes + paged <= peak.allocated_bytes:
        return peak
    amounts = dict(highest.by_category_bytes)
    amounts[Category.OPTIMIZER_STATE] += paged
    return PhasePeak(Phase.RESUME, sum(amounts.values()), amounts)


def _with_workspaces(peak: PhasePeak, num_bytes: int) -> PhasePeak:
    amounts = dict(peak.by_category_bytes)
    amounts[Category.WORKSPACES] = amounts.get(Category.WORKSPACES, 0) + num_bytes
    return PhasePeak(peak.phase, sum(amounts.values()), amounts)


def _with_stored_copy(
    peak: PhasePeak, resident: Mapping[Category, int], plan: Plan, job: JobSpec
) -> PhasePeak:
    """The peak of loading when the file's dtype is not the dtype in which the weights are held.

    transformers reads every tensor and casts it (`core_model_loading._materialize_copy`, 5.17 to 5.23); the
    tensors that were read stay alive until the last one is in place. Adapters, as large as their gradients, come
    afterwards. On a GPU the cast happens in host memory, before the model moves to the device.
    """
    held, stored = weight_bytes(plan, job)
    same_dtype = held == stored and job.model.stored_dtype is not StoredDtype.FP16
    in_parts = plan.engine is Engine.DEEPSPEED and plan.zero_stage == 3
    if same_dtype or in_parts or job.hardware.kind is not DeviceKind.CPU or plan.method is Method.QLORA:
        return peak  # quantised weights, and those that are split as they come, are read one by one
    sharing = 1
    if plan.engine is Engine.FSDP2:  # shards them when they are loaded
        sharing = plan.num_devices if plan.shard_within_node else plan.world_size
    adapters = 0 if plan.method is Method.FULL else resident[Category.GRADIENTS] * sharing
    weights = resident[Category.PARAMETERS] * sharing - adapters
    copy = weights // held * stored
    if copy <= adapters:
        return peak
    amounts = {
        **peak.by_category_bytes,
        Category.PARAMETERS: weights,
        Category.TEMPORARIES: copy,
    }
    return PhasePeak(Phase.LOAD, sum(amounts.values()), amounts)
