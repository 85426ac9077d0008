"""The machines of a run: what starts its processes on them, and where these meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Final

from annotated_types import Ge, Le

DEFAULT_PORT: Final = 29500
"""torchrun's and accelerate's."""


class Cluster(StrEnum):
    """What starts the processes on the machines of a run."""

    LOCAL = "local"
    MANUAL = "manual"
    SLURM = "slurm"
    SKYPILOT = "skypilot"
    KUBERNETES = "kubernetes"

    @property
    def is_elsewhere(self) -> bool:
        """Whether the processes run on machines of the cluster's choice, and `launch` returns before they begin."""
        return self not in (Cluster.LOCAL, Cluster.MANUAL)


@dataclass(frozen=True)
class LaunchSpec:
    """How the processes are started on one machine or on several.

    A key that says nothing to the cluster is refused (`USED_BY`).
    """

    cluster: Cluster = Cluster.LOCAL
    """`local`: this machine. `manual`: node 0 here, and a command is printed for every other node. `slurm`: a batch
    job is submitted with sbatch, and `launch` returns with its number; `launch action=status run_dir=<run dir>` follows
    it. `skypilot`, `kubernetes`: a task file is written, and the command that submits it is printed."""
    main_address: str = ""
    """Name or address under which the other nodes reach node 0; empty: this machine's host name, or what the cluster
    says."""
    main_port: Annotated[int, Ge(0), Le(65534)] = 0
    """TCP port on node 0 where the processes meet, and with several nodes the next one, where the nodes do; 0: a free
    one on a single node, one that follows from the job's number under Slurm, 29500 otherwise."""
    connect_seconds: Annotated[int, Ge(1)] = 300
    """How long nodes wait for each other at the start."""
    grace_seconds: Annotated[int, Ge(1)] = 120
    """How long an interrupted run may take to save a checkpoint. Slurm warns a job so long before its time is up (up to
    a minute earlier), and Kubernetes lets a pod live so long; what `scancel` grants is Slurm's own KillWait, 30 s
    unless the site has set it."""
    python: str = ""
    """Interpreter on the nodes; empty: this one under Slurm, whose nodes see the same folders, `python3` in an image."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the training: `module load`, `pip install`. Under Slurm once, and every node inherits
    the environment; on every node otherwise."""
    cpus_per_device: Annotated[int, Ge(1)] = 4
    """CPUs to ask for, per device: a training process has a thread each for the forward and the backward pass, and one
    that moves data; the fourth is for what runs beside it."""
    memory_bytes: Annotated[int, Ge(0)] = 0
    """Host memory to ask for, per node; 0: what the plan expects, with the planner's headroom, or the cluster's default
    where that is not known."""
    time_limit_minutes: Annotated[int, Ge(0)] = 0
    """How long the job may run; 0: the cluster's default."""
    partition: str = ""
    """Slurm partition; empty: the default one."""
    account: str = ""
    """Slurm account; empty: the default one."""
    requeue: bool = False
    """Slurm: whether a job that was interrupted from outside (preemption, the time limit) is queued again when it has
    saved its checkpoint, and continues there. What `scancel` ended stays ended."""
    options: tuple[str, ...] = ()
    """More options for sbatch, as `--constraint=a100`; they come last, and win over those that the plan gave."""
    image: str = ""
    """Container image of the nodes. It must hold Python 3.11 or newer with this package and its dependencies in the
    versions of this machine and, for DeepSpeed with offload, a C++ compiler and ninja."""
    volume: str = ""
    """Storage that all nodes mount at `volume_path`: a PersistentVolumeClaim (Kubernetes), a volume of SkyPilot's."""
    volume_path: str = ""
    """Absolute folder at which the nodes mount `volume`. Run directory, model and data must lie below it under the
    same names as here."""
    runtime: str = "torch-distributed"
    """Kubernetes: ClusterTrainingRuntime that the TrainJob refers to; it must have a torch policy."""
    accelerator: str = ""
    """SkyPilot: its name of the device, as `sky gpus list` prints it; empty: found by the name of the hardware."""
    infra: str = ""
    """SkyPilot: where to run, as `kubernetes` or `aws/us-east-1`; empty: where it is cheapest."""
    rehearse: bool = True
    """Whether a run begins with a rehearsal in processes of its own: two steps of the longest examples, an evaluation
    batch, a generation if the job has one, and a save; each compared with the prediction. Nothing of it stays."""
    max_replans: Annotated[int, Ge(0), Le(16)] = 2
    """Out of memory: how many more plans are tried, each smaller than the one that failed, with the same global batch
    and every knob that changes the result; from the last checkpoint. Each `launch resume=` counts anew."""


_ELSEWHERE: Final = (Cluster.SLURM, Cluster.SKYPILOT, Cluster.KUBERNETES)
_IMAGES: Final = (Cluster.SKYPILOT, Cluster.KUBERNETES)
USED_BY: Final[dict[str, tuple[Cluster, ...]]] = {
    "main_address": (Cluster.MANUAL, Cluster.SLURM),
    "python": _ELSEWHERE,
    "setup": _ELSEWHERE,
    "cpus_per_device": _ELSEWHERE,
    "memory_bytes": _ELSEWHERE,
    "time_limit_minutes": (Cluster.SLURM, Cluster.KUBERNETES),
    "partition": (Cluster.SLURM,),
    "account": (Cluster.SLURM,),
    "requeue": (Cluster.SLURM,),
    "options": (Cluster.SLURM,),
    "image": _IMAGES,
    "volume": _IMAGES,
    "volume_path": _IMAGES,
    "runtime": (Cluster.KUBERNETES,),
    "accelerator": (Cluster.SKYPILOT,),
    "infra": (Cluster.SKYPILOT,),
}
"""Keys of `LaunchSpec` that not every cluster heeds: those that do."""


@dataclass(frozen=True)
class Node:
    """One machine of a run, and where its processes meet the others'."""

    rank: int = 0
    """Number of the machine, from 0."""
    address: str = ""
    """Name or address of machine 0, as the others reach it; empty on a single machine."""
    port: int = 0
    """TCP port there; 0 takes a free one, on a single machine."""
    secret: str = field(default="", repr=False)
    """What machines of this run say first to machine 0; see run/secret.py."""

    @property
    def control_port(self) -> int:
        """TCP port on machine 0 where the launchers of the machines meet."""
        return self.port + 1


@dataclass(frozen=True)
class SubmittedJob:
    """A job that a scheduler took."""

    job_id: str
    """Its number."""
    cluster: str = ""
    """Name of the Slurm cluster; empty where there is only one."""
