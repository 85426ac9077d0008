"""Evaluation that keeps its logits, traced with two batches in place of all of them.

transformers' evaluation loop joins what every batch leaves (`EvalLoopContainer`, trainer_pt_utils.py 5.24): from the
second batch on, all earlier logits, the new ones, and both joined are alive together. That is the most when the last
batch of a window is joined, so a window begins here with all rows but those of its last batch. Moved to host memory,
bf16 becomes fp32, because numpy has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import EvalLoopContainer

from launcher import workload
from launcher.job import JobSpec
from launcher.memory import Category
from launcher.plan import Plan
from launcher.planner.replaced import replaced
from launcher.planner.tape import OFF_DEVICE, Tape

TRACED_BATCHES = 2


class HostArray(np.ndarray[Any, Any]):
    """An array without data of its own, which keeps a traced tensor alive as numpy's would keep the real one's memory."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Window:
    """How many evaluation batches there are, and how many are kept on the device at a time."""

    batches: int
    """Batches of one evaluation."""
    on_device: int
    """Batches whose logits wait on the device."""

    @property
    def traced_batches(self) -> int:
        """Batches that the trace evaluates."""
        return min(self.batches, TRACED_BATCHES)

    @property
    def traced_window(self) -> int | None:
        """transformers' `eval_accumulation_steps` in the trace; None: moved at the end only."""
        return min(self.on_device, TRACED_BATCHES) if self.batches > self.on_device else None

    @property
    def traced_moves(self) -> int:
        """How often the trace moves logits to host memory."""
        return self.traced_batches // (self.traced_window or self.traced_batches)


def window_of(job: JobSpec, plan: Plan) -> Window:
    """What one evaluation of a job keeps."""
    batches = max(1, job.evaluation.num_examples // workload.evaluation_batch_size(job, plan))
    return Window(batches, min(batches, job.evaluation.accumulation_steps or batches))


@contextmanager
def all_batches(tape: Tape, window: Window, *, on_gpu: bool) -> Iterator[None]:
    """Makes two traced batches stand for all, while it is open."""
    add_one, missing = EvalLoopContainer.add, window.on_device - 1

    def add(container: Any, tensors: Any) -> None:
        is_first = container.tensors is None
        add_one(container, tensors)
        if is_first and missing > 1:
            container.tensors = _each(container.tensors, lambda tensor: _rows_like(tensor, missing))
        _each(container.tensors, lambda tensor: tape.mark([tensor], Category.LOGITS_AND_LOSS))

    def to_host(container: Any) -> None:
        if container.tensors is not None:
            earlier = window.batches - window.on_device * window.traced_moves
            container.arrays = _moved(container.tensors, container.arrays, window.on_device, earlier, on_gpu)
            container.tensors = None

    with (
        replaced(EvalLoopContainer, "add", add),
        replaced(EvalLoopContainer, "to_cpu_and_numpy", to_host),
    ):
        yield


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    return (
        type(value)(_each(item, change) for item in value)
        if isinstance(value, (list, tuple))
        else change(value)
    )


def _rows_like(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor.new_empty((tensor.shape[0] * times, *tensor.shape[1:]))


def _moved(tensors: Any, arrays: Any, batches: int, earlier: int, on_gpu: bool) -> Any:
    """Moves what a window kept, joins it to what was moved before, and returns arrays of the same structure.

    Args:
        tensors: What the window kept.
        arrays: What this trace moved before; None: nothing.
        batches: Batches in a window.
        earlier: Batches that were moved before the first window of this trace.
        on_gpu: Whether host memory is not the device's.
    """
    if isinstance(tensors, (list, tuple)):
        before = arrays or [None] * len(tensors)
        return type(tensors)(
            _moved(item, array, batches, earlier, on_gpu) for item, array in zip(tensors, before, strict=True)
        )
    host = torch.empty(tensors.shape, dtype=tensors.dtype, device=OFF_DEVICE) if on_gpu else tensors
    if host.dtype is torch.bfloat16:
        host = torch.empty(host.shape, dtype=torch.float32, device=host.device)
    if arrays is not None:
        host = _joined(arrays.tensor, host)
    elif earlier > 0:
        rows = tensors.shape[0] // batches * earlier
        host = _joined(torch.empty((rows, *host.shape[1:]), dtype=host.dtype, device=host.device), host)
    return _as_array(host)


def _joined(before: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return new.new_empty((before.shape[0] + new.shape[0], *new.shape[1:]))


def _as_array(tensor: torch.Tensor) -> NDArray[Any]:
    array = np.broadcast_to(np.zeros(1, dtype=np.float32), tuple(tensor.shape)).view(HostArray)
    array.tensor = tensor
    return array
