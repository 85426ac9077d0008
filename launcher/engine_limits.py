"""What the engines can't do, each with its reason: a plan that asks for it is refused before anything starts.

Read off the libraries or seen failing (accelerate 1.15, deepspeed 0.19.8, bitsandbytes 0.50, TRL 1.16, torch 2.13).
"""

from __future__ import annotations

from launcher.hardware import DeviceKind
from launcher.job import (
    AdapterDtype,
    Checkpointing,
    Engine,
    JobSpec,
    Method,
    OffloadDevice,
    Optimizer,
    Quantization,
)
from launcher.optimisation import BITSANDBYTES_OPTIMIZERS, LOW_RANK_OPTIMIZERS, Precision
from launcher.plan import Plan

CPU_ADAM = (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED)
"""Optimizers that DeepSpeed's CPU Adam computes alike (accelerate 1.15, `map_pytorch_optim_to_deepspeed`)."""


def engine_limits(job: JobSpec, plan: Plan) -> tuple[str, ...]:
    """Why an engine can't carry out a plan; empty when it can.

    Args:
        job: The job; of it the device, the quantisation, the merge and the NVMe folder count.
        plan: The plan.
    """
    checks = (
        *_offload_limits(job, plan),
        *_optimizer_limits(plan),
        (
            plan.zero_stage == 3
            and plan.method is Method.QLORA
            and job.method.quantization is Quantization.INT8,
            "int8 weights can't be sharded: of bitsandbytes' formats only 4-bit weights can be stored as "
            "floating-point numbers, which sharding needs; use nf4 or a stage below 3",
        ),
        (
            job.method.merge and plan.engine is not Engine.NONE and plan.method is not Method.FULL,
            "adapters are merged in one process without an engine only; leave `method.merge` off and merge the saved "
            "adapter with peft",
        ),
        (
            plan.engine is Engine.DEEPSPEED
            and plan.zero_stage == 3
            and plan.method is not Method.FULL
            and plan.activation_checkpointing is Checkpointing.SELECTIVE,
            "adapters under ZeRO stage 3 need reentrant checkpointing, which can't be selective "
            "(TRL, sft_trainer.py); use full checkpointing",
        ),
    )
    return tuple(reason for is_found, reason in checks if is_found)


def _optimizer_limits(plan: Plan) -> tuple[tuple[bool, str], ...]:
    """What engines can't do with an optimizer that isn't torch's.

    DeepSpeed can with bitsandbytes', at each stage: a rank's part is one flat tensor like any other (stage_1_and_2.py and
    stage3.py, `zero_allow_untested_optimizer`). Seen on two processes of a CPU (tests/test_engines.py).
    """
    return (
        (
            plan.engine is Engine.FSDP2 and plan.optimizer in BITSANDBYTES_OPTIMIZERS,
            # bitsandbytes 0.50, backends/*/ops.py; torch 2.13, distributed/tensor/_sharding_prop.py
            f"{plan.optimizer.value} under fsdp2: FSDP2's weights are DTensors, for which bitsandbytes' update "
            "(optimizer_update_32bit, optimizer_update_8bit_blockwise) says no sharding strategy, and torch refuses it; "
            "use planner.pin.engine=deepspeed, or adamw_torch_fused",
        ),
        (
            plan.engine is Engine.FSDP2 and plan.optimizer is Optimizer.ADAFACTOR,
            "adafactor under fsdp2: transformers' Adafactor adds plain tensors to FSDP2's DTensors, which torch refuses "
            "(transformers 5.24, optimization.py); use planner.pin.engine=deepspeed, or adamw_torch_fused",
        ),
        (
            plan.engine is Engine.DEEPSPEED and plan.zero_stage > 0 and plan.optimizer in LOW_RANK_OPTIMIZERS,
            f"{plan.optimizer.value} at ZeRO stage {plan.zero_stage}: it projects matrices, and DeepSpeed gives it a "
            "flat part of all weights (stage_1_and_2.py, stage3.py); use planner.pin.engine=ddp",
        ),
    )


