"""Operations that fake tensors can't run by themselves.

Where the output's shape depends on data, of which fake tensors have none, the worst case stands in:
selecting by a boolean mask selects everything; listing non-zero elements lists all of them. Where torch's
fake kernel refuses what the real kernel takes, the real kernel's output stands in.
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


def grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Matrix product of each group of rows (2-d operands) or each matrix (3-d operands) with its own matrix.

    torch's fake kernel takes bf16 only, the real ones fp16 and fp32 too; and it leaves out that the output's
    rows are padded to 16 bytes (aten/native/GroupedMMUtils.h, `create_grouped_gemm_output_tensor`, torch 2.9
    to 2.13).
    """
    dtype = out_dtype or left.dtype
    size = [left.size(-2), right.size(-1)]
    if left.dim() == right.dim():
        size.insert(0, left.size(0) if left.dim() == 3 else _num_groups(offs))
    alignment = 16 // dtype.itemsize
    row = -(-size[-1] // alignment) * alignment
    strides = [row, 1] if len(size) == 2 else [size[1] * row, row, 1]
    return left.new_empty_strided(size, strides, dtype=dtype)


def _num_groups(offs: torch.Tensor | None) -> int:
    if offs is None:
        raise NotImplementedError("aten._grouped_mm of two 2-d operands without offsets")
    return offs.size(0)


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


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal: they differ, and what follows from that is done."""
    return False


def svd(matrix: torch.Tensor, full_matrices: bool = False, *options: object, **named: object) -> Any:
    """A reduced singular value decomposition: left vectors, values, right vectors; made in a copy of the matrix.

    `cloneBatchedColumnMajor` in aten/native/BatchLinearAlgebraKernel.cpp (CPU) and in
    aten/native/cuda/linalg/BatchLinearAlgebraLib.cpp, `svd_cusolver`. What cuSOLVER asks for besides is left out.
    """
    if full_matrices:
        return NotImplemented
    rows, columns = matrix.shape
    rank = min(rows, columns)
    output = matrix.new_empty(rows, rank), matrix.new_empty(rank), matrix.new_empty(rank, columns)
    copy = torch.empty_like(matrix)
    del copy
    return output


def twins() -> Mapping[Any, Callable[..., Any]]:
    """The stand-ins, by operation."""
    return {
        aten.nonzero.default: nonzero,
        aten.index.Tensor: index,
        aten.masked_select.default: masked_select,
        aten.equal.default: equal,
        aten._linalg_svd.default: svd,
        aten.index_put.default: index_put,
        aten.index_put_.default: index_put_in_place,
        aten._index_put_impl_.default: index_put_in_place,
        aten._grouped_mm.default: grouped_mm,
    }
