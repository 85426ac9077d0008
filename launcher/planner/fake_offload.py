"""DeepSpeed's offload under the tape: what it puts into host memory goes to the tape's list of that memory.

Read off deepspeed 0.19.8. On a GPU its device is `cuda:0` and `cpu` is host memory; in a trace the device is the CPU,
so every place where DeepSpeed says `cpu` and means the host is told here. On a CPU both are one memory, and only what
hangs on the rank and the depth is replaced.

Stages 1 and 2 move the gradients of the rank's own part as they come. A trace does so for every parameter, as
fake_deepspeed.py does without offload: true for every rank and depth, and at most a parameter too high.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import cpu_adam
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from launcher.memory import Category
from launcher.planner.tape import OFF_DEVICE, Tape

HOST = "meta"
"""What torch is told where DeepSpeed says `cpu` and means host memory."""


def offload(tape: Tape, *, on_gpu: bool, swaps: bool) -> None:
    """Replaces what DeepSpeed's offload does otherwise than a trace can follow, in this process.

    Args:
        tape: Records what is allocated.
        on_gpu: Whether the job runs on a GPU, and host memory is another one.
        swaps: Whether optimizer states go on to NVMe.
    """
    if swaps:
        importlib.import_module("launcher.planner.fake_nvme").swap(tape, on_gpu=on_gpu)
    flat = stage_1_and_2.DeepSpeedZeroOptimizer
    flat.reduce_ipg_grads = _as_if_all_were_its_part(flat.reduce_ipg_grads)
    flat.copy_grads_in_partition = _GradientToHost(tape, on_gpu)
    flat.complete_grad_norm_calculation_for_cpu_offload = lambda self, params: torch.ones((), device="cpu")
    if on_gpu:
        _put_host_elsewhere(tape)


def _put_host_elsewhere(tape: Tape) -> None:
    flat, sharded = stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    flat.device = property(lambda self: HOST if self.cpu_offload else "cpu", lambda self, value: None)
    names = SimpleNamespace(none=OffloadDeviceEnum.none, cpu=HOST, nvme=OffloadDeviceEnum.nvme)
    for module in (stage3, partition_parameters, parameter_offload):
        module.OffloadDeviceEnum = names
    partition_parameters.Init.remote_device = property(_remote_device, _keep_remote_device)
    sharded.subgroup_to_device = property(
        lambda self: self.__dict__["_places"], lambda self, value: self.__dict__.update(_places=_Places())
    )
    sharded._create_param_groups_fp16_flat_cpu_memory = on_host(
        sharded._create_param_groups_fp16_flat_cpu_memory
    )
    for optimizer in (flat, sharded):
        optimizer._optimizer_step = _uncounted(tape, optimizer._optimizer_step)
    type(get_accelerator()).pin_memory = _Pin(tape)
    cpu_adam.torch = _TorchOnHost()
    cpu_adam.CPUAdamBuilder = _NoKernels
    setattr(importlib.import_module("cpuinfo"), "get_cpu_info", dict)  # noqa: B010  # it would ask the system for seconds


class _Places(dict[int, Any]):
    """Where each group of states is: DeepSpeed writes `cpu`, compares with `cpu`, and hands the value to torch."""

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, _Host(HOST))


class _Host(str):
    """The host's name for torch, which DeepSpeed takes for `cpu`."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cpu" or str.__eq__(self, other)


def _remote_device(init: Any) -> Any:
    kept = init.__dict__["_remote_device"]
    return HOST if isinstance(kept, str) and kept == OffloadDeviceEnum.cpu.value else kept


def _keep_remote_device(init: Any, value: Any) -> None:
    init.__dict__["_remote_device"] = value


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a function allocates without a device is in host memory."""

    @wraps(function)
    def there(*args: Any, **kwargs: Any) -> Any:
        with torch.device(OFF_DEVICE):
            return function(*args, **kwargs)

    return there


def _uncounted(tape: Tape, function: Callable[..., Any]) -> Callable[..., Any]:
    """The host's work is not the device's; communication.py has its time."""

    @wraps(function)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        with tape.uncounted():
            return function(*args, **kwargs)

    return quietly


class _Pin:
    """`pin_memory` of a GPU's accelerator: a copy that the device can read by itself; the original goes."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __call__(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Pins what is on the host."""
        if tensor.device.type != OFF_DEVICE.type:
            return tensor
        pinned = torch.empty_like(tensor)
        self._tape.pin([pinned])
        return pinned


