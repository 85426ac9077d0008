"""Operations whose output shape depends on data: fake tensors have none, so the worst case stands in.

Selecting by a boolean mask selects everything; listing non-zero elements lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

aten = torch.ops.aten


def nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Indices of all elements; shape (numel, ndim), int64."""
    return torch.empty((mask.numel(), mask.ndim), dtype=torch.int64, device=mask.device)


def index(source: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """`source[indices]` where a boolean mask selects everything; the indices it becomes live as long as the call."""
    integers, kept = _expand_masks(indices)
    if not kept:
        return NotImplemented  # type: ignore[no-any-return]  # the tape runs the operation itself
    output: torch.Tensor = aten.index.Tensor(source, integers)
    del kept
    return output


def index_put(
    source: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    accumulate: bool = False,
) -> torch.Tensor:
    """`source` with `values` put at `indices`."""
    return torch.empty_like(source)


def index_put_in_place(
    source: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, *rest: bool
) -> torch.Tensor:
    """`source[indices] = values`, in place: nothing is allocated that outlives the call."""
    return source


def masked_select(source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All elements of `source`, flat."""
    return source.new_empty(torch.broadcast_shapes(source.shape, mask.shape).numel())


def _expand_masks(
    indices: Sequence[torch.Tensor | None],
) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    integers: list[torch.Tensor | None] = []
    kept = []
    for item in indices:
        if item is not None and item.dtype in (torch.bool, torch.uint8):
            positions = nonzero(item)
            kept.append(positions)
            integers.extend(positions.unbind(1))
        else:
            integers.append(item)
    return integers, kept


def twins() -> Mapping[Any, Callable[..., Any]]:
    """The stand-ins, by operation."""
    return {
        aten.nonzero.default: nonzero,
        aten.index.Tensor: index,
        aten.masked_select.default: masked_select,
        aten.index_put.default: index_put,
        aten.index_put_.default: index_put_in_place,
        aten._index_put_impl_.default: index_put_in_place,
    }

