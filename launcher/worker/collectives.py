"""Lets go of a collective's tensors where the meter sees it.

gloo works in threads of its own, which hold a collective a moment longer than whoever waits for it. Where that is the
last hold on its tensors, they are released in gloo's thread, and torch's profiler reports the releases of profiled
threads only (torch 2.13, c10/core/CPUAllocator.cpp, `ProfiledCPUMemoryReporter`; ProcessGroupGloo.cpp, `runLoop`): the
account would carry them to its end. So Python's thread waits for that moment before it lets go itself. It is
microseconds away, or as far as a busy machine lets the thread lie.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

import torch

COLLECTIVES: Final = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Methods of torch's `ProcessGroup` that take tensors and give a `Work`."""
LONGEST_SECONDS: Final = 0.02
"""How long a wait may last where somebody else has taken hold of the tensors meanwhile."""


@contextmanager
def settled_collectives() -> Iterator[None]:
    """Inside, what Python's collectives hold is let go of by Python's thread: what C++ calls itself is not touched."""
    group: Any = torch.distributed.ProcessGroup
    # not getattr: what it gives would no longer be bound to its object when it is put back
    originals = {name: vars(group)[name] for name in COLLECTIVES if name in vars(group)}
    for name in originals:
        setattr(group, name, _settling(getattr(group, name)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def _settling(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def collective(*arguments: Any, **named: Any) -> Any:
        held = [(tensor, tensor._use_count()) for tensor in _tensors((*arguments, *named.values()))]
        work = call(*arguments, **named)
        if work is not None:
            # called when Python's hold on the collective ends, which holds the tensors as long anyway
            weakref.finalize(work, _settle, held).atexit = False
        return work

    return collective


def _settle(held: list[tuple[torch.Tensor, int]]) -> None:
    """Waits until no more hold each tensor than before the collective."""
    end = time.monotonic() + LONGEST_SECONDS
    for tensor, count in held:
        while tensor._use_count() > count and time.monotonic() < end:
            time.sleep(0)  # lets the thread run


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
