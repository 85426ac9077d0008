"""DDP's buckets, without its C++ reducer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

DEFAULT_BUCKET_MB = 25
"""DDP's own `bucket_cap_mb`."""
BROADCAST_BYTES = 250 << 20
BROADCASTS_AT_A_TIME = 2
"""`broadcast_bucket_size` (nn/parallel/distributed.py) and `max_in_flight` (comm.cpp), torch 2.13."""


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

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = True
        self.device = next(module.parameters()).device
        self._views: dict[int, torch.Tensor] = {}
        _broadcast([*module.parameters(), *module.buffers()])
        cap_bytes = (options.get("bucket_cap_mb") or DEFAULT_BUCKET_MB) << 20
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        bucket: list[torch.Tensor] = []
        for parameter in reversed(trained):
            if bucket and (
                bucket[0].dtype is not parameter.dtype or _nbytes([*bucket, parameter]) > cap_bytes
            ):
                self._add_bucket(bucket)
                bucket = []
            bucket.append(parameter)
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


def _broadcast(tensors: list[torch.Tensor]) -> None:
    """Sends tensors side by side in buckets, which are full once they reach a limit; two are on their way at a time."""
    full: list[list[torch.Tensor]] = []
    filling: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = filling.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if _nbytes(bucket) >= BROADCAST_BYTES:
            full.append(filling.pop(tensor.dtype))
    sent: deque[torch.Tensor] = deque()
    for bucket in (*full, *filling.values()):
        if len(sent) == BROADCASTS_AT_A_TIME:
            sent.popleft()
        sent.append(torch.empty(sum(tensor.numel() for tensor in bucket), dtype=bucket[0].dtype))


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
