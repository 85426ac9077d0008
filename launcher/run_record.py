"""What passes between parent and worker, and what stays of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from launcher.job import JobSpec
from launcher.leak import Leak
from launcher.memory import HeldMemory, MemoryEstimate, MemoryMeasurement, Phase
from launcher.plan import Plan
from launcher.step_time import StepTime

WORKER_MARK = "\x1elauncher: "
"""What the worker's own lines begin with, so that the parent tells them from the libraries' output."""


class Status(StrEnum):
    """How a worker ended."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    TERMINATED = "terminated"
    OUT_OF_MEMORY = "out_of_memory"
    DATA_ERROR = "data_error"
    FAILED = "failed"


@dataclass(frozen=True)
class WorkerOrder:
    """What the worker is asked to do."""

    job: JobSpec
    """The job."""
    plan: Plan
    """The plan."""
    predicted: MemoryEstimate
    """The plan's prediction, for the reconciliation after the run."""
    weights: str
    """Folder or hub id of weights and tokenizer; for a packaged model the folder of its GGUF file."""
    converted: str
    """Where a packaged model is converted to at its first use; empty for any other."""
    predicted_step: StepTime | None = None
    """Predicted time of the plan's optimizer step; None where nobody knows how fast the device is."""
    rehearses: bool = False
    """Whether it trains on the longest examples alone, for the meter."""


@dataclass(frozen=True)
class WorkerOutcome:
    """How one rank ended."""

    status: Status
    """Kind of end."""
    message: str
    """Details for a person; empty when done."""
    steps: int
    """Optimizer steps finished."""
    first_loss: float | None
    """First logged loss."""
    last_loss: float | None
    """Last logged loss."""
    train_seconds: float
    """Wall time of the training loop."""
    tokens_per_second: float | None
    """Median over the steps after the metered ones, per device, padding included."""
    step_seconds: float | None
    """Median wall time of an optimizer step after the metered ones."""
    world_size: int
    """Processes that took part."""
    rank: int = 0
    """Which of them this is."""
    host: str = ""
    """Name of its machine; empty where it could not say."""
    ended_at_seconds: float = 0.0
    """Unix time at which it ended: a failure draws others after it."""
    tokens_per_step: float | None = None
    """Median tokens of these steps per device, padding included; less than planned where examples are short."""
    phase: Phase | None = None
    """Phase in which it ended; None where it could not say."""
    held: HeldMemory | None = None
    """What it had when it ran out of memory; None where it did not, or was killed and could not say."""


@dataclass(frozen=True)
class Finding:
    """A peak above what was to be expected."""

    phase: Phase
    """Whose peak."""
    measured_bytes: int
    """The peak."""
    predicted_bytes: int
    """What was predicted."""
    expected_bytes: int
    """The upper end of what was to be expected."""
    category: str
    """What there was more of than predicted; `working_set` is all that comes and goes, where no meter tells it apart."""
    category_excess_bytes: int
    """How much more of that."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal showed."""

    predicted: MemoryEstimate
    """The prediction for the largest batch that it ran."""
    measured: MemoryMeasurement
    """Rank 0, or the rank with the highest peak."""
    seconds: float
    """Wall time of it, loading included."""
    findings: tuple[Finding, ...]
    """Peaks above the prediction's interval."""


@dataclass(frozen=True)
class Replan:
    """A plan that ran out of memory, or that the user gave up when resuming, and what came next."""

    phase: Phase | None
    """Phase in which memory ran out; None where nobody could say, and where the user changed the plan."""
    message: str
    """What the worker, or the kernel, said; what the user asked for."""
    in_rehearsal: bool
    """Whether that was in the rehearsal."""
    failed: Plan
    """The plan before."""
    taken: Plan
    """The plan after it."""
    change: str
    """What is different, in words."""
    from_step: int
    """Optimizer steps in the checkpoint that it went on from; 0: from the beginning."""
    held: HeldMemory | None = None
    """What the worker had when memory ran out; None where it could not say."""
    by_user: bool = False
    """Whether the user changed the plan, with `launch resume=<run dir> <key>=<value>`: nothing had failed."""


@dataclass(frozen=True)
class RunRecord:
    """One run, reconciled: what was predicted and what was measured."""

    run_dir: str
    """Where the run lies."""
    recipe: str
    """Recipe of the job."""
    model: str
    """Path of the model."""
    hardware: str
    """Name of the hardware."""
    started: str
    """Start time, ISO 8601, UTC."""
    plan: Plan
    """What ran."""
    predicted: MemoryEstimate
    """The plan's prediction, for its largest batch."""
    predicted_as_run: MemoryEstimate | None
    """The same prediction at the largest shape that ran under the meter; None when they are the same shape."""
    measured: MemoryMeasurement | None
    """Rank 0; None when the run ended before the meter was read."""
    outcome: WorkerOutcome
    """How it ended."""
    versions: Mapping[str, str]
    """Library versions of the worker."""
    measured_ranks: tuple[MemoryMeasurement, ...] = ()
    """Every rank that was measured, in order; the first of them is `measured`."""
    predicted_step: StepTime | None = None
    """Predicted time of the plan's optimizer step; None where nobody knew how fast the device is."""
    predicted_step_as_run: StepTime | None = None
    """The same for as many tokens as the steps had; None when that is what was planned."""
    rehearsal: Rehearsal | None = None
    """What the rehearsal showed; None where there was none, or it did not end well."""
    replans: tuple[Replan, ...] = ()
    """Plans that ran out of memory before this one, and those that the user changed."""

    @property
    def leak(self) -> Leak | None:
        """The rank's with the fastest growth after each step; None where no rank's memory grew."""
        leaks = [measured.leak for measured in self.measured_ranks if measured.leak is not None]
        return max(leaks, key=lambda leak: leak.bytes_per_step, default=None)
