"""Memory over phases and categories, in bytes: what a prediction says and what a measurement says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby, pairwise
from typing import Protocol

from launcher.leak import Leak
from launcher.nvme import NvmeEstimate


class Phase(StrEnum):
    """A stretch of a run with a peak of its own, in the order in which they happen."""

    LOAD = "load"
    RESUME = "resume"
    TRAIN_STEP = "train_step"
    OPTIMIZER_STEP = "optimizer_step"
    EVALUATION = "evaluation"
    GENERATION = "generation"
    SAVE = "save"
    MERGE = "merge"


TRAINING = (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
"""Phases of an optimizer step."""


class Category(StrEnum):
    """What a block of memory is for."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATIONS = "activations"
    LOGITS_AND_LOSS = "logits_and_loss"
    TEMPORARIES = "temporaries"
    INPUTS = "inputs"
    WORKSPACES = "workspaces"


class Region(StrEnum):
    """Where in a training step memory is taken."""

    OUTSIDE = "outside"
    BACKBONE = "backbone"
    HEAD = "head"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"


KEPT_FOR_BACKWARD = (Region.BACKBONE, Region.RECOMPUTE)
"""Regions whose survivors, once they end, are activations."""


class Placed(Protocol):
    """A block of memory that knows where in a step it was taken, and perhaps what it is for."""

    region: Region
    category: Category | None


def settle_region(blocks: Iterable[Placed], ended: Region) -> None:
    """What a backbone leaves behind as it ends, or a recomputed layer, are activations.

    Args:
        blocks: All that are held.
        ended: The region that ends.
    """
    if ended in KEPT_FOR_BACKWARD:
        for block in blocks:
            if block.category is None and block.region is ended:
                block.category = Category.ACTIVATIONS


def category_of(marked: Category | None, born_in: Region) -> Category:
    """What a block is for: what was said of it, else by where it was born."""
    if marked is not None:
        return marked
    return Category.LOGITS_AND_LOSS if born_in is Region.HEAD else Category.TEMPORARIES


