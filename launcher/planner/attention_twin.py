"""CUDA's attention kernels: which one runs, and what it allocates, each with its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as transformers_flash
import transformers.modeling_utils as transformers_modeling
from torch.nn import functional

from launcher.hardware import HardwareSpec
from launcher.planner.polynomial import TILES, TracedShape
from launcher.planner.replaced import replaced

aten = torch.ops.aten
FLASH_HEAD_SIZE_MAX = 256
"""Largest head size of FlashAttention-2."""
BIAS_TILE, EFFICIENT_TILE, FLASH_TILE = TILES
"""Tokens up to whose multiples lengths are rounded: of a mask, and of what the two kernels keep for themselves."""


def _kept_outputs(query: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """The fp32 log-sum-exp (batch, heads, length), and the two numbers of dropout's random state."""
    batch, heads = query.shape[:2]
    log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
    seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
    return log_sum_exp, seed, offset


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **named: Any
) -> tuple[Any, ...]:
    """FlashAttention-2's forward pass as torch's SDPA calls it: out, and an fp32 log-sum-exp (batch, heads, length).

    The output lies in memory as the query does, whatever its order of dimensions; so it does from cuDNN.

    `_flash_attention_forward` and `mha_fwd` (aten/native/transformers/cuda/flash_attn/flash_api.cpp, torch 2.9 to
    2.13). The length is rounded in the backward pass alone.
    """
    output = torch.empty_like(query)
    log_sum_exp, seed, offset = _kept_outputs(query, query.shape[2])
    debug = query.new_empty(0)
    return output, log_sum_exp, None, None, query.shape[2], key.shape[2], seed, offset, debug


def flash_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    round_length: Callable[[int, int], int],
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashAttention-2's backward pass; returns the gradients of query, key and value.

    It holds an fp32 accumulator of dq (batch, heads, length, head size) and the fp32 row sums, both with lengths rounded
    up to a tile and head sizes to 32, or 64 above 128; and, with fewer key heads than query heads, dk and dv for every
    query head before they are summed (`mha_bwd`, same file; flash-attn 2.7, csrc/flash_attn/flash_api.cpp).
    """
    batch, heads, length, size = query.shape
    rounded = round_length(length, FLASH_TILE)
    step = 32 if size <= 128 else 64
    wide = -(-size // step) * step
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    accumulator = query.new_empty((batch, heads, rounded, wide), dtype=torch.float32)
    row_sums = query.new_empty((batch, heads, rounded), dtype=torch.float32)
    if key.shape[1] != heads:
        wide_key = key.new_empty((batch, key.shape[2], heads, size))
        wide_value = value.new_empty((batch, key.shape[2], heads, value.shape[-1]))
        del wide_key, wide_value
    del accumulator, row_sums
    return gradients


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    round_length: Callable[[int, int], int],
    **named: Any,
) -> tuple[torch.Tensor, ...]:
    """Memory-efficient attention's forward pass: out, and an fp32 log-sum-exp, its length rounded up to a tile.

    aten/native/transformers/cuda/attention.cu (`kAlignLSE`), torch 2.9 to 2.13.
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    return output, *_kept_outputs(query, round_length(length, EFFICIENT_TILE))


def efficient_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    **named: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Memory-efficient attention's backward pass; masks have no gradient.

    It accumulates dq in fp32 for 16-bit inputs (mem_eff_attention/kernel_backward.h, torch 2.9 to 2.13).
    """
    batch, heads, length, size = query.shape
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    row_sums = query.new_empty((batch, heads, length), dtype=torch.float32)
    if query.dtype is not torch.float32:
        accumulator = query.new_empty((batch, heads, length, size), dtype=torch.float32)
        del accumulator
    del row_sums
    return *gradients, None


def cudnn_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **named: Any
) -> tuple[Any, ...]:
    """cuDNN's forward pass: out, which lies in memory as the query does, and an fp32 log-sum-exp.

    `run_cudnn_SDP_fprop` (aten/native/cudnn/MHA.cpp, torch 2.11). It needs no workspace worth speaking of.
    """
    batch, heads, length, _ = query.shape
    output = torch.empty_like(query)
    log_sum_exp = query.new_empty((batch, heads, length, 1), dtype=torch.float32)
    seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
    nothing = query.new_empty(0)
    return output, log_sum_exp, nothing, nothing, length, key.shape[2], seed, offset, nothing


def cudnn_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cuDNN's backward pass, in one workspace; returns the gradients of query, key and value.

    The workspace was seen on an H200, cuDNN 9.19, torch 2.11, 2026-11-26: an fp32 accumulator of dq, the fp32 row
    sums, and with fewer key heads than query heads dk and dv for every query head.
    """
    batch, heads, length, size = query.shape
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    wide = (size + value.shape[-1]) * query.element_size() if key.shape[1] != heads else 0
    workspace = query.new_empty((batch, heads, length, 4 * size + 4 + wide), dtype=torch.uint8)
    del workspace
    return gradients


def all_scores_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """What torch does where no kernel can: all scores, shape (batch, heads, length, keys), and their softmax.

    `_scaled_dot_product_attention_math` (aten/native/transformers/attention.cpp, torch 2.11), step by step: for fake
    tensors it does not add the mask in place, and the holes that are left would be others.
    """
    factor = math.sqrt(scale if scale is not None else 1.0 / math.sqrt(query.shape[-1]))
    attn_mask = _as_bias(attn_mask, query)
    scaled = query * factor
    if is_causal:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        attn_mask = _as_bias(causal, query)
        del causal
    times = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    attention = torch.matmul(scaled, keys.transpose(-2, -1) * factor)
    if attn_mask is not None:
        attention = attention.add_(attn_mask)
    attention = aten._safe_softmax(attention, -1)
    if dropout_p > 0.0:
        attention = functional.dropout(attention, dropout_p)
    return torch.matmul(attention, values)


