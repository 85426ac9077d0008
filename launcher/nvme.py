"""What a plan has on NVMe, and what it must lock into host memory to swap there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NvmeEstimate:
    """NVMe of one process, for as long as it runs."""

    file_bytes: int
    """Files that hold optimizer states, and gradients until the update."""
    locked_bytes: int
    """Buffers in host memory whose pages are locked; the process must be allowed to (`ulimit -l`)."""
