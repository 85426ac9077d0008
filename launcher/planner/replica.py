"""DDP's buckets, without its C++ reducer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from launcher.planner.stream import LAYER

MIB = 1 << 20
DEFAULT_BUCKET_MB = 25
"""DDP's own `bucket_cap_mb`."""
BROADCAST_BYTES = 250 << 20
BROADCASTS_AT_A_TIME = 2
"""`broadcast_bucket_size` (nn/parallel/distributed.py) and `max_in_flight` (comm.cpp), torch 2.13."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model that was cut to a few of them."""

    traced: int
    """How many it has here."""
    depth: int
    """How many it has in truth."""
    prefix: int
    """First layers, which are of another kind."""
    period: int
    """After how many the others repeat."""


class Replica(nn.Module):
    """DDP as far as memory goes: its C++ reducer can't read fake tensors.

    What it does (torch 2.13, csrc/distributed/c10d/comm.cpp and reducer.cpp): rank 0 sends its weights to all. Buckets
    as large as all gradients are there from then on. A gradient that is ready is copied into its bucket, and becomes a
    view of it. While accumulating nothing is synchronised, and gradients are tensors of their own; `zero_grad` drops the
    views, the buckets stay.

    Args:
        module: The model.
        options: DDP's own.
    """

    layers: Layers | None = None
    """How many layers the model has in truth; None: as many as it has here."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = True
        self.device = next(module.parameters()).device
        self._views: dict[int, torch.Tensor] = {}
        _broadcast([*module.named_parameters(), *module.named_buffers()], self.layers)
        cap_bytes = int((options.get("bucket_cap_mb") or DEFAULT_BUCKET_MB) * MIB)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for bucket in in_buckets(reversed(trained), cap_bytes):
            self._add_bucket(bucket)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._grad_is_ready)

    def _add_bucket(self, parameters: list[torch.Tensor]) -> None:
        flat = torch.empty(sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)
        begin = 0
        for parameter in parameters:
            self._views[id(parameter)] = flat[begin : begin + parameter.numel()].view(parameter.shape)
            begin += parameter.numel()

    def _grad_is_ready(self, parameter: torch.Tensor) -> None:
        if self.require_backward_grad_sync:
            parameter.grad = self._views[id(parameter)]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are accumulated, and not exchanged."""
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.module(*args, **kwargs)


def _broadcast(tensors: Sequence[tuple[str, torch.Tensor]], layers: Layers | None) -> None:
    """Sends tensors side by side in buckets, which are full once they reach a limit; two are on their way at a time.

    How tensors fall into buckets hangs on all that come before them, so it does not repeat from layer to layer. Of all
    pairs only the largest is made here, that of the true depth.
    """
    whole = tensors if layers is None else at_full_depth(tensors, layers)
    sizes = [_nbytes(bucket) for bucket in in_buckets((tensor for _, tensor in whole), BROADCAST_BYTES)]
    pairs = [
        sizes[i : i + BROADCASTS_AT_A_TIME] for i in range(max(1, len(sizes) - BROADCASTS_AT_A_TIME + 1))
    ]
    sent = [torch.empty(size, dtype=torch.uint8) for size in max(pairs, key=sum)]
    del sent


def in_buckets(tensors: Iterable[torch.Tensor], limit_bytes: int) -> list[list[torch.Tensor]]:
    """Tensors in buckets of one dtype, each full with the tensor with which it reaches the limit.

    `compute_bucket_assignment_by_size`, torch 2.13, reducer.cpp.
    """
    full: list[list[torch.Tensor]] = []
    filling: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = filling.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if _nbytes(bucket) >= limit_bytes:
            full.append(filling.pop(tensor.dtype))
    return [*full, *filling.values()]


def at_full_depth(
    tensors: Sequence[tuple[str, torch.Tensor]], layers: Layers
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model that was cut to few layers, by name, as those of all its layers: one period after the other."""
    for path, group in groupby(tensors, key=lambda item: _list_of(item[0])):
        by_number: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in group:
            by_number.setdefault(_number(name), []).append((name, tensor))
        is_cut = bool(path) and len(by_number) == layers.traced
        for number in range(layers.depth) if is_cut else by_number:
            repeated = layers.prefix + (number - layers.prefix) % layers.period
            yield from by_number[repeated if is_cut and number >= layers.prefix else number]


def _list_of(name: str) -> str:
    """Path of the list of layers that a tensor belongs to; empty when it belongs to none."""
    found = LAYER.search(name)
    return "" if found is None else name[: found.start()]


def _number(name: str) -> int:
    found = LAYER.search(name)
    return 0 if found is None else int(found.group())


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
