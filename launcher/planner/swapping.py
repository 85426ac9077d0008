"""What DeepSpeed swaps to NVMe, and the buffers before it: how large, and how that grows with depth.

deepspeed 0.19.8, runtime/swap_tensor. The largest group of states sizes the buffers, and groups below a size stay in
host memory: neither is linear in depth where another group becomes the largest, or one grows beyond the size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

ALIGNED_BYTES = 1024
"""`AIO_ALIGNED_BYTES` (deepspeed 0.19.8, swap_tensor/utils.py), with one thread per read or write: buffers and files are
multiples of it."""


@dataclass(frozen=True)
class Swapping:
    """What a rank has on NVMe, and in page-locked memory for it."""

    groups_bytes: tuple[int, ...]
    """The groups in which the optimizer's states are updated: one state of each, in the optimizer's order, bytes."""
    limit_bytes: int
    """A group that reaches it is closed (`sub_group_size`), bytes of one state."""
    least_bytes: int
    """Groups below it stay in host memory, bytes of one state."""
    locked_bytes: tuple[int, ...]
    """Page-locked buffers, bytes."""
    files_bytes: tuple[int, ...]
    """Files, bytes."""

    @property
    def num_swapped(self) -> int:
        """How many groups are on NVMe."""
        return sum(size >= self.least_bytes for size in self.groups_bytes)

    def why_not_extended(self, low: Swapping, high: Swapping, steps: float) -> str:
        """Why this is not what DeepSpeed would do at full depth; empty when it is.

        Args:
            low: The same of the shallower trace, of which this one is an extension.
            high: The same of the deeper trace.
            steps: How many times the difference of the two was added to the shallower one.
        """
        if self.num_swapped != low.num_swapped + steps * (high.num_swapped - low.num_swapped):
            return f"a group of states grows beyond {self.least_bytes} bytes, from which on it is swapped"
        grown = Counter(self.groups_bytes) - Counter(low.groups_bytes) - Counter(high.groups_bytes)
        if any(size > self.limit_bytes for size in grown):
            return f"a group of states grows beyond {self.limit_bytes} bytes, at which it is closed"
        largest = -(-max(self.groups_bytes) // ALIGNED_BYTES) * ALIGNED_BYTES
        if any(size != largest for size in self.locked_bytes):
            return f"swap buffers of {largest} bytes do not grow as the layers do"
        if any(size % ALIGNED_BYTES for size in self.files_bytes):
            return "files do not grow as the layers do"
        return ""
