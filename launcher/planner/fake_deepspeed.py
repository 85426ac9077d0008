"""DeepSpeed under the tape: what it asks of other ranks and of numbers, answered where there are neither.

Read off deepspeed 0.19.8, runtime/zero. Its stages 1 and 2 do some things for the rank's own part of the parameters
only, wherever that part begins; a trace of few layers, whose parts are other ones, does them for all. So what it says
is true for every depth, and at most a bucket too high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import deepspeed
import deepspeed.checkpoint.utils as checkpoint_utils
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
    stage_1_and_2,
    utils,
)
from transformers.integrations.deepspeed import deepspeed_config as deepspeed_settings

from launcher.planner.replaced import replaced
from launcher.planner.tape import OFF_DEVICE, Tape


def answer(tape: Tape, *, on_gpu: bool, overlaps: bool, layer_elements: int) -> None:
    """No overflow, a valid norm, and the same answer from every rank (deepspeed 0.19.8, runtime/zero).

    Args:
        tape: Is told when the allocator's cache is emptied.
        on_gpu: Whether the job runs on a GPU; then what is saved goes to host memory first, which is another one.
        overlaps: Whether ranks exchange while they compute (`overlap_comm`).
        layer_elements: A bucket of ordinary size, which holds the largest parameter of a layer.
    """
    # takes the process group that is there
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    for module, optimizer in (
        (stage_1_and_2, stage_1_and_2.DeepSpeedZeroOptimizer),
        (stage3, stage3.DeepSpeedZeroOptimizer_Stage3),
    ):
        optimizer._has_inf_or_nan = staticmethod(lambda tensor, j=None: False)
        optimizer.has_overflow = lambda self, partition_gradients=True: False
        _replace(module, "is_invalid_grad_norm", lambda norm: False)
    flat = stage_1_and_2.DeepSpeedZeroOptimizer
    flat.allreduce_and_scatter = _copy_whole_bucket
    flat.reduce_ipg_grads = _with_room_for_its_part(flat.reduce_ipg_grads, layer_elements)
    flat.copy_grads_in_partition = lambda self, param, group_idx=None: _point_into_part(self, param)
    stage_1_and_2.torch = _TorchWithoutShapesOnly()
    flat.get_grad_norm_direct = _norm_of_one_gradient
    if on_gpu:
        utils.torch = _TorchWithHost()
        checkpoint_utils.clone_tensors_for_torch_save.__defaults__ = (OFF_DEVICE,)
        whole = DeepSpeedEngine._zero3_consolidated_16bit_state_dict
        DeepSpeedEngine._zero3_consolidated_16bit_state_dict = _moving_to_host(whole)
        type(get_accelerator()).empty_cache = lambda accelerator: tape.flush()
        _give_streams(overlaps=overlaps)
    for module in (partitioned_param_coordinator, parameter_offload):
        vars(module)["set"] = _InOrder
    for module in (utils, partitioned_param_coordinator, partition_parameters, parameter_offload, stage3):
        _replace(module, "assert_ints_same_as_other_ranks", lambda *values: None)
        _replace(module, "assert_lst_len_same_as_other_ranks", lambda *values: None)
        _replace(module, "get_lst_from_rank0", lambda values: values)


class _StreamOfItsOwn:
    """An attribute that is a stream of torch's stand-in for CPUs, whatever it is set to."""

    def __init__(self) -> None:
        self._stream = torch.cpu.Stream()

    def __get__(self, instance: object, owner: type) -> torch.cpu.Stream:
        return self._stream

    def __set__(self, instance: object, value: object) -> None:
        """DeepSpeed's accelerator for CPUs has no streams, and says None."""


def _give_streams(*, overlaps: bool) -> None:
    """Where ranks exchange while they compute, DeepSpeed asks for memory on streams of its own, as on a GPU.

    Where they don't, the CPU's None says what the default stream says on a GPU.
    """
    kind = type(get_accelerator())
    kind.stream = lambda self, stream: torch.cpu.stream(stream)
    stage_1_and_2.DeepSpeedZeroOptimizer.reduction_stream = _StreamOfItsOwn()
    if overlaps:
        whole = stage3.DeepSpeedZeroOptimizer_Stage3
        whole.reduce_and_partition_stream = _StreamOfItsOwn()
        gathering = partitioned_param_coordinator.PartitionedParameterCoordinator
        gathering._PartitionedParameterCoordinator__allgather_stream = _StreamOfItsOwn()


