"""The places where a CUDA device allocates otherwise than the fake CPU device, each with its source.

Fake tensors live on a fake CPU, because a CPU build of torch cannot execute fake CUDA tensors in autograd. Inside
`cuda_twin()` the library branches that depend on the device take their CUDA side, with the allocations read off
the CUDA sources. Not verified against a GPU by this project yet; docs/accuracy.md says what was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.optim.adam as torch_adam
import torch.optim.sgd as torch_sgd
import transformers.integrations.moe as transformers_moe
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from torch.nn import functional

from launcher.hardware import HardwareSpec

LSE_ALIGNMENT = 32
"""Memory-efficient attention pads its log-sum-exp to 32 queries (aten/native/transformers/cuda/mem_eff_attention)."""


class FlashAttention(torch.autograd.Function):
    """FlashAttention-2 as torch's SDPA calls it, with its allocations.

    Forward keeps q, k, v, out and an fp32 log-sum-exp (batch, heads, length). Backward holds an fp32 accumulator
    of dq (batch, heads, length, head size), the fp32 row sums, and, with fewer key heads than query heads, dk and
    dv for every query head before they are summed (aten/native/transformers/cuda/flash_attn/flash_api.cpp,
    `mha_fwd` and `mha_bwd`, torch 2.9 to 2.13). Rounding of the length to 128 is left out.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Shapes (batch, heads, length, head size); the output has the layout of (batch, length, heads, ...)."""
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value."""
        query, key, value, _, _ = ctx.saved_tensors
        batch, heads, length, size = query.shape
        grad_query, grad_key, grad_value = (
            torch.empty_like(query),
            torch.empty_like(key),
            torch.empty_like(value),
        )
        accumulator = query.new_empty((batch, heads, length, size), dtype=torch.float32)
        row_sums = query.new_empty((batch, heads, length), dtype=torch.float32)
        if key.shape[1] != heads:
            wide_key = key.new_empty((batch, key.shape[2], heads, size))
            wide_value = value.new_empty((batch, key.shape[2], heads, value.shape[-1]))
            del wide_key, wide_value
        del accumulator, row_sums
        return grad_query, grad_key, grad_value


class EfficientAttention(torch.autograd.Function):
    """Memory-efficient attention as torch's SDPA calls it, with its allocations.

    Taken where a mask is given, or where the device has no flash kernel. A boolean mask becomes an additive bias
    of the query's dtype, which is kept for backward; the log-sum-exp is padded to a multiple of 32 queries.
    Backward accumulates dq in fp32 for 16-bit inputs
    (aten/native/transformers/cuda/attention.cu and mem_eff_attention/kernel_backward.h, torch 2.9 to 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shapes (batch, heads, length, head size)."""
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        log_sum_exp = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Gradients of query, key and value; masks have none."""
        query, key, value, _, _, _ = ctx.saved_tensors
        batch, heads, length, size = query.shape
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        row_sums = query.new_empty((batch, heads, length), dtype=torch.float32)
        if query.dtype is not torch.float32:
            accumulator = query.new_empty((batch, heads, length, size), dtype=torch.float32)
            del accumulator
        del row_sums
        return *gradients, None


def _attention(supports_flash: bool) -> Callable[..., torch.Tensor]:
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
        half = query.dtype in (torch.float16, torch.bfloat16)
        if supports_flash and half and attn_mask is None and query.shape[-1] <= 256:
            return FlashAttention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = attn_mask.to(query.dtype) if attn_mask is not None else None
        return EfficientAttention.apply(query, key, value, bias)  # type: ignore[no-any-return, no-untyped-call]

    return scaled_dot_product_attention


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA dropout keeps a one-byte mask (`native_dropout`); the CPU one keeps a mask of the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _InPlaceKernel:
    """A Triton kernel that writes into its arguments and allocates nothing: `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _accumulate_in_place(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`_addmm_fp32` on CUDA multiplies 16-bit inputs straight into the fp32 accumulator."""


def _prefer_foreach(
    params: list[torch.Tensor], differentiable: bool, use_fused: bool = False
) -> tuple[bool, bool]:
    """torch.optim prefers its foreach implementation when all parameters are on CUDA (optim/optimizer.py)."""
    return False, True


def _grouped_mm_from(supports_flash: bool) -> Callable[..., bool]:
    """torch's grouped matrix product and FlashAttention-2 ask for the same devices: compute capability 8.0 or more
    (transformers/integrations/moe.py). Elsewhere transformers' own loop over experts runs, whose backward pass
    makes a gradient for every expert weight, frozen ones included.
    """
    return lambda *args: supports_flash


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replaces an attribute of a library module while it is open."""
    missing = object()
    original = getattr(owner, name, missing)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if original is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextmanager
def cuda_twin(hardware: HardwareSpec) -> Iterator[None]:
    """Makes library branches that depend on the device take their CUDA side while it is open."""
    kernel = _InPlaceKernel()
    replacements: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", _attention(hardware.supports_flash_attention)),
        (functional, "dropout", _dropout),
        (trl_chunked, "_use_triton", lambda device: True),
        (trl_utils, "_use_triton", lambda device: True),
        (trl_chunked, "_forward_kernel", kernel),
        (trl_chunked, "_backward_kernel", kernel),
        (trl_chunked, "_addmm_fp32", _accumulate_in_place),
        (trl_chunked, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b))),
        (torch_adam, "_default_to_fused_or_foreach", _prefer_foreach),
        (torch_sgd, "_default_to_fused_or_foreach", _prefer_foreach),
        (transformers_moe, "_can_use_grouped_mm", _grouped_mm_from(hardware.supports_flash_attention)),
    ]
    with ExitStack() as stack:
        for module, name, replacement in replacements:
            stack.enter_context(replaced(module, name, replacement))
        yield
