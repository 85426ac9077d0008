"""What stands in for libraries during a trace: kernels of optional packages, and what asks tensors for their numbers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
import transformers.masking_utils as masking_utils
import transformers.trainer_pt_utils as trainer_pt_utils
from numpy.typing import NDArray

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, JobSpec, Loss
from launcher.plan import Plan
from launcher.planner import attention_twin
from launcher.planner.kept_logits import all_batches, window_of
from launcher.planner.recorder import WorkRecorder
from launcher.planner.replaced import replaced
from launcher.planner.tape import Tape


def kernels(
    hardware: HardwareSpec, plan: Plan, recorder: WorkRecorder
) -> Iterator[AbstractContextManager[None]]:
    """Stand-ins for kernels of optional packages, for those that the plan asks for."""
    on_gpu = hardware.kind in (DeviceKind.CUDA, DeviceKind.ROCM)
    if on_gpu and plan.attention is Attention.FLASH_ATTENTION_2:
        yield attention_twin.flash_attention_2()
    if plan.loss is Loss.LIGER:  # importing it takes a second that few jobs need to wait
        yield importlib.import_module("launcher.planner.liger_twin").gpu_kernels(hardware, recorder)


def answers(job: JobSpec, plan: Plan, tape: Tape, *, on_gpu: bool) -> Iterator[AbstractContextManager[None]]:
    """Stand-ins for what asks tensors for their numbers."""
    yield replaced(masking_utils, "is_tracing", lambda tensor=None: False)
    yield replaced(masking_utils, "fast_all", lambda mask: not _pads(tape, mask))
    yield replaced(trainer_pt_utils, "nested_numpify", _zeros_like)
    yield from _random_states(on_gpu)
    if job.evaluation.keep_logits:
        yield all_batches(tape, window_of(job, plan), on_gpu=on_gpu)


def _random_states(on_gpu: bool) -> Iterator[AbstractContextManager[None]]:
    """Stand-ins for the state of the CPU's random numbers, which checkpointing keeps for each layer (5,056 bytes).

    torch 2.13, utils/checkpoint.py: `_checkpoint_without_reentrant_generator`. torch makes it where no trace sees it.
    On a GPU it is host memory, among megabytes of others.
    """
    if not on_gpu:
        num_bytes = torch.default_generator.get_state().nbytes
        yield replaced(torch, "get_rng_state", lambda: torch.empty(num_bytes, dtype=torch.uint8))
        yield replaced(torch, "set_rng_state", lambda state: None)


def _pads(tape: Tape, mask: torch.Tensor) -> bool:
    """Whether a mask masks something in the worst case; a single sequence is never padded."""
    return tape.padded and mask.shape[0] > 1


def _zeros_like(tensor: torch.Tensor) -> NDArray[np.float64]:
    """What evaluation gets for the losses it gathers: fake tensors have no numbers to convert."""
    return np.zeros(tensor.shape)
