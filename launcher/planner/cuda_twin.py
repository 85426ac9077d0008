"""The places where a CUDA device allocates otherwise than the fake CPU device, each with its source.

Fake tensors live on a fake CPU, because a CPU build of torch cannot execute fake CUDA tensors in autograd. Inside
`branches()` the library branches that depend on the device take their CUDA side, with the allocations read off
the CUDA sources, and compared with what an H200 did (docs/accuracy.md).
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
import transformers.modeling_utils as transformers_modeling
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from torch.nn import functional

from launcher.hardware import HardwareSpec
from launcher.planner.attention_twin import attention
from launcher.planner.polynomial import TracedShape
from launcher.planner.recorder import WorkRecorder, idle_recorder
from launcher.planner.replaced import replaced
from launcher.planner.tape import OFF_DEVICE
from launcher.planner.work import WorkKind


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
        def run(*args: Any, **kwargs: Any) -> None:
            tile = args[0] if args else kwargs["X_ptr"]
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
def branches(
    hardware: HardwareSpec, shape: TracedShape, recorder: WorkRecorder | None = None
) -> Iterator[None]:
    """Makes library branches that depend on the device take their CUDA side while it is open.

    Args:
        hardware: The device.
        shape: The traced shape.
        recorder: Counts the work of kernels that are no operations of torch; None: nobody counts.
    """
    recorder = recorder or idle_recorder()
    replacements: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", attention(hardware, shape)),
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
