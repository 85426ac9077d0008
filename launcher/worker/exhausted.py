"""Want of memory, however it is worded."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from typing import Final

import torch

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""torch's CPU allocator, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp, torch 2.13)."""
SYSTEM = os.strerror(errno.ENOMEM)
"""The system, as torch quotes it where a file can't be mapped (ATen/MapAllocator.cpp), and Rust in safetensors."""

RESERVE_BYTES: Final = 4 << 20
"""What a worker keeps to say with that memory ran out, and what it had: without it Python may have no room for either.
A convention. Nothing is written there, so that only a limit on address space counts it."""


def worded(failure: BaseException) -> str:
    """A failure in a line or more; of one that says nothing, as Python's own MemoryError, where it was."""
    words = f"{type(failure).__name__}: {failure}"
    frames = traceback.extract_tb(failure.__traceback__)
    if str(failure) or not frames:
        return words
    return f"{words}in {frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory was what failed."""
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(failure, OSError) and failure.errno == errno.ENOMEM:
        return True
    return ALLOCATOR in str(failure) or SYSTEM in str(failure)
