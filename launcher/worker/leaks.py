"""Watches what is allocated after each optimizer step, at every pace: a leak that shows within 64 steps, or in 64,000."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.leak import NUM_READINGS, Leak, Reading, find_leak

STRIDE = 4
"""Every so many readings of one pace are one of the next."""
NUM_PACES = 8
"""The slowest pace sees every 16,384th step."""


class _HeapUse(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h (2.33 and newer)."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


@cache
def _heap_reader() -> Callable[[], Any] | None:
    """glibc's `mallinfo2`; None where the C library has none."""
    try:
        reader = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    reader.restype = _HeapUse
    answer: Callable[[], Any] = reader
    return answer


def allocated_now_bytes() -> int | None:
    """What is allocated now; None where nobody counts it.

    On CUDA torch's allocator says so. On a CPU the C library does, from which torch's allocator takes every block: its
    count holds all blocks in use of the process, in arenas and mapped ones, and no free memory, unlike the kernel's.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    reader = _heap_reader()
    if reader is None:
        return None
    use = reader()
    return int(use.uordblks) + int(use.hblkhd)


class LeakWatch:
    """Takes readings and tells of a leak as soon as they show one.

    Args:
        spare_bytes: What the device has above the plan's predicted peak.
    """

    def __init__(self, spare_bytes: int | None) -> None:
        self._spare_bytes = spare_bytes
        self._paces = [deque[Reading](maxlen=NUM_READINGS) for _ in range(NUM_PACES)]
        self._count = 0
        self._seen: list[Leak | None] = [None] * NUM_PACES

    @property
    def leak(self) -> Leak | None:
        """The leak that there is now, at the slowest pace that shows one; None when there is none."""
        return next((leak for leak in reversed(self._seen) if leak is not None), None)

    def take(self, reading: Reading) -> None:
        """Takes the reading after one more step."""
        self._count += 1
        for pace, readings in enumerate(self._paces):
            if self._count % STRIDE**pace:
                break
            readings.append(reading)
            if self._count // STRIDE**pace % (NUM_READINGS // STRIDE) == 0:
                self._seen[pace] = find_leak(list(readings), self._spare_bytes)


class LeakCallback(TrainerCallback):
    """Reads after each optimizer step, and reports a leak once.

    Args:
        watch: Takes the readings.
        skipped_steps: First steps that are not read: the meter's own memory grows during them.
        report: Called with a line for a person.
    """

    def __init__(self, watch: LeakWatch, skipped_steps: int, report: Callable[[str], None]) -> None:
        self._watch = watch
        self._skipped_steps = skipped_steps
        self._report = report
        self._is_reported = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An optimizer step is done, and its gradients are gone."""
        if self._skipped_steps > 0:
            self._skipped_steps -= 1
            return
        allocated_bytes = allocated_now_bytes()
        if allocated_bytes is None:
            return
        self._watch.take(Reading(state.global_step, allocated_bytes))
        leak = self._watch.leak
        if leak is not None and not self._is_reported:
            self._is_reported = True
            self._report(f"finding: {leak.words(state.max_steps)}")
