"""Weighs what outlives a step on the live objects: parameters, buffers, gradients and optimizer state of one rank.

A storage counts once and whole, whoever looks into it. Where engines hold a rank's part says launcher/engines.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from launcher import workload
from launcher.engines import averaged_gradients, local_tensors, master_weights, swap_buffers
from launcher.memory import RESIDENT, Category
from launcher.optimizers import optimizer_tensors


def live_tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum(storage.nbytes() for storage in distinct_storages(tensors))


def distinct_storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """The storages behind tensors, each once, of a sharded tensor this rank's part."""
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in local_tensors(tensors):
        if not tensor.is_sparse and tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
    return list(storages.values())


def all_live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python holds, but for those that libraries made as they were imported (gc.freeze)."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def resident_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[Category, list[torch.Tensor]]:
    """The parameters, buffers, gradients and optimizer state that are alive now.

    With DeepSpeed the gradients are those of this rank's part, averaged over all ranks, and what parameters have.
    """
    weights: list[torch.Tensor] = list(model.parameters())
    scales = [scale for weight in weights for scale in workload.scales_of(weight)]
    states_8bit = [
        getattr(module, "state", None) for module in model.modules()
    ]  # it moves there at the first use
    moved = [getattr(state, "SCB", None) for state in states_8bit]
    scales += [scale for scale in moved if isinstance(scale, torch.Tensor)]
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [tensor for state in states for tensor in optimizer_tensors(state)]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return {
        Category.PARAMETERS: weights + scales,
        Category.BUFFERS: list(model.buffers()),
        Category.GRADIENTS: [*averaged_gradients(optimizer), *gradients],
        Category.OPTIMIZER_STATE: [*tensors, *master_weights(optimizer), *swap_buffers(optimizer)],
    }


def lasting_tensors(trainers: Sequence[Any]) -> dict[Category, list[torch.Tensor]]:
    """Those of a trainer, once it is built, and the gradients that offload keeps beside the optimizer's states."""
    if not trainers:
        return {}
    tensors = resident_tensors(trainers[0].model, trainers[0].optimizer)
    masters = master_weights(trainers[0].optimizer)
    tensors[Category.GRADIENTS] += [weight.grad for weight in masters if weight.grad is not None]
    return tensors


def weigh_residents(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[Category, int]:
    """Bytes of parameters, buffers and optimizer state, weighed on the live objects."""
    tensors = resident_tensors(model, optimizer)
    return {
        category: live_tensor_bytes(tensors[category])
        for category in RESIDENT
        if category is not Category.GRADIENTS
    }


def weigh_gradients(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the gradients that are alive now."""
    return live_tensor_bytes(resident_tensors(model, optimizer)[Category.GRADIENTS])


def bucket_sizes_bytes(trainers: Sequence[Any]) -> list[int]:
    """Bytes of each of DDP's gradient buckets: torch holds them where Python sees nothing until gradients look into them.

    They are made when the model is wrapped and stay to the end (torch 2.13, nn/parallel/distributed.py).

    Args:
        trainers: The trainer, once it is built.
    """
    wrapped = trainers[0].model_wrapped if trainers else None
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return []
    known: Any = wrapped._get_ddp_logging_data()
    words = known.get("rebuilt_bucket_sizes") or known.get("bucket_sizes") or ""
    return [int(size) for size in str(words).split(",") if size.strip()]
