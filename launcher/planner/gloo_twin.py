"""What collectives allocate: gloo, on a CPU, where the stand-in for a process group allocates nothing; and waiting, which
allocates nothing where the stand-in does.

Gathering goes through one flat tensor of all ranks' parts, scattering through a copy of what is scattered (torch 2.13,
ProcessGroupGloo.cpp: `allgather`, `gather`, `scatter`, `allreduce_coalesced`, `reduce_scatter_tensor_coalesced`; seen
in the profiler's memory events of two processes on 2026-11-26). Reducing and broadcasting work in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, Final

import torch

COPIED: Final = (
    ("_allgather_base", "all_gather_single", "allgather", "gather", "allreduce_coalesced"),
    ("_reduce_scatter_base", "reduce_scatter_single", "scatter"),
)
"""Methods of `ProcessGroup` of whose first argument (what they fill), or second, gloo has a copy; whoever scatters
nothing of its own has none."""


FUNCTIONAL: Final = torch.ops._c10d_functional
"""Collectives as DTensor asks for them."""


def twins(*, on_cpu: bool) -> Mapping[Any, Callable[..., Any]]:
    """Waiting for a collective gives back its tensor; of fake tensors it would make another.

    Args:
        on_cpu: Whether ranks exchange through gloo.
    """
    waiting = {FUNCTIONAL.wait_tensor.default: lambda tensor: tensor}
    if not on_cpu:
        return waiting
    gather, scatter = FUNCTIONAL.all_gather_into_tensor.default, FUNCTIONAL.reduce_scatter_tensor.default
    return {**waiting, gather: _gather, scatter: _scatter}


def _gather(tensor: torch.Tensor, group_size: int, group_name: str) -> torch.Tensor:
    output = tensor.new_empty((tensor.shape[0] * group_size, *tensor.shape[1:]))
    torch.empty_like(output)  # gloo's flat tensor
    return output


def _scatter(tensor: torch.Tensor, reduction: str, group_size: int, group_name: str) -> torch.Tensor:
    torch.empty_like(tensor)  # gloo's copy
    return tensor.new_empty((tensor.shape[0] // group_size, *tensor.shape[1:]))


def allocate_as_gloo() -> None:
    """Lets the process group's methods allocate what gloo would; for the rest of this process."""
    group: Any = torch.distributed.ProcessGroup
    for argument, names in enumerate(COPIED):
        for name in names:
            if hasattr(group, name):
                setattr(group, name, _allocating(getattr(group, name), argument))


def _allocating(call: Callable[..., Any], argument: int) -> Callable[..., Any]:
    @wraps(call)
    def collective(group: Any, *arguments: Any) -> Any:
        held = [torch.empty_like(tensor) for tensor in _tensors(arguments[argument])]
        work = call(group, *arguments)
        del held
        return work

    return collective


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)
