"""The places where a CUDA device allocates otherwise than the fake CPU device, each with its source.

Fake tensors live on a fake CPU, because a CPU build of torch cannot execute fake CUDA tensors in autograd. Inside
`branches()` the library branches that depend on the device take their CUDA side, with the allocations read off
the CUDA sources. Not verified against a GPU by this project yet; docs/accuracy.md says what was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.optim.adam as torch_adam
import torch.optim.sgd as torch_sgd
import transformers.integrations.moe as transformers_moe
import transformers.modeling_flash_attention_utils as transformers_flash
import transformers.modeling_utils as transformers_modeling
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from torch.nn import functional

from launcher.hardware import HardwareSpec
from launcher.planner.recorder import WorkRecorder, idle_recorder
from launcher.planner.tape import OFF_DEVICE
from launcher.planner.work import WorkKind

aten = torch.ops.aten
FLASH_HEAD_SIZE_MAX = 256
"""Largest head size of FlashAttention-2."""
FLASH_TILE, EFFICIENT_TILE = 128, 32
"""Tokens up to whose multiples the two kernels round lengths of what they keep for themselves."""


def rounded_up(size: int, tile: int) -> int:
    """The next multiple of a tile."""
    return -(-size // tile) * tile


def _attention_outputs(query: torch.Tensor, value: torch.Tensor, tile: int = 1) -> tuple[torch.Tensor, ...]:
    """Output, fp32 log-sum-exp (batch, heads, length), and the two numbers of dropout's random state."""
    batch, heads, length, _ = query.shape
    output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    log_sum_exp = query.new_empty((batch, heads, rounded_up(length, tile)), dtype=torch.float32)
    seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
    return output, log_sum_exp, seed, offset


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **named: Any
) -> tuple[Any, ...]:
    """FlashAttention-2's forward pass as torch's SDPA calls it: out, and an fp32 log-sum-exp (batch, heads, length).

    `_flash_attention_forward` and `mha_fwd` (aten/native/transformers/cuda/flash_attn/flash_api.cpp, torch 2.9 to
    2.13). The length is rounded in the backward pass alone.
    """
    output, log_sum_exp, seed, offset = _attention_outputs(query, value)
    debug = query.new_empty(0)
    return output, log_sum_exp, None, None, query.shape[2], key.shape[2], seed, offset, debug


