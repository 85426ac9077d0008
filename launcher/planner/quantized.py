"""bitsandbytes on fake tensors: quantised weights, and what its kernels allocate.

Loaded only for jobs that quantise or use one of its optimizers: the import takes a second. The layers, the
quantising functions and the autograd functions are bitsandbytes' own; what stands in for its kernels is read off
bitsandbytes 0.50 (backends/default/ops.py, backends/cuda/ops.py, backends/cpu/ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import bitsandbytes
import bitsandbytes.autograd._functions as bnb_autograd
import bitsandbytes.backends.cpu.ops as bnb_cpu
import bitsandbytes.backends.default.ops as bnb_default
import bitsandbytes.nn.modules as bnb_layers
import bitsandbytes.optim.optimizer as bnb_optimizer
import peft.tuners.lora.dora as peft_dora
import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from launcher.planner.replaced import replaced
from launcher.planner.tape import OFF_DEVICE

ops = torch.ops.bitsandbytes


def convert_to_shell(model: Any, quantization: BitsAndBytesConfig) -> Any:
    """Puts bitsandbytes' layers in place of linear ones, as loading does, in a model on the meta device."""
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def prepare() -> None:
    """Makes the tables that bitsandbytes computes once per process, outside of any fake mode."""
    bnb_functional.quantize_blockwise(torch.zeros(256), blocksize=256)