def _offload_limits(job: JobSpec, plan: Plan) -> tuple[tuple[bool, str], ...]:
    is_fsdp, is_nvme = plan.engine is Engine.FSDP2, plan.offload_device is OffloadDevice.NVME
    return (
        (
            plan.uses_offload and plan.engine not in (Engine.DEEPSPEED, Engine.FSDP2),
            f"{plan.engine.value} has no offload",
        ),
        (
            plan.engine is Engine.DEEPSPEED and plan.offload_parameters and plan.zero_stage < 3,
            f"parameters can be offloaded at ZeRO stage 3 only, not {plan.zero_stage}",
        ),
        (
            # stage 1 can do it (deepspeed 0.19.8, seen on two processes of a CPU), and has no advantage
            plan.engine is Engine.DEEPSPEED and plan.offload_optimizer and plan.zero_stage < 2,
            f"optimizer states are offloaded from ZeRO stage 2 on, not at stage {plan.zero_stage}: stage 2 has the same "
            "states in host memory, and fewer gradients on the device",
        ),
        (
            plan.engine is Engine.DEEPSPEED
            and plan.offload_optimizer
            and job.hardware.kind is not DeviceKind.CPU
            and plan.optimizer not in CPU_ADAM,
            f"with offload accelerate puts DeepSpeed's CPU Adam in the place of {plan.optimizer.value}; use "
            f"{' or '.join(name.value for name in CPU_ADAM)}",
        ),
        (
            is_fsdp and plan.offload_optimizer != plan.offload_parameters,
            "FSDP2 offloads parameters, gradients and optimizer states together, or none",
        ),
        (
            is_fsdp
            and plan.precision is Precision.BF16_AUTOCAST
            and (plan.method is Method.FULL or job.method.adapter_dtype is AdapterDtype.BASE),
            "with autocast accelerate gives FSDP2 trained weights in fp32 (utils/fsdp_utils.py), which is "
            "training.precision=bf16_mixed, or adapters in fp32 (method.adapter_dtype=fp32), not bf16_autocast",
        ),
        (is_fsdp and plan.uses_offload and is_nvme, "FSDP2 offloads to host memory only"),
        *_nvme_limits(job, plan),
        (
            is_fsdp and plan.uses_offload and job.hardware.kind is DeviceKind.CPU,
            "FSDP2's offload pins host memory, for which torch needs an accelerator; a CPU has none",
        ),
    )


def _nvme_limits(job: JobSpec, plan: Plan) -> tuple[tuple[bool, str], ...]:
    """What DeepSpeed can't do with optimizer states on NVMe (deepspeed 0.19.8)."""
    return (
        (plan.swaps and not job.hardware.nvme_path, "offload to NVMe needs hardware.nvme_path"),
        (
            plan.swaps and plan.engine is Engine.DEEPSPEED and plan.zero_stage != 3,
            f"optimizer states go to NVMe at ZeRO stage 3 only, not {plan.zero_stage}: below it DeepSpeed takes nvme for "
            "host memory, without a word (stage_1_and_2.py, `cpu_offload`)",
        ),
        (
            plan.swaps and plan.optimizer not in CPU_ADAM,
            f"{plan.optimizer.value} with optimizer states on NVMe was never tried: the buffers are for the weight, the "
            f"gradient and AdamW's two states; use {' or '.join(name.value for name in CPU_ADAM)}",
        ),
        (
            plan.swaps and plan.method is Method.QLORA,
            "quantised weights with optimizer states on NVMe were never tried; use lora or full",
        ),
        (
            plan.swaps and job.training.save_steps is not None,
            f"training.save_steps={job.training.save_steps} with optimizer states on NVMe: a resumed run begins "
            "with AdamW's two states at zero, without a word (engine.py, `load_checkpoint`; optimizer_utils.py, "
            "`has_state_tensors`): a tiny model's second loss after that was 4.85, not 4.50; leave it unset",
        ),
    )