class _TorchOnHost:
    """torch as DeepSpeed's CPU Adam sees it: its `cpu` is the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: Any) -> torch.device:
        """The device of a name."""
        return OFF_DEVICE if name == "cpu" else torch.device(name)


class _NoKernels:
    """DeepSpeed's C++ Adam, which updates in place and allocates nothing (csrc/adam/cpu_adam_impl.cpp)."""

    def load(self) -> Any:
        """The compiled functions."""
        nothing: Callable[..., None] = lambda *args: None  # noqa: E731
        return SimpleNamespace(create_adam=nothing, destroy_adam=nothing, adam_update=nothing)


def _as_if_all_were_its_part(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Every parameter counts as the rank's own, whichever are in a model of few layers."""

    @wraps(reduce)
    def reduced(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer.cpu_offload:
            whose = optimizer.is_param_in_current_partition
            optimizer.is_param_in_current_partition = dict.fromkeys(whose, True)
        return reduce(optimizer, *args, **kwargs)

    return reduced


class _GradientToHost:
    """Where a reduced gradient goes (`copy_grads_in_partition` and the three functions that it calls).

    While gradients accumulate, those of the rank's part stay on the device until the backward pass ends, and are kept
    on the host, parameter by parameter. In the last micro batch each is turned to fp32 for its norm, and again to be
    moved, and is dropped.
    """

    def __init__(self, tape: Tape, on_gpu: bool) -> None:
        self._tape = tape
        self._host = OFF_DEVICE if on_gpu else torch.device("cpu")
        self._accumulated: list[torch.Tensor] = []

    def __get__(self, optimizer: Any, owner: type) -> Callable[..., None]:
        return lambda parameter, group=None: self._move(optimizer, parameter)

    def _move(self, optimizer: Any, parameter: torch.Tensor) -> None:
        is_last = optimizer.is_gradient_accumulation_boundary()
        if optimizer.micro_step_id > 0 or not is_last:
            self._accumulate(optimizer)
        if not is_last:
            self._stay(optimizer, parameter)
            return
        elements = min(parameter.numel(), max(int(size) for size in optimizer.partition_size))
        for _ in ("its norm", "its copy"):
            torch.empty(elements, dtype=optimizer.master_weights_and_grads_dtype)
        optimizer.clear_grad_attribute(parameter)

    def _accumulate(self, optimizer: Any) -> None:
        """The room on the host: whole parameters, also where only an end of one belongs to the part."""
        if self._accumulated:
            return
        weights = [weight for group in optimizer.bit16_groups for weight in group]
        part = sum(int(size) for size in optimizer.partition_size)
        largest = max(weight.numel() for weight in weights)
        for elements in (part, largest):
            self._accumulated.append(torch.empty(elements, dtype=optimizer.dtype, device=self._host))
        self._tape.mark(self._accumulated, Category.GRADIENTS)
        self._tape.mark_parts(self._accumulated[:1])
        if optimizer.cpu_offload_pin_memory:
            self._tape.pin(self._accumulated)

    def _stay(self, optimizer: Any, parameter: torch.Tensor) -> None:
        """A gradient of the rank's part waits on the device for the end of the backward pass."""
        weights = [weight for group in optimizer.bit16_groups for weight in group]
        if optimizer.grads_in_partition is None:
            part = sum(int(size) for size in optimizer.partition_size)
            largest = max(weight.numel() for weight in weights)
            room = max(part + min(optimizer.reduce_bucket_size, largest), largest)
            optimizer.grads_in_partition = torch.empty(room, dtype=optimizer.dtype)
        gradient = optimizer.get_gradient_for_reduction(parameter)
        gradient.data = optimizer.grads_in_partition.narrow(0, 0, parameter.numel()).view(parameter.shape)
