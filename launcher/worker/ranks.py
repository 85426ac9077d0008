"""Which of the processes this one is, as torchrun tells it; without torch, so that it can be asked before any import."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))