def flash_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
    tile: int = 1,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashAttention-2's backward pass; returns the gradients of query, key and value.

    It holds an fp32 accumulator of dq (batch, heads, length, head size) and the fp32 row sums, both with lengths rounded
    up to `tile` and head sizes to 32, or 64 above 128; and, with fewer key heads than query heads, dk and dv for every
    query head before they are summed (`mha_bwd`, same file; flash-attn 2.7, csrc/flash_attn/flash_api.cpp).
    """
    batch, heads, length, size = query.shape
    rounded = rounded_up(length, tile)
    wide = rounded_up(size, 32 if size <= 128 else 64)
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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, tile: int = 1, **named: Any
) -> tuple[torch.Tensor, ...]:
    """Memory-efficient attention's forward pass: out, and an fp32 log-sum-exp, its length rounded up to `tile`.

    aten/native/transformers/cuda/attention.cu (`kAlignLSE`), torch 2.9 to 2.13.
    """
    return _attention_outputs(query, value, tile)


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


def twins(*, rounds: bool) -> Mapping[Any, Callable[..., Any]]:
    """What CUDA's attention kernels allocate, by operation; autograd and checkpointing see torch's own operations.

    Args:
        rounds: Whether lengths are rounded up to the kernels' tiles. A rounded length is no multiple of a symbol, so
            only traces without symbols round, and those with symbols lie below them by less than one tile.
    """
    flash_tile, efficient_tile = (FLASH_TILE, EFFICIENT_TILE) if rounds else (1, 1)
    return {
        aten._scaled_dot_product_flash_attention.default: flash_attention,
        aten._scaled_dot_product_flash_attention_backward.default: partial(
            flash_attention_backward, tile=flash_tile
        ),
        aten._scaled_dot_product_efficient_attention.default: partial(
            efficient_attention, tile=efficient_tile
        ),
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_attention_backward,
    }


def _attention(supports_flash: bool) -> Callable[..., torch.Tensor]:
    """`scaled_dot_product_attention` with CUDA's choice of kernel (aten/native/transformers/cuda/sdp_utils.cpp).

    Memory-efficient attention is taken where a mask is given, or where the device has no flash kernel. A boolean
    mask becomes an additive bias of the query's dtype, which is kept for backward.
    """

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
        fits = query.shape[-1] <= FLASH_HEAD_SIZE_MAX and query.shape[-1] == value.shape[-1]
        output: torch.Tensor
        if supports_flash and half and attn_mask is None and fits:
            output = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
            return output
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = None
        if attn_mask is not None:
            bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
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


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA dropout keeps a one-byte mask (`native_dropout`); the CPU one keeps a mask of the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class InPlaceKernel:
    """A Triton kernel that goes over a tile of logits and allocates nothing: `kernel[grid](tile, ...)`.

    Args:
        passes: How often it goes over the tile: once to read it, twice to write it too.
        recorder: Counts its work.
    """

    def __init__(self, passes: int, recorder: WorkRecorder) -> None:
        self._passes = passes
        self._recorder = recorder

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self._recorder.note_kernel(f"loss kernel, {self._passes}", WorkKind.HEAVY, tile, self._passes)

        return run


def _accumulate_in_place(recorder: WorkRecorder) -> Callable[..., None]:
    """`_addmm_fp32` on CUDA multiplies 16-bit inputs straight into the fp32 accumulator."""

    def addmm_fp32(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        recorder.note_product("addmm_fp32", a, b, acc)

    return addmm_fp32


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


def _autocasts(known: Callable[[str], bool]) -> Callable[..., bool]:
    """`torch.is_autocast_enabled`: CPU autocast stands in for that of CUDA, which is meant where no device is named.

    PEFT's quantised layers name none, and cast their input where nothing autocasts (tuners/lora/bnb.py, 0.21).
    """
    return lambda device_type="cuda": known("cpu")


def _saved_on_host(recorder: WorkRecorder) -> type[torch.autograd.graph.saved_tensors_hooks]:
    """`torch.autograd.graph.save_on_cpu` as the device sees it: what is saved leaves it, and comes back anew."""

    class SavedOnHost(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
            def leave(tensor: torch.Tensor) -> torch.Tensor:
                recorder.note_kernel("to the host", WorkKind.TRANSFER, tensor, 1)
                return torch.empty(tensor.size(), dtype=tensor.dtype, device=OFF_DEVICE)

            def come_back(kept: torch.Tensor) -> torch.Tensor:
                recorder.note_kernel("from the host", WorkKind.TRANSFER, kept, 1)
                return torch.empty(kept.size(), dtype=kept.dtype, device="cpu")

            super().__init__(leave, come_back)

    return SavedOnHost


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
def branches(hardware: HardwareSpec, recorder: WorkRecorder | None = None) -> Iterator[None]:
    """Makes library branches that depend on the device take their CUDA side while it is open.

    Args:
        hardware: The device.
        recorder: Counts the work of kernels that are no operations of torch; None: nobody counts.
    """
    recorder = recorder or idle_recorder()
    replacements: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", _attention(hardware.supports_flash_attention)),
        (functional, "dropout", _dropout),
        (trl_chunked, "_use_triton", lambda device: True),
        (trl_utils, "_use_triton", lambda device: True),
        (trl_chunked, "_forward_kernel", InPlaceKernel(1, recorder)),
        (trl_chunked, "_backward_kernel", InPlaceKernel(2, recorder)),
        (trl_chunked, "_addmm_fp32", _accumulate_in_place(recorder)),
        (trl_chunked, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b))),
        (torch_adam, "_default_to_fused_or_foreach", _prefer_foreach),
        (torch_sgd, "_default_to_fused_or_foreach", _prefer_foreach),
        (transformers_modeling, "save_on_cpu", _saved_on_host(recorder)),
        (torch, "is_autocast_enabled", _autocasts(torch.is_autocast_enabled)),
        (transformers_moe, "_can_use_grouped_mm", _grouped_mm_from(hardware.supports_flash_attention)),
    ]
    with ExitStack() as stack:
        for module, name, replacement in replacements:
            stack.enter_context(replaced(module, name, replacement))
        yield
