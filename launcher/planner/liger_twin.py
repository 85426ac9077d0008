"""Liger's fused linear cross-entropy as a GPU runs it: its own code, on fake tensors, without its Triton kernels.

`liger_kernel.ops.fused_linear_cross_entropy` of liger-kernel 0.8.5. Both Triton kernels write into their arguments and
allocate nothing. Where the code asks for the device, CUDA's answer stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import liger_kernel.ops.fused_linear_cross_entropy as liger
import torch

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.planner.cuda_twin import InPlaceKernel
from launcher.planner.recorder import WorkRecorder, idle_recorder
from launcher.planner.replaced import replaced


def _multiplies_in_place(hardware: HardwareSpec) -> Callable[..., bool]:
    """`_can_use_mm_out`: on CUDA products go into buffers made beforehand, if nothing casts their operands."""

    def can_use_mm_out(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        if hardware.kind is not DeviceKind.CUDA or torch.is_grad_enabled() or hidden.dtype != weight.dtype:
            return False
        if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return False
        return not torch.is_autocast_enabled() or hidden.dtype == torch.get_autocast_dtype("cpu")

    return can_use_mm_out


def _forward(
    compute: Callable[..., tuple[Any, ...]], recorder: WorkRecorder
) -> Callable[..., tuple[Any, ...]]:
    """`fused_linear_cross_entropy_forward` from compute capability 8.0 on, where the weight's gradient grows in place.

    `torch.addmm(..., out=grad_weight)` adds every tile's share; elsewhere, on a CPU too, each share is a product of the
    weight's size, cast to fp32. A tile's cast inputs, smaller than its logits, are left out.
    """

    def forward(_input: torch.Tensor, weight: torch.Tensor, *options: Any, **named: Any) -> tuple[Any, ...]:
        asked = named.pop("weight_requires_grad", None)
        needs = weight.requires_grad if asked is None else asked
        computes = named.get("compute_gradients")
        computes = _input.requires_grad if computes is None else computes
        dtype = named.get("accum_dtype") or weight.dtype
        gradient = torch.zeros_like(weight, dtype=dtype) if needs and computes else None
        if gradient is not None:  # as many operations as the logits take
            recorder.note_product("liger, gradient of the weight", _input, weight.t(), gradient)
        *results, _, of_bias = compute(_input, weight, *options, weight_requires_grad=False, **named)
        return (*results, None if gradient is None else gradient.to(weight.dtype), of_bias)

    return forward


@contextmanager
def gpu_kernels(hardware: HardwareSpec, recorder: WorkRecorder | None = None) -> Iterator[None]:
    """Makes Liger's loss take its GPU side while it is open; `recorder` counts the work of what is stood in for."""
    recorder = recorder or idle_recorder()
    replacements: dict[str, Any] = {
        "liger_cross_entropy_kernel": InPlaceKernel(2, recorder),
        "element_mul_kernel": InPlaceKernel(2, recorder),
        "_can_use_mm_out": _multiplies_in_place(hardware),
    }
    if (
        hardware.kind is DeviceKind.CUDA and hardware.supports_flash_attention
    ):  # the same devices, 8.0 and more
        replacements["fused_linear_cross_entropy_forward"] = _forward(
            liger.fused_linear_cross_entropy_forward, recorder
        )
    with ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(replaced(liger, name, value))
        yield
