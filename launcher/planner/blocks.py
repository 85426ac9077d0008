"""What a tape writes down: storages with their births and releases.

Without torch: the planner's own process reads these out of the tracing processes, and importing torch there would
cost it seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.domain import Exponents
from launcher.memory import Category, Phase, Region

FLUSH = "empty_cache"
"""Named as operation of a block of no size, at whose birth the allocator gives back what it holds for nothing."""


@dataclass(slots=True)
class Block:
    """One storage, from its birth to its release."""

    num_bytes: int
    size: dict[Exponents, int]
    operation: str
    phase: Phase
    region: Region
    category: Category | None = None
    alive: bool = True
    module: str = ""
    """Path of the module that it was made for; empty when there is none, or nobody asked."""
    on_host: bool = False
    """Whether it is in host memory while the job runs on a GPU."""
    is_pinned: bool = False
    """Whether an engine pinned it there."""
    cuda_stream: int = 0
    """The CUDA stream that it was asked for on; 0: the default one. An allocator gives it to no other."""
    is_part: bool = False
    """Whether it is a rank's part of something that all ranks share: the more ranks, the smaller."""


@dataclass(slots=True)
class Event:
    """A birth or a release, in the order of time."""

    block: Block
    birth: bool
    instant: int
    """Number of the operation that allocated; releases belong to the operation before them."""
    phase: Phase
