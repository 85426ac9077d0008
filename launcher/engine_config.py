"""What accelerate, DeepSpeed and FSDP2 are told: explicit numbers, read from files in the run directory.

The tracer reads the same files before it traces a plan for several devices.

Nothing is left to `auto`: transformers would put its own bucket sizes there, which depend on the model's width and
not on the memory that is left (transformers 5.24, integrations/deepspeed.py, `trainer_config_finalize`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec, Method, Precision
from launcher.optimisation import IN_BF16
from launcher.plan import Buckets, Plan

NO_PROGRESS_LINES: Final = 1_000_000_000
"""`steps_per_print`: DeepSpeed would print a line of its own every ten steps."""
OPTIMIZER_BUFFERS: Final = 4
"""Buffers between NVMe and host memory, DeepSpeed's default (deepspeed 0.19.8, runtime/zero/offload_config.py): a weight,
its gradient and AdamW's two states of the group that is updated."""
ASYNCHRONOUS_IO: Final[Mapping[str, Any]] = {
    "block_size": 1_048_576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}
"""How DeepSpeed reads and writes NVMe: its defaults (deepspeed 0.19.8, runtime/swap_tensor/constants.py)."""
LOSS_SCALING: Final[Mapping[str, Any]] = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""Dynamic loss scale of fp16, as torch's GradScaler begins (65,536)."""


DISTRIBUTED_TYPES: Final[Mapping[Engine, str]] = {
    Engine.NONE: "NO",
    Engine.DDP: "MULTI_GPU",  # on a CPU too: MULTI_CPU starts one process, without a word (accelerate 1.15)
    Engine.DEEPSPEED: "DEEPSPEED",
    Engine.FSDP2: "FSDP",
}
"""What accelerate calls the engines."""


def accelerate_settings(hardware: HardwareSpec, plan: Plan, deepspeed_file: str) -> dict[str, Any]:
    """Configuration of `accelerate launch`, by accelerate's names.

    `mixed_precision` is the text `no` (a bare one would be read as false): accelerate passes it on in
    `ACCELERATE_MIXED_PRECISION`, which transformers' TrainingArguments read first and then overrule with
    `bf16` or `fp16` (training_args.py, 5.17 to 5.24). Any other value would stand where both are off.
    `gpu_ids` is `all` so that accelerate leaves CUDA_VISIBLE_DEVICES as the worker's environment has it.
    """
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": DISTRIBUTED_TYPES[plan.engine],
        "gpu_ids": "all",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": plan.num_nodes,
        "num_processes": plan.world_size,
        "use_cpu": hardware.kind is DeviceKind.CPU,
    }
    if plan.engine is Engine.DEEPSPEED:
        del config[
            "mixed_precision"
        ]  # accelerate refuses one beside DeepSpeed's file, and takes `no` without
        config["deepspeed_config"] = {
            "deepspeed_config_file": deepspeed_file,
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": plan.zero_stage == 3,
        }
    elif plan.engine is Engine.FSDP2:
        config["fsdp_config"] = fsdp_config(plan)
        if plan.shard_within_node and plan.num_nodes > 1:
            config["parallelism_config"] = mesh_config(plan)
    return config


def deepspeed_text(job: JobSpec, plan: Plan, swap_folder: str = "") -> str:
    """The DeepSpeed configuration file of a plan; see `deepspeed_config`."""
    return json.dumps(deepspeed_config(job, plan, swap_folder), indent=2) + "\n"


