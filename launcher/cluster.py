"""The machines of a run: what starts its processes on them, and where these meet."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class LaunchSpec:
    """How the processes are started on one machine or on several."""

    cluster: Cluster = Cluster.LOCAL
    """`local`: this machine; `manual`: node 0 here, and a command is printed for every other node. `slurm`, `skypilot`
    and `kubernetes` are not built yet."""
    main_address: str = ""
    """Name or address under which the other nodes reach node 0; empty: this machine's host name."""
    main_port: Annotated[int, Ge(0), Le(65534)] = 0
    """TCP port on node 0 where the processes meet, and with several nodes the next one, where the nodes do; 0: 29500
    with several nodes, a free one otherwise."""
    connect_seconds: Annotated[int, Ge(1)] = 300
    """How long nodes wait for each other at the start."""


@dataclass(frozen=True)
class Node:
    """One machine of a run, and where its processes meet the others'."""

    rank: int = 0
    """Number of the machine, from 0."""
    address: str = ""
    """Name or address of machine 0, as the others reach it; empty on a single machine."""
    port: int = 0
    """TCP port there; 0 takes a free one, on a single machine."""

    @property
    def control_port(self) -> int:
        """TCP port on machine 0 where the launchers of the machines meet."""
        return self.port + 1
