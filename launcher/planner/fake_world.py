"""A world of ranks that isn't there: the real engines (DeepSpeed, FSDP2) run under the tape as one rank of many.

The process group is torch's own stand-in for tests, whose collectives return at once. Engines look at values now and
then, to agree with other ranks or to find overflows; fake tensors have none, so those questions are answered here.
Everything else is the engines' own code, configured by the files that a run is configured by.

It changes this process for good (environment, process group, patched functions): call it in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import accelerator, parallelism_config
from accelerate.commands import launch
from accelerate.utils import fsdp_utils
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import _state_dict_utils as state_dict_utils
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_init as fsdp_init
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from launcher.engine_config import accelerate_settings, deepspeed_config
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec
from launcher.plan import Plan
from launcher.planner.buckets import default_buckets
from launcher.planner.gloo_twin import allocate_as_gloo
from launcher.planner.materialize import forget_weights
from launcher.planner.replica import Layers, Replica
from launcher.planner.tape import OFF_DEVICE, Tape


def join(job: JobSpec, plan: Plan, rank: int, folder: Path, tape: Tape, layers: Layers) -> None:
    """Makes this process one rank of the plan's world.

    Args:
        job: The job.
        plan: The plan, for several devices.
        rank: Which rank.
        folder: For the engines' configuration files.
        tape: Records what is allocated.
        layers: How many layers the model has here, and in truth.
    """
    os.environ.update(_environment(job, plan, folder))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % plan.num_devices),
        WORLD_SIZE=str(plan.world_size),
        LOCAL_WORLD_SIZE=str(plan.num_devices),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        CUDA_VISIBLE_DEVICES="",
    )
    distributed.init_process_group("fake", rank=rank, world_size=plan.world_size, store=FakeStore())
    if job.hardware.kind is DeviceKind.CPU:
        allocate_as_gloo()
    if plan.engine is Engine.DEEPSPEED:
        on_gpu = job.hardware.kind is not DeviceKind.CPU
        fake_deepspeed = importlib.import_module("launcher.planner.fake_deepspeed")
        overlaps = plan.buckets is not None and plan.buckets.overlap_exchange
        elements = _bucket_elements(job, plan)
        fake_deepspeed.answer(tape, on_gpu=on_gpu, overlaps=overlaps, layer_elements=elements)
        if plan.uses_offload:
            importlib.import_module("launcher.planner.fake_offload").offload(
                tape, on_gpu=on_gpu, swaps=plan.swaps
            )
    elif plan.engine is Engine.FSDP2:
        FakeTensor.data_ptr = _stand_in_address  # type: ignore[method-assign, assignment]  # accelerate knows weights by it
        _real_numbers_for_meshes()
        _shard_shapes(tape)
        if job.hardware.kind is not DeviceKind.CPU:
            _gather_into_host_memory()
        # DTensor asks once, of whole tensors, what shape an operation gives (torch 2.13, tensor/_sharding_prop.py)
        ShardingPropagator._propagate_tensor_meta_non_cached = _outside_of_modes(  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached
        )
        # gathered weights keep their storage, which has no bytes in between (torch 2.13, _fully_shard/_fsdp_param.py)
        for module in (fsdp_param, fsdp_param_group):
            _replace(module, "alloc_storage", lambda tensor: tape.resize(tensor, tensor.nbytes))
            _replace(module, "free_storage", lambda tensor: tape.resize(tensor, 0))
    elif plan.engine is Engine.DDP:
        Replica.layers = layers
        nn.parallel.DistributedDataParallel = Replica  # type: ignore[misc, assignment]  # in this process only


def _bucket_elements(job: JobSpec, plan: Plan) -> int:
    """Elements of a bucket of gradients of ordinary size."""
    if plan.has_small_buckets:
        targets = job.method.target_modules
        return default_buckets(job.model.architecture, plan, targets).reduce_bucket_elements
    return 0 if plan.buckets is None else plan.buckets.reduce_bucket_elements


def _environment(job: JobSpec, plan: Plan, folder: Path) -> dict[str, str]:
    """What `accelerate launch` tells its workers, by its own parser; the device of a trace is the CPU."""
    deepspeed_file, config_file = folder / "deepspeed.json", folder / "accelerate.yaml"
    on_cpu = HardwareSpec(name="cpu", kind=DeviceKind.CPU)
    config_file.write_text(yaml.safe_dump(accelerate_settings(on_cpu, plan, str(deepspeed_file))))
    deepspeed_file.write_text(json.dumps(deepspeed_config(job, plan, str(folder))) if plan.buckets else "{}")
    parser: Any = launch.launch_command_parser()
    arguments, defaults, _ = launch._validate_launch_command(
        parser.parse_args(["--config_file", str(config_file), "worker.py"])
    )
    if plan.engine is Engine.DEEPSPEED:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
        # with the user's `true` it would be DDP (see `launcher.run.render`)
        return {**environment, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    return {**prepare_multi_gpu_env(arguments), "ACCELERATE_USE_CPU": "true"}


def _shard_shapes(tape: Tape) -> None:
    """accelerate shards shapes, and gives a rank its part of the weights afterwards (1.15, utils/fsdp_utils.py)."""
    prepare, load = accelerator.fsdp2_prepare_model, fsdp_utils.fsdp2_load_full_state_dict

    def prepared(caller: Any, model: Any) -> Any:
        def forget(*device: Any) -> Any:
            model.to = lambda *args, **kwargs: model
            tape.shapes_only = True
            return forget_weights(model)

        model.to = forget
        return prepare(caller, model)

    def loaded(*args: Any, **kwargs: Any) -> Any:
        tape.shapes_only = False
        return load(*args, **kwargs)

    accelerator.fsdp2_prepare_model = prepared
    fsdp_utils.fsdp2_load_full_state_dict = loaded


def _gather_into_host_memory() -> None:
    """What is gathered to be saved leaves the device weight by weight (torch 2.13, distributed/_state_dict_utils.py)."""
    iterate: Callable[..., Any] = state_dict_utils._iterate_state_dict

    @wraps(iterate)
    def iterated(item: Any, *args: Any, cpu_offload: bool = False, **kwargs: Any) -> Any:
        value = iterate(item, *args, cpu_offload=cpu_offload, **kwargs)
        is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        return value.to(OFF_DEVICE) if cpu_offload and is_whole else value

    _replace(state_dict_utils, "_iterate_state_dict", iterated)


def _stand_in_address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    if hasattr(module, name):
        setattr(module, name, function)


def _real_numbers_for_meshes() -> None:
    """Device meshes compute with the numbers of ranks, which have to be real ones."""
    original = device_mesh.init_device_mesh
    for module in (device_mesh, fsdp_init, distributed, parallelism_config):
        if getattr(module, "init_device_mesh", None) is original:
            _replace(module, "init_device_mesh", _outside_of_modes(original))
    for name in ("_compute_coordinate_on_dim", "__getitem__"):
        setattr(DeviceMesh, name, _outside_of_modes(getattr(DeviceMesh, name)))


def _outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return outside