def deepspeed_config(job: JobSpec, plan: Plan, swap_folder: str = "") -> dict[str, Any]:
    """DeepSpeed's configuration, by its own names.

    `precision=bf16` and `bf16_mixed` are one to DeepSpeed: weights, gradients and computation in bf16, and a sharded
    copy of the trained weights in fp32, to which the optimizer's states belong (runtime/zero/stage_1_and_2.py and
    stage3.py, `fp32_partitioned_groups_flat`).

    The optimizer is the trainer's own (`zero_allow_untested_optimizer`). With offload on a machine with GPUs accelerate
    turns AdamW into DeepSpeed's CPU Adam (`zero_force_ds_cpu_optimizer`), which is compiled at its first use; on a
    CPU nothing needs compiling.

    Args:
        job: The job.
        plan: The plan.
        swap_folder: Where optimizer states are swapped to: a folder of this run alone, as the files' names say nothing of
            the run; empty where nothing is swapped.
    """
    training, on_cpu = job.training, job.hardware.kind is DeviceKind.CPU
    is_bf16 = plan.precision in IN_BF16
    is_fp16 = plan.precision is Precision.FP16_MIXED
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": NO_PROGRESS_LINES,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": is_bf16},
        "fp16": {"enabled": is_fp16, **(LOSS_SCALING if is_fp16 else {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": not on_cpu,
        "zero_optimization": _zero_optimization(job, plan, swap_folder),
    }
    if plan.swaps:
        config["aio"] = dict(ASYNCHRONOUS_IO)
    return config


def _zero_optimization(job: JobSpec, plan: Plan, swap_folder: str) -> dict[str, Any]:
    if plan.zero_stage == 0:
        return {"stage": 0}
    buckets = required_buckets(plan)
    section: dict[str, Any] = {
        "stage": plan.zero_stage,
        "contiguous_gradients": True,
        # a second stream, and a second bucket
        "overlap_comm": buckets.overlap_exchange and job.hardware.kind is not DeviceKind.CPU,
        "reduce_scatter": True,
        "reduce_bucket_size": buckets.reduce_bucket_elements,
        "round_robin_gradients": False,
    }
    if plan.zero_stage < 3:
        section |= {
            "allgather_partitions": True,
            "allgather_bucket_size": buckets.allgather_bucket_elements,
        }
    else:
        section |= {
            "sub_group_size": buckets.sub_group_elements,
            "stage3_prefetch_bucket_size": buckets.prefetch_bucket_elements,
            "stage3_param_persistence_threshold": buckets.persistence_threshold_elements,
            "stage3_max_live_parameters": buckets.max_live_elements,
            "stage3_max_reuse_distance": buckets.max_reuse_distance_elements,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if plan.offload_optimizer:
        section["offload_optimizer"] = _on_host(job.hardware)
        if plan.swaps:
            drive = {"device": "nvme", "nvme_path": swap_folder, "buffer_count": OPTIMIZER_BUFFERS}
            section["offload_optimizer"] |= drive
    if plan.offload_parameters:
        section["offload_param"] = _on_host(job.hardware)
    return section


def _on_host(hardware: HardwareSpec) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": hardware.kind is not DeviceKind.CPU}


def required_buckets(plan: Plan) -> Buckets:
    """The bucket sizes of a plan for several devices.

    Raises:
        ValueError: When the plan has none.
    """
    if plan.buckets is None:
        raise ValueError(f"a plan for {plan.engine.value} without bucket sizes")
    return plan.buckets


def shares_from_host(plan: Plan) -> bool:
    """Whether weights stay in host memory until each rank is given its part; quantised ones are read to the device.

    accelerate 1.15, utils/fsdp_utils.py, `fsdp2_prepare_model` with `cpu_ram_efficient_loading`.
    """
    return plan.engine is Engine.FSDP2 and plan.method is not Method.QLORA


def fsdp_config(plan: Plan) -> dict[str, Any]:
    """The section `fsdp_config` of accelerate's configuration file.

    Each decoder layer is a unit of its own; which class that is the model says itself (`_no_split_modules`). Rank 0
    alone reads the weights, but for quantised ones, which accelerate can't move to `meta` (accelerate 1.15,
    utils/fsdp_utils.py, `fsdp2_prepare_model`). Checkpoints hold each rank's part; the trained model is gathered.
    """
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": plan.offload_parameters,
        "fsdp_cpu_ram_efficient_loading": shares_from_host(plan),
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": False,  # the trainer's own is used, as on one device
    }


def mesh_config(plan: Plan) -> dict[str, int]:
    """The section `parallelism_config`: sharded within a node, repeated over nodes."""
    return {
        "parallelism_config_dp_replicate_size": plan.num_nodes,
        "parallelism_config_dp_shard_size": plan.num_devices,
        "parallelism_config_tp_size": 1,
        "parallelism_config_cp_size": 1,
        "parallelism_config_sp_size": 1,
    }
