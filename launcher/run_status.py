"""Where a run stands: what `action=status` says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from launcher.cluster import Cluster, SubmittedJob


class RunState(StrEnum):
    """How far a run is."""

    PREPARED = "prepared"
    """Its directory is written; nothing was started, or nothing that can be seen from here."""
    SUBMITTED = "submitted"
    """A scheduler took it, and can't be asked about it here."""
    PENDING = "pending"
    """It waits in the scheduler's queue."""
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """It was asked to stop; with a checkpoint it can be resumed."""
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes by itself."""
        return self in (RunState.FINISHED, RunState.INTERRUPTED, RunState.FAILED)


@dataclass(frozen=True)
class NodeFailure:
    """Why one machine's part did not end well."""

    exit_code: int
    """The launcher's."""
    message: str
    """For a person."""


@dataclass(frozen=True)
class RankProcess:
    """The process of one rank, as far as it can be seen from here."""

    rank: int
    """Which one."""
    host: str
    """Machine that it was started on; empty when it was not started."""
    pid: int | None
    """Its process id there; None when it was not started."""
    is_alive: bool | None
    """Whether it runs; None when it is on another machine, or was not started."""


@dataclass(frozen=True)
class RunStatus:
    """Where one run stands."""

    run_dir: str
    """The run directory."""
    cluster: Cluster
    """What starts it."""
    state: RunState
    """How far it is."""
    message: str
    """Why it ended so; empty when there is nothing to say."""
    step: int
    """Last logged optimizer step."""
    max_steps: int | None
    """Steps that the job asks for; None where epochs decide."""
    loss: float | None
    """Last logged loss."""
    last_checkpoint: str
    """Folder of the newest complete checkpoint; empty when there is none."""
    job: SubmittedJob | None
    """The scheduler's job."""
    slurm_state: str
    """Slurm's own word; empty where there is none."""
    ranks: tuple[RankProcess, ...]
    """Every rank's process."""
