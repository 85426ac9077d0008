"""What CUDA kernels allocate beside their outputs, where it is as large as an activation; each with its source.

The rest of what kernels take and give back within one operation is not traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

aten = torch.ops.aten
FEW_INDICES = 3072
"""Tokens up to which the gradient of an embedding is summed up in place (`embedding_dense_backward_cuda`)."""
ROWS_PER_PART = 10
"""Equal tokens whose gradients one part sums up (`NROWS_PER_THREAD`)."""


def softmax_backward(
    grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of a softmax, and gradient times output, which the kernel reads.

    aten/native/cuda/SoftMax.cu (`softmax_backward_cuda_out`, torch 2.1 and later); seen on an H200, 2026-11-26.
    """
    gradient = torch.empty_like(grad, dtype=input_dtype)
    products = torch.empty_like(grad)
    del products
    return gradient


def safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The softmax of attention that is computed with all scores, and a byte for each score.

    It looks for rows that are masked throughout (`_safe_softmax`, aten/native/transformers/attention.cpp, torch 2.11;
    seen on an H200, 2026-11-26).
    """
    output = torch.empty_like(scores, dtype=dtype)
    masked = torch.empty_like(scores, dtype=torch.bool)
    del masked
    return output


def embedding_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    *,
    exact: bool,
) -> torch.Tensor:
    """The gradient of an embedding, and for more than a few tokens what sorts them and sums them up in fp32.

    aten/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu; the number of parts was seen on an H200, torch 2.11,
    2026-11-26: a tenth of the tokens, and one for each that can differ.

    Args:
        grad: Gradient of the output, (tokens, width) in any number of dimensions.
        indices: The tokens.
        num_weights: Rows of the embedding.
        padding_idx: Row without a gradient.
        scale_grad_by_freq: Not used by language models.
        exact: Whether the shape is the real one. Where it stands for others, one part per token is taken: a tenth is
            no multiple of a symbol.
    """
    tokens, width = indices.numel(), grad.shape[-1]
    if exact and tokens <= FEW_INDICES:
        return grad.new_empty((num_weights, width))
    scratch = [torch.empty_like(indices) for _ in range(4)]
    gradient = grad.new_empty((num_weights, width))
    parts = tokens // ROWS_PER_PART + min(tokens, num_weights) if exact else tokens
    scratch.append(grad.new_empty((parts, width), dtype=torch.float32))
    del scratch
    return gradient


def twins(*, exact: bool) -> Mapping[Any, Callable[..., Any]]:
    """The kernels by operation.

    Args:
        exact: Whether the traced shape is the real one, and stands for no other.
    """
    return {
        aten._safe_softmax.default: safe_softmax,
        aten._softmax_backward_data.default: softmax_backward,
        aten.embedding_dense_backward.default: partial(embedding_backward, exact=exact),
    }
