"""What a plan takes besides the device: host memory, pinned memory, disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import JobSpec, StoredDtype, TrainingSpec
from launcher.memory import PINNED, Category, DiskEstimate, HostEstimate, MemoryEstimate, Phase, PhasePeak
from launcher.nvme import NvmeEstimate
from launcher.optimisation import BF16_WEIGHTS
from launcher.plan import Plan
from launcher.planner.skyline import Skyline
from launcher.planner.swapping import Swapping

CHECKPOINT, MODEL, MERGED = "checkpoint", "model", "merged"
"""The folders that a run saves."""


def host_estimate(
    skyline: Skyline, device: Sequence[PhasePeak], plan: Plan, job: JobSpec, process_bytes: int
) -> HostEstimate:
    """Host memory of a plan.

    Args:
        skyline: Its trace.
        device: Peaks on the device; on a CPU they are the host's.
        plan: The plan.
        job: The job.
        process_bytes: The process with its libraries.
    """
    locked = 0 if skyline.swapping is None else sum(skyline.swapping.locked_bytes)
    if job.hardware.kind is DeviceKind.CPU:
        return HostEstimate(process_bytes, tuple(device), locked)
    if skyline.host is None:
        return HostEstimate(process_bytes, (), 0)
    peaks = skyline.host.peaks(plan.micro_batch_size, plan.max_length, plan.gradient_accumulation_steps)
    phases = tuple(_with_stored_copy(peak, plan, job) if peak.phase is Phase.LOAD else peak for peak in peaks)
    pinned = max(sum(peak.by_category_bytes[category] for category in PINNED) for peak in phases)
    kept = [pinned_bytes(size) for size in skyline.host.pinned]
    rounding = sum(kept) - sum(skyline.host.pinned)
    phases = tuple(_with_rounding(peak, rounding) for peak in phases)
    return HostEstimate(process_bytes, phases, pinned + sum(kept) + locked)


def nvme_estimate(swapping: Swapping | None) -> NvmeEstimate | None:
    """What a plan has on NVMe; None where nothing is swapped."""
    if swapping is None:
        return None
    return NvmeEstimate(sum(swapping.files_bytes), sum(swapping.locked_bytes))


def pinned_bytes(num_bytes: int) -> int:
    """What a pinned block takes: the next power of two (ATen/core/CachingHostAllocator.h, torch 2.13)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def _with_rounding(peak: PhasePeak, num_bytes: int) -> PhasePeak:
    """What an engine pins is rounded up, and stays so from loading on."""
    if not num_bytes:
        return peak
    amounts = dict(peak.by_category_bytes)
    amounts[Category.TEMPORARIES] = amounts.get(Category.TEMPORARIES, 0) + num_bytes
    return PhasePeak(peak.phase, peak.allocated_bytes + num_bytes, amounts)


def _with_stored_copy(peak: PhasePeak, plan: Plan, job: JobSpec) -> PhasePeak:
    """Weights in another dtype than the file's are cast in host memory, and stay there in both until all are cast."""
    held, stored = weight_bytes(plan, job)
    staged = peak.by_category_bytes[Category.PARAMETERS]
    if held == stored or not staged:
        return peak
    amounts = {**peak.by_category_bytes, Category.TEMPORARIES: staged // held * stored}
    return PhasePeak(peak.phase, sum(amounts.values()), amounts)


def weight_bytes(plan: Plan, job: JobSpec) -> tuple[int, int]:
    """Bytes per weight as it is held, and as it is in the file."""
    held = 2 if plan.precision in BF16_WEIGHTS else 4
    return held, 4 if job.model.stored_dtype is StoredDtype.FP32 else 2


def disk_estimate(sizes_bytes: Mapping[str, int], training: TrainingSpec) -> DiskEstimate:
    """What a run leaves on disk.

    Args:
        sizes_bytes: Sizes of the folders that it saves.
        training: How often it saves, and how much it keeps.
    """
    return DiskEstimate(
        checkpoint_bytes=sizes_bytes.get(CHECKPOINT, 0),
        num_checkpoints=checkpoints_at_once(training),
        model_bytes=sizes_bytes.get(MODEL, 0),
        merged_bytes=sizes_bytes.get(MERGED, 0),
    )


def checkpoints_at_once(training: TrainingSpec) -> int | None:
    """Most checkpoints that are on disk at once; None when the number of steps is not known.

    The trainer saves every `save_steps` steps and after the last one, and drops the oldest when the newest is
    complete.
    """
    between = training.steps_between_saves
    if between is None:
        return 0
    limit = None if training.save_total_limit is None else training.save_total_limit + 1
    if training.max_steps is None:
        return limit
    saved = -(-training.max_steps // between)
    return saved if limit is None else min(saved, limit)


def short_on_host(estimate: MemoryEstimate, hardware: HardwareSpec) -> int:
    """Bytes by which a plan exceeds the host memory; 0 where that is not known, or is the device's own."""
    if estimate.host is None or not hardware.host_memory_bytes or hardware.kind is DeviceKind.CPU:
        return 0
    return max(0, estimate.host.peak_bytes - hardware.host_memory_bytes)


def short_on_nvme(estimate: MemoryEstimate, hardware: HardwareSpec) -> int:
    """Bytes by which a plan exceeds a device's share of the NVMe; 0 where that is not known, or nothing is swapped."""
    if estimate.nvme is None or not hardware.nvme_bytes:
        return 0
    return max(0, estimate.nvme.file_bytes - hardware.nvme_bytes)
