"""Want of memory, however it is worded."""

from __future__ import annotations

import errno
import os

import torch

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""torch's CPU allocator, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp, torch 2.13)."""
SYSTEM = os.strerror(errno.ENOMEM)
"""The system, as torch quotes it where a file can't be mapped (ATen/MapAllocator.cpp), and Rust in safetensors."""


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory was what failed."""
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(failure, OSError) and failure.errno == errno.ENOMEM:
        return True
    return ALLOCATOR in str(failure) or SYSTEM in str(failure)