RESIDENT = (Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""Categories that outlive a forward and backward pass, and can be weighed on the live objects of a run."""


@dataclass(frozen=True)
class PhasePeak:
    """The highest moment of one phase.

    Raises:
        ValueError: When the categories do not sum to the peak.
    """

    phase: Phase
    """Which phase."""
    allocated_bytes: int
    """Bytes of live tensors at the highest moment."""
    by_category_bytes: Mapping[Category, int]
    """What they are for; sums to `allocated_bytes`."""
    reserved_bytes: int | None = None
    """Peak bytes that the caching allocator holds; None where there is none, or where it was not replayed."""

    def __post_init__(self) -> None:
        total = sum(self.by_category_bytes.values())
        if total != self.allocated_bytes:
            raise ValueError(
                f"phase {self.phase}: categories sum to {total} bytes, the peak is {self.allocated_bytes}"
            )


@dataclass(frozen=True)
class Interval:
    """Where a measured peak is to be expected."""

    low_bytes: int
    """Lower end."""
    high_bytes: int
    """Upper end."""
    coverage: float
    """Probability that a measurement is not above the upper end."""
    num_runs: int
    """Measured runs that it rests on."""
    is_new_architecture: bool
    """Whether no run of the architecture is among them."""


PINNED = (Category.INPUTS, Category.ACTIVATIONS)
"""What a job on a GPU pins in host memory: the loader's batches and offloaded activations."""


@dataclass(frozen=True)
class HostEstimate:
    """Host memory of one process."""

    process_bytes: int
    """The process with its libraries, before anything is loaded; 0 where it was not weighed."""
    phases: tuple[PhasePeak, ...]
    """Tensors in host memory, one peak per phase that has any; on a CPU those of the device."""
    pinned_bytes: int
    """Most of it that is pinned."""

    @property
    def state_bytes(self) -> int:
        """Optimizer states in host memory while training."""
        training = [peak for peak in self.phases if peak.phase in TRAINING]
        return max((peak.by_category_bytes[Category.OPTIMIZER_STATE] for peak in training), default=0)

    def lasting_bytes(self, without: Collection[Category] = ()) -> int:
        """The highest that is left without what hangs on the shape of a batch, and without some categories."""
        left_out = {*PINNED, *without}
        return self.process_bytes + max(
            (
                peak.allocated_bytes - sum(peak.by_category_bytes.get(name, 0) for name in left_out)
                for peak in self.phases
            ),
            default=0,
        )

    @property
    def peak_bytes(self) -> int:
        """Highest bytes over all phases."""
        return self.process_bytes + max((peak.allocated_bytes for peak in self.phases), default=0)

    @property
    def by_category_bytes(self) -> Mapping[str, int]:
        """What is there at the highest moment; sums to `peak_bytes`."""
        parts: dict[str, int] = {"process": self.process_bytes}
        if self.phases:
            highest = max(self.phases, key=lambda peak: peak.allocated_bytes)
            parts |= {name.value: size for name, size in highest.by_category_bytes.items() if size}
        return parts


@dataclass(frozen=True)
class DiskEstimate:
    """What a run leaves on disk: files with tensors. Tokenizer, configs and logs come on top."""

    checkpoint_bytes: int
    """One checkpoint: weights or adapter, and the optimizer's states; 0 when none is saved, and under an engine."""
    num_checkpoints: int | None
    """Most checkpoints that are there at once; None when the number of steps is not known."""
    model_bytes: int
    """The trained weights or adapter."""
    merged_bytes: int
    """The merged model; 0 when there is none."""

    @property
    def total_bytes(self) -> int:
        """All of it; of an unknown number of checkpoints, one."""
        num_checkpoints = 1 if self.num_checkpoints is None else self.num_checkpoints
        return num_checkpoints * self.checkpoint_bytes + self.model_bytes + self.merged_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """A prediction: the peak of every phase, on one device.

    Raises:
        ValueError: When there is no phase.
    """

    phases: tuple[PhasePeak, ...]
    """One peak per phase, in order."""
    resident_bytes: Mapping[Category, int]
    """Full size of each resident category, whenever it is complete (see `RESIDENT`)."""
    context_bytes: int
    """What the runtime takes on the device, outside the allocator."""
    interval: Interval | None = None
    """Where the highest bytes of live tensors are to be expected; None where no run of the kind was measured."""
    host: HostEstimate | None = None
    """Host memory; None in records of old runs."""
    disk: DiskEstimate | None = None
    """What the run leaves on disk; None in records of old runs."""
    nvme: NvmeEstimate | None = None
    """What it swaps to NVMe; None where it does not."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("an estimate without phases")

    @property
    def peak(self) -> PhasePeak:
        """The phase with the highest peak; the earliest of equals."""
        return max(self.phases, key=lambda phase: phase.allocated_bytes)

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest bytes of live tensors over all phases."""
        return self.peak.allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int | None:
        """Highest bytes that the caching allocator holds, over all phases; None when it was not replayed."""
        return max(
            (peak.reserved_bytes for peak in self.phases if peak.reserved_bytes is not None), default=None
        )

    @property
    def peak_device_bytes(self) -> int:
        """Highest bytes on the device: what the allocator holds (live tensors, where that is not known) and context."""
        held = self.peak_reserved_bytes
        return (self.peak_allocated_bytes if held is None else held) + self.context_bytes

    def phase(self, phase: Phase) -> PhasePeak | None:
        """The peak of one phase; None when the run has no such phase."""
        return next((peak for peak in self.phases if peak.phase is phase), None)


@dataclass(frozen=True)
class ModuleShare:
    """What one module has alive at a moment."""

    module: str
    """Its path, `model.layers.3.mlp.down_proj`; "" is for what no module made."""
    num_bytes: int
    """Bytes of its live blocks."""
    num_blocks: int
    """How many they are."""


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment."""

    phase: Phase
    """Its phase."""
    allocated_bytes: int
    """Bytes of live tensors."""
    by_category_bytes: Mapping[Category, int]
    """What they are for."""
    by_module: tuple[ModuleShare, ...]
    """The modules that made most of them, largest first."""


@dataclass(frozen=True)
class Timeline:
    """Memory over a stretch of a run: its highest values in equal parts of it."""

    allocated_bytes: tuple[int, ...]
    """Highest bytes of live tensors in each part."""
    phases: tuple[Phase, ...]
    """Phase of each part."""


TIMELINE_PARTS = 600


def last_step(allocated_bytes: Sequence[int], phases: Sequence[Phase]) -> Timeline:
    """The last optimizer step of a run: its passes, and the optimizer's own step.

    Args:
        allocated_bytes: Live bytes after every event.
        phases: Phase of every event.

    Raises:
        ValueError: When no optimizer step is among them.
    """
    stretches: list[tuple[Phase, int]] = []
    for phase, events in groupby(phases):
        stretches.append((phase, len(list(events))))
    last = max(i for i, (phase, _) in enumerate(stretches) if phase is Phase.OPTIMIZER_STEP)
    begin = sum(length for _, length in stretches[: max(0, last - 1)])
    end = sum(length for _, length in stretches[: last + 1])
    count = min(TIMELINE_PARTS, end - begin)
    edges = [begin + (end - begin) * i // count for i in range(count + 1)]
    highest = tuple(int(max(allocated_bytes[a:b])) for a, b in pairwise(edges))
    return Timeline(highest, tuple(phases[a] for a in edges[:-1]))


@dataclass(frozen=True)
class Bill:
    """Where the memory of a plan goes."""

    peak: Moment
    """The highest moment."""
    next_highest: Moment | None
    """The highest moment of another hill; None when there is one hill only."""
    step: Timeline
    """One optimizer step, the last one traced."""


@dataclass(frozen=True)
class StepShape:
    """Shape of one measured forward pass."""

    micro_batch_size: int
    """Sequences."""
    length: int
    """Tokens per sequence, padding included."""


@dataclass(frozen=True)
class MeasuredPhase:
    """What the meter saw in one phase."""

    phase: Phase
    """Which phase."""
    allocated_bytes: int
    """Peak bytes of live tensors."""
    reserved_bytes: int | None
    """Peak bytes held by the caching allocator; None where there is none (CPU)."""
    device_bytes: int | None
    """Peak bytes used on the device by this process (on CPU: of its memory, since it began); None where unknown."""
    by_category_bytes: Mapping[Category, int] | None = None
    """What they were for; sums to `allocated_bytes`. None where the meter can't tell, and in old records."""


@dataclass(frozen=True)
class MemoryMeasurement:
    """What the meter saw on one rank. Never computed by the tracer."""

    rank: int
    """Global rank."""
    meter: str
    """How it was measured."""
    phases: tuple[MeasuredPhase, ...]
    """Peaks, in order."""
    resident_bytes: Mapping[Category, int]
    """Bytes of the live objects of each resident category."""
    shapes: tuple[StepShape, ...]
    """Shapes of training's forward passes under the meter."""
    host_peak_bytes: int | None = None
    """Highest resident memory of the process, the kernel's view; None where it does not say."""
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """Files with tensors that the run left, by folder: `checkpoint` (the last one), `model`, `merged`."""
    evaluation_shapes: tuple[StepShape, ...] = ()
    """Shapes of evaluation's forward passes."""
    leak: Leak | None = None
    """Memory after each step that grew steadily; None where it did not."""

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest peak over all phases."""
        return max(phase.allocated_bytes for phase in self.phases)

    def phase(self, phase: Phase) -> MeasuredPhase | None:
        """The peak of one phase; None when it was not measured."""
        return next((peak for peak in self.phases if peak.phase is phase), None)


@dataclass(frozen=True)
class HeldMemory:
    """What a process had right after an allocation failed, by its own count; the tracer has no part in it."""

    allocated_bytes: int | None
    """What was in use: on CUDA by torch's allocator; on a CPU by the C library's, less what was in use at the start, with
    weights that are mapped from files. None where nobody counts it."""
    peak_allocated_bytes: int | None
    """The highest of it since the phase began; None on a CPU, where nobody keeps it."""
    reserved_bytes: int | None
    """What the caching allocator held; None where there is none (CPU)."""
    process_peak_bytes: int | None
    """On a CPU the process's highest resident memory, the kernel's view; None on CUDA, and where it does not say."""
    resident_bytes: Mapping[Category, int]
    """Resident categories, weighed on the live objects; empty where there was no trainer yet."""