def _as_bias(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    number = query.new_empty(())
    return torch.where(mask, number, number)


def twins(shape: TracedShape, *, rounds: bool) -> Mapping[Any, Callable[..., Any]]:
    """What CUDA's attention kernels allocate, by operation; autograd and checkpointing see torch's own operations.

    Args:
        shape: The traced shape, which knows the stand-in of a rounded length.
        rounds: Whether the device's kernels round lengths up to tiles; ROCm's were not read.
    """
    round_length = shape.round_up if rounds else _as_it_is
    return {
        aten._scaled_dot_product_flash_attention.default: flash_attention,
        aten._scaled_dot_product_flash_attention_backward.default: partial(
            flash_attention_backward, round_length=round_length
        ),
        aten._scaled_dot_product_cudnn_attention.default: cudnn_attention,
        aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_attention_backward,
        aten._scaled_dot_product_efficient_attention.default: partial(
            efficient_attention, round_length=round_length
        ),
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_attention_backward,
    }


def _as_it_is(length: int, tile: int) -> int:
    return length


def aligned_bias(mask: torch.Tensor, dtype: torch.dtype, shape: TracedShape) -> torch.Tensor:
    """A mask as memory-efficient attention takes it: an additive bias whose rows are a multiple of 8 apart.

    Where they are not, a bias with a column more than it takes to get there replaces the first one
    (`preprocess_mask`, aten/native/transformers/attention.cpp, torch 2.9 to 2.13).

    Args:
        mask: Boolean or additive; shape (batch or 1, heads or 1, queries, keys).
        dtype: The query's.
        shape: The traced shape. At a symbol, the first bias is one of no size where rows are aligned already.
    """
    queries, keys = mask.shape[-2:]
    padded = shape.round_up(keys, BIAS_TILE)
    if padded == keys:
        return mask.to(dtype)
    rows = shape.unless_multiple(queries, BIAS_TILE) if keys == queries else queries
    first = mask[..., :1, :].expand(*mask.shape[:-2], rows, keys).to(dtype)
    return functional.pad(first[..., :queries, :], (0, padded - keys))[..., :keys]


def attention(hardware: HardwareSpec, shape: TracedShape) -> Callable[..., torch.Tensor]:
    """`scaled_dot_product_attention` with CUDA's choice of kernel (aten/native/transformers/cuda/sdp_utils.cpp).

    cuDNN's comes first on some devices. Elsewhere memory-efficient attention is taken where a mask is given, or where
    the device has no flash kernel. A boolean
    mask becomes an additive bias of the query's dtype, which is kept for backward. Autocast computes in 16 bits
    (aten/autocast_mode.h). Where queries share heads of keys,
    and transformers leaves it to torch to repeat them, flash attention alone can (torch 2.9 to 2.13): elsewhere, as in
    fp32, torch computes all scores.
    """
    supports_flash, cudnn_first = hardware.supports_flash_attention, hardware.prefers_cudnn_attention

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        half = query.dtype in (torch.float16, torch.bfloat16)
        fits = query.shape[-1] <= FLASH_HEAD_SIZE_MAX and query.shape[-1] == value.shape[-1]
        output: torch.Tensor
        if cudnn_first and half and fits:
            bias = None if attn_mask is None else attn_mask.to(query.dtype)
            output = aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, True, dropout_p, is_causal
            )[0]
            return output
        if supports_flash and half and attn_mask is None and fits:
            output = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
            return output
        if enable_gqa and key.shape[1] != query.shape[1]:
            return all_scores_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        bias = None
        if attn_mask is not None:
            bias = aligned_bias(attn_mask, query.dtype, shape).expand(*query.shape[:3], key.shape[2])
        output = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal
        )[0]
        return output

    return scaled_dot_product_attention


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn.flash_attn_func` (flash-attn 2.8): the kernels that torch has, shapes (batch, length, heads, size)."""
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    output: torch.Tensor = aten._scaled_dot_product_flash_attention(*heads_first, dropout_p, causal)[0]
    return output.transpose(1, 2)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn.flash_attn_varlen_func` (flash-attn 2.8) over sequences joined in one, shapes (tokens, heads, size)."""
    output = flash_attn_func(q[None], k[None], v[None], dropout_p, softmax_scale, causal)
    return output[0]


@contextmanager
def flash_attention_2() -> Iterator[None]:
    """Makes transformers take FlashAttention-2 for installed; its kernels are stood in for."""
    process = transformers_flash._lazy_define_process_function(flash_attn_varlen_func)
    changes = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": transformers_flash._pad_input,
        "_unpad_fn": transformers_flash._unpad_input,
        "_process_flash_kwargs_fn": process,
    }
    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(replaced(transformers_flash, name, value))
        model = transformers_modeling.PreTrainedModel
        stack.enter_context(replaced(model, "_check_and_adjust_attn_implementation", _accept))
        yield


def _accept(model: Any, attn_implementation: str, *options: Any, **named: Any) -> str:
    return attn_implementation
