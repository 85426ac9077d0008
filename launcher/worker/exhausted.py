"""Want of memory, however it is worded."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""torch's CPU allocator, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp, torch 2.13)."""
DEVICE: Final = re.compile(
    r"\b(?:cuda|hip)\b[^\n]{0,60}\bout of memory\b(?! bounds)"
    r"|Failed to CUDA (?:m|c)alloc"
    r"|\b(?:CU|HIP)[A-Z]+_\w*ALLOC(?:ATION)?_FAILED\b",
    re.IGNORECASE,
)
"""What does not go through torch's allocator of a device, in RuntimeErrors of several kinds: CUDA's runtime and driver
(`CUDA error: out of memory`, `CUDA driver error: out of memory`), Triton (`Triton Error [CUDA]: out of memory`), NCCL
(`Cuda failure 2 'out of memory'`, `Failed to CUDA calloc async 608 bytes`) and the status codes of the libraries
(`CUBLAS_STATUS_ALLOC_FAILED`, `CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED`)."""
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
    """Whether memory was what failed, here or in what led to this failure."""
    return any(map(_says_so, _led_by(failure)))


def _led_by(failure: BaseException) -> Iterator[BaseException]:
    """A failure, and those in whose place or during whose handling it was raised."""
    link: BaseException | None = failure
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _says_so(failure: BaseException) -> bool:
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(failure, OSError) and failure.errno == errno.ENOMEM:
        return True
    text = str(failure)
    return ALLOCATOR in text or SYSTEM in text or DEVICE.search(text) is not None