def _moving_to_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """While it runs, `.cpu()` leaves the device: ZeRO 3 moves each weight as soon as it is gathered."""

    @wraps(function)
    def moving(*args: Any, **kwargs: Any) -> Any:
        with replaced(torch.Tensor, "cpu", lambda tensor: tensor.to(OFF_DEVICE)):
            return function(*args, **kwargs)

    return moving


class _TorchWithHost:
    """torch as `defragment` sees it: ZeRO 3 lays its partitions side by side in host memory, and takes them back."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *sizes: Any, device: Any, **options: Any) -> torch.Tensor:
        """As torch's; what it calls `cpu` is the host."""
        is_host = isinstance(device, str) and device == "cpu"
        return torch.empty(*sizes, device=OFF_DEVICE if is_host else device, **options)


class _TorchWithoutShapesOnly:
    """torch as stages 1 and 2 see it: a tensor on `meta` is a shape to them, and takes no memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros_like(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """As torch's; the shape alone where that is all that is asked for."""
        if options.get("device") == "meta":
            return torch.empty((), dtype=tensor.dtype, device="meta").expand(tensor.shape)
        return torch.zeros_like(tensor, **options)


class _InOrder(dict[Any, None]):
    """A set that is gone through in the order in which its elements came.

    ZeRO 3 fetches and releases the parameters of sets, whose order hangs on where Python's objects lie: another one in
    each layer, so that no moment between two releases is like one of the next layer.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__(dict.fromkeys(items))

    def add(self, item: Any) -> None:
        """As a set's."""
        self[item] = None

    def discard(self, item: Any) -> None:
        """As a set's."""
        self.pop(item, None)

    def update(self, items: Iterable[Any]) -> None:  # type: ignore[override]  # a set's, not a dict's
        """As a set's."""
        super().update(dict.fromkeys(items))


def _copy_whole_bucket(
    optimizer: Any, bucket: Any, communication_data_type: torch.dtype, **options: Any
) -> None:
    """ZeRO 1 and 2 copy the gradients of a bucket side by side before they reduce them (`allreduce_bucket`).

    All but those of a single rank, which need no copy. Which buckets these are hangs on where the parts of ranks meet;
    a trace of few layers takes all for copied, and so is true for every depth, and at most a bucket too high.
    """
    gradients = [item[1] for item in bucket]
    gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))


def _with_room_for_its_part(reduce: Callable[..., Any], layer_elements: int) -> Callable[..., Any]:
    """The gradients of a rank's part (`grads_in_partition`) are there from the first bucket on.

    DeepSpeed makes room when the first of its own parameters comes, which one rank does sooner than another. The room
    is for whole parameters, also where only an end of one belongs to the part: a bucket of ordinary size, which holds
    the largest parameter of a layer, is the most that this can add.
    """

    @wraps(reduce)
    def with_room(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer.grads_in_partition is None and not optimizer.cpu_offload:
            elements = sum(int(size) for size in optimizer.partition_size)
            largest = max(weight.numel() for group in optimizer.bit16_groups for weight in group)
            elements = max(elements + min(layer_elements, largest), largest)
            optimizer.grads_in_partition = torch.empty(elements, dtype=optimizer.dtype)
        return reduce(optimizer, *args, **kwargs)

    return with_room


def _point_into_part(optimizer: Any, parameter: torch.Tensor) -> None:
    """A reduced gradient of this rank's part moves into the room for them."""
    gradient = optimizer.get_gradient_for_reduction(parameter)
    gradient.data = optimizer.grads_in_partition.narrow(0, 0, parameter.numel()).view(parameter.shape)


def _norm_of_one_gradient(
    optimizer: Any, gradients: Any, parameters: Any, norm_type: float = 2
) -> torch.Tensor:
    """Norms are computed gradient by gradient, each turned to fp32: the largest one stands for all."""
    del gradients
    largest = max(weight.numel() for group in optimizer.bit16_groups for weight in group)
    torch.empty(min(largest, max(int(size) for size in optimizer.partition_size)), dtype=torch.float32)
    return torch.ones((), dtype=torch.float32)


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    if hasattr(module, name):
        setattr(module, name, function)


def sharder() -> Callable[[torch.nn.Parameter], None]:
    """Splits one weight over the ranks as soon as it is there, as loading does under ZeRO 3 (`zero.Init`).

    From then on products keep the weight for the backward pass and not what was gathered of it (`zero3_linear_wrap`).
    """
    settings = deepspeed_settings()
    init = partition_parameters.Init(config_dict_or_path=settings, enabled=True)
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()

    def shard(weight: torch.nn.Parameter) -> None:
        if weight.is_floating_point():
            weight.data = weight.data.to(init.dtype)
        init._convert_to_zero_parameters([weight])

    return shard