def quantize_weight(module: Any, dtype: torch.dtype) -> nn.Parameter:
    """The quantised weight of a layer of the shell, as loading makes it, from a full one that is born and freed.

    `Params4bit` and `Int8Params` can't wrap a fake tensor, so a plain parameter carries their attributes.
    """
    full = torch.empty((module.out_features, module.in_features), dtype=dtype, device="cpu")
    if issubclass(module.source_cls, Conv1D):
        stored = full.new_empty(module.in_features, module.out_features)
        del full
        full = stored.T.contiguous()  # and `stored` waits until its layer is done
    weight: Any
    if isinstance(module, bnb_layers.Linear4bit):
        shell: Any = module.weight
        packed, state = bnb_functional.quantize_4bit(
            full,
            blocksize=shell.blocksize,
            compress_statistics=shell.compress_statistics,
            quant_type=shell.quant_type,
            quant_storage=shell.quant_storage,
        )
        weight = nn.Parameter(packed, requires_grad=False)
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
            setattr(weight, name, getattr(shell, name))
        weight.quant_state, weight.bnb_quantized, weight.module = state, True, module
        module.quant_state = state
        return weight  # type: ignore[no-any-return]
    rows, scales, _ = bnb_functional.int8_vectorwise_quant(full.to(torch.float16))
    weight = nn.Parameter(rows, requires_grad=False)
    weight.CB, weight.SCB, weight.has_fp16_weights = weight.data, scales, False
    return weight  # type: ignore[no-any-return]


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is to be quantised."""
    return isinstance(module, (bnb_layers.Linear4bit, bnb_layers.Linear8bitLt))


def dequantized(module: Any) -> torch.Tensor:
    """What `peft.utils.integrations.dequantize_module_weight` returns, for the weights of `quantize_weight` too.

    On the meta device, where PEFT sets DoRA up, a quantised weight has its shape and no state yet.
    """
    weight: Any = module.weight
    if not is_quantized(module):
        return weight  # type: ignore[no-any-return]
    if weight.device.type == "meta":
        return torch.empty((module.out_features, module.in_features), device="meta")
    if isinstance(module, bnb_layers.Linear4bit):
        values: torch.Tensor = bnb_functional.dequantize_4bit(weight.data, module.quant_state)
        return values
    rows: torch.Tensor = bnb_functional.int8_vectorwise_dequant(weight.data, module.state.SCB)
    return rows


def int8_vectorwise_quant(
    activations: torch.Tensor, threshold: float = 0.0, *, on_cpu: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows scaled to int8; shapes (rows, columns), (rows,).

    Magnitudes are held while outliers are looked for. A CPU scales in fp32, and rounds that. No column is taken for an
    outlier: how many there are is a matter of the data, and each adds only a column.
    """
    scales = activations.new_empty(activations.numel() // activations.shape[-1], dtype=torch.float32)
    rows = None if on_cpu else torch.empty_like(activations, dtype=torch.int8)
    outliers, held = None, []
    if threshold > 0:
        magnitudes = activations.abs()
        held.append(torch.empty_like(magnitudes, dtype=torch.bool))
        del magnitudes
        outliers = activations.new_empty(0, dtype=torch.int64)
    if rows is None:
        scaled = torch.empty_like(activations, dtype=torch.float32)
        rounded = torch.round(scaled)
        del scaled
        rows = rounded.to(torch.int8)
    return rows, scales, outliers


def int8_scaled_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """int8 product: accumulated in int32, scaled in fp16, cast to `dtype`, all held until the end; (rows, outputs)."""
    size = (*left.shape[:-1], right.shape[0])
    accumulator = left.new_empty(size, dtype=torch.int32)
    scaled = torch.empty_like(accumulator, dtype=torch.float16)
    return scaled.to(dtype or torch.float16)


def gemm_4bit(
    activations: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with a 4-bit weight on a GPU, which is dequantised for it; (rows, outputs).

    The scales as they were dequantised stay until the end, beside those with the offset added (backends/cuda/ops.py,
    `_dequant_linear_fallback`). Products of few rows (up to 64 on Hopper, 128 on A100, 256 on Ada: mostly fewer than a
    training batch has) take a fused kernel there, which dequantises nothing: of those this is too much.
    """
    scales = absmax
    if absmax_8bit is not None:
        scales = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = scales + absmax_offset
    full = ops.dequantize_4bit(weight, absmax, blocksize, quant_type, shape, activations.dtype)
    return nn.functional.linear(activations, full, bias)


def _update_nothing(*args: Any, **kwargs: Any) -> None:
    """A fused kernel that writes into its arguments and allocates nothing."""


def twins(*, on_cpu: bool) -> Mapping[Any, Callable[..., Any]]:
    """The stand-ins, by operation. On a CPU bitsandbytes' own Python kernels run, with their temporaries."""
    common = {
        ops.gemm_4bit.default: bnb_default._gemm_4bit_default_impl if on_cpu else gemm_4bit,
        ops.int8_vectorwise_quant.default: partial(int8_vectorwise_quant, on_cpu=on_cpu),
        ops.int8_scaled_mm.default: int8_scaled_mm,
        ops.int8_mixed_scaled_mm.default: _int8_mixed_scaled_mm,
    }
    if on_cpu:
        return common | {
            ops.optimizer_update_32bit.default: bnb_cpu._optimizer_update_32bit_cpu,
            ops.optimizer_update_8bit_blockwise.default: bnb_cpu._optimizer_update_8bit_blockwise_cpu,
        }
    return common | {
        ops.optimizer_update_32bit.default: _update_nothing,
        ops.optimizer_update_8bit_blockwise.default: _update_nothing,
    }


def _int8_mixed_scaled_mm(
    activations: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    outliers: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """int8 product without outlier columns; see `int8_vectorwise_quant`."""
    kept = activations.new_empty(0)
    return int8_scaled_mm(left, right, row_stats, col_stats, bias, activations.dtype), kept


def _matmul_on_gpu(
    activations: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    state: Any = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> Any:
    """`bitsandbytes.matmul` without its branch for CPUs."""
    if threshold > 0.0:
        state.threshold = threshold
    return bnb_autograd.MatMul8bitLt.apply(activations, weight, out, bias, state)  # type: ignore[no-untyped-call]


PAGED_ELEMENTS_MIN = 100_000
"""Smaller states of paged optimizers stay in device memory (optim/optimizer.py, `get_state_buffer`)."""


def _state_buffer(
    optimizer: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """An optimizer state. Paged ones are managed memory, which torch's allocator doesn't count: off the device."""
    paged = optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS_MIN
    return torch.zeros_like(parameter, dtype=dtype, device=OFF_DEVICE if paged else parameter.device)


def _restore_state(module: Any) -> None:
    """`fix_4bit_weight_quant_state_from_module`: a weight that FSDP2 gathered has lost its quantisation state.

    bitsandbytes wraps it as `Params4bit`, in the same memory. A fake tensor can't be wrapped: it carries the state.
    """
    if getattr(module.weight, "quant_state", None) is None:
        module.weight.quant_state = module.quant_state


def _copied(state: Any) -> Any:
    """`copy.deepcopy` of an optimizer's state: it copies storages at their addresses, which fake tensors don't have."""
    return tree_map_only(torch.Tensor, torch.clone, state)


@contextmanager
def stand_ins(*, on_gpu: bool) -> Iterator[None]:
    """Makes PEFT and bitsandbytes accept fake weights, and take the branches of a GPU if asked, while it is open."""
    with ExitStack() as stack:
        stack.enter_context(replaced(peft_dora, "dequantize_module_weight", dequantized))
        stack.enter_context(replaced(bnb_optimizer, "deepcopy", _copied))
        stack.enter_context(replaced(bnb_layers, "fix_4bit_weight_quant_state_from_module", _restore_state))
        if on_gpu:
            stack.enter_context(replaced(bitsandbytes, "matmul", _matmul_on_gpu))
            stack.enter_context(replaced(bnb_functional, "is_on_gpu", lambda tensors: True))
            stack.enter_context(replaced(Optimizer8bit, "get_state_buffer", _state_buffer))
        yield
