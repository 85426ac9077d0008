"""What a knob asks of the device, the packages and the other knobs; a job that can't have it is refused with the reason.

Read off the libraries (transformers 5.24, trl 1.16, liger-kernel 0.8.5). What engines can't do is in engine_limits.py.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.architecture import (
    DEQUANTIZED_AS_READ,
    PUBLISHED_QUANTIZED,
    architecture_mistakes,
    longest_sequence,
    stored_quantization,
)
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    Engine,
    JobSpec,
    Method,
    Objective,
    OffloadDevice,
    OptionalKernel,
    Precision,
)
from launcher.optimisation import IN_BF16, LOW_RANK_OPTIMIZERS, implementations

PACKAGE = "memory-first-launcher"
"""This project's own name for pip."""
Limit = tuple[bool, str, str]
"""Whether it is found, what is wrong, and what to do about it."""


def knob_limits(
    job: JobSpec, hardware: HardwareSpec, is_installed: Callable[[str], bool]
) -> tuple[tuple[str, str], ...]:
    """What is wrong with the knobs of a job, each with a hint; empty when nothing is.

    Args:
        job: The job.
        hardware: Where it is to run, resolved.
        is_installed: Whether a Python module can be imported on this machine.
    """
    found = [
        *_device_limits(job, hardware),
        *_objective_limits(job, hardware),
        *_loss_limits(job, hardware),
        *_evaluation_limits(job, hardware),
        *_optimizer_limits(job),
        *_offload_limits(job, hardware),
        *_missing_packages(job, is_installed),
    ]
    return tuple((what, hint) for is_found, what, hint in found if is_found)


def offload_is_refused(job: JobSpec, hardware: HardwareSpec) -> bool:
    """Whether `knob_limits` refuses the offload that a job asks for, whatever its engine."""
    return any(is_found for is_found, _, _ in _offload_limits(job, hardware))


def model_limits(job: JobSpec) -> tuple[tuple[str, str], ...]:
    """What is wrong with the facts of a job's model, and with lengths that it has no positions for; each with a hint.

    Args:
        job: The job; its model resolved.
    """
    facts, planner = job.model.architecture, job.planner
    found = [
        (f"model.architecture.{key} {what}", "correct it, or leave it to the model's own config.json")
        for key, what in architecture_mistakes(facts)
    ]
    longest = longest_sequence(facts)
    lengths = (planner.pin.max_length,) if planner.pin.max_length else planner.choices.max_length
    known = [length for length in lengths or (job.data.max_length,) if length != "auto"]
    too_long = [length for length in known if longest and length > longest]
    if too_long and not found:
        key = (
            f"planner.{'pin' if planner.pin.max_length else 'choices'}.max_length"
            if lengths
            else "data.max_length"
        )
        found.append(
            (
                f"{key}={too_long[0]}: {facts.get('model_type')} has a table of {longest} positions, and none for a "
                "longer sequence",
                f"{key}={longest} or less; longer examples are cut to it",
            )
        )
    stored = stored_quantization(facts)
    if job.model.path in PUBLISHED_QUANTIZED:
        stored = DEQUANTIZED_AS_READ
    methods = [planner.pin.method] if planner.pin.method else planner.choices.method or (job.method.name,)
    if stored and Method.QLORA in methods:
        found.append(
            (
                f"`method=qlora` with a model that is stored as {stored}: transformers (5.24) quantises no "
                "weights that are quantised already",
                "`method=lora`, or `model.path` of a copy that is stored in bf16",
            )
        )
    return tuple(found)


def _asks(job: JobSpec, kernel: OptionalKernel) -> bool:
    """Whether a job pins a kernel of another package, or lets the search weigh it."""
    pinned = {
        OptionalKernel.LIGER: job.planner.pin.loss,
        OptionalKernel.FLASH_ATTENTION_2: job.planner.pin.attention,
    }
    return pinned[kernel] == kernel.value or kernel in job.planner.kernels


def _asked_by(job: JobSpec, kernel: OptionalKernel) -> str:
    """The key that asks for it."""
    if kernel in job.planner.kernels:
        return f"planner.kernels=[{kernel.value}]"
    return f"planner.pin.{'loss' if kernel is OptionalKernel.LIGER else 'attention'}={kernel.value}"


def _without(job: JobSpec, kernel: OptionalKernel) -> str:
    """What to do for a job that does not ask for it."""
    if kernel in job.planner.kernels:
        return f"planner.kernels without {kernel.value}"
    other = "loss=chunked" if kernel is OptionalKernel.LIGER else "attention=sdpa"
    return f"planner.pin.{other}"


def _device_limits(job: JobSpec, hardware: HardwareSpec) -> list[Limit]:
    pin, precision = job.planner.pin, job.training.precision
    on_cpu = hardware.kind is DeviceKind.CPU
    no_flash = on_cpu or not hardware.supports_flash_attention
    return [
        (
            precision in IN_BF16 and not hardware.supports_bf16,
            f"{hardware.name} has no bf16; training.precision={precision.value} can't run on it",
            "training.precision=fp16_mixed or fp32",
        ),
        (
            precision is Precision.FP16_MIXED and on_cpu,
            "training.precision=fp16_mixed needs a GPU",
            "training.precision=bf16_mixed or fp32 on a CPU",
        ),
        (
            _asks(job, OptionalKernel.FLASH_ATTENTION_2) and no_flash,
            f"{_asked_by(job, OptionalKernel.FLASH_ATTENTION_2)}: {hardware.name} has no FlashAttention-2",
            f"{_without(job, OptionalKernel.FLASH_ATTENTION_2)}, or hardware of compute capability 8.0 and more",
        ),
        (
            pin.activation_checkpointing is Checkpointing.OFFLOAD and on_cpu,
            "planner.pin.activation_checkpointing=offload: a CPU has no other memory to offload to",
            "planner.pin.activation_checkpointing=full",
        ),
    ]


def _objective_limits(job: JobSpec, hardware: HardwareSpec) -> list[Limit]:
    return [
        (
            job.planner.objective is Objective.COST and hardware.price_per_hour is None,
            "planner.objective=cost needs a price, and `hardware.price_per_hour` is not set",
            "hardware.price_per_hour=<US dollars that one device costs per hour>",
        ),
    ]


def _loss_limits(job: JobSpec, hardware: HardwareSpec) -> list[Limit]:
    return [
        (
            _asks(job, OptionalKernel.LIGER) and hardware.kind is DeviceKind.CPU,
            f"{_asked_by(job, OptionalKernel.LIGER)}: Liger's loss is a Triton kernel, and Triton has no CPU",
            f"{_without(job, OptionalKernel.LIGER)}: chunked loss keeps no whole logits either",
        ),
    ]


def _evaluation_limits(job: JobSpec, hardware: HardwareSpec) -> list[Limit]:
    evaluation = job.evaluation
    steps = evaluation.accumulation_steps
    return [
        (
            steps is not None and not evaluation.keep_logits,
            f"evaluation.accumulation_steps={steps} moves kept logits, and evaluation.keep_logits is false",
            "evaluation.keep_logits=true, or leave evaluation.accumulation_steps unset",
        ),
        (
            steps is not None and hardware.kind is DeviceKind.CPU,
            f"evaluation.accumulation_steps={steps}: a CPU has no other memory to move logits to",
            "leave evaluation.accumulation_steps unset, or evaluation.num_examples lower",
        ),
    ]


def _optimizer_limits(job: JobSpec) -> list[Limit]:
    name = job.training.optimizer
    projects = name in LOW_RANK_OPTIMIZERS
    methods = (job.planner.pin.method,) if job.planner.pin.method else job.planner.choices.method
    pinned = job.planner.pin.optimizer
    same = implementations(name)
    adapted = [method.value for method in methods or (job.method.name,) if method is not Method.FULL]
    return [
        (
            pinned is not None and pinned not in same,
            f"planner.pin.optimizer={pinned.value if pinned else ''} makes another update than the job's {name.value}",
            f"planner.pin.optimizer={' or '.join(item.value for item in same)}, or training.optimizer",
        ),
        (
            projects and bool(adapted),
            f"training.optimizer={name.value} projects the gradients of whole matrices; method {', '.join(adapted)} "
            "trains adapters, which have a low rank already",
            "method=full, or training.optimizer=adamw_torch_fused",
        ),
        (
            projects and job.training.save_steps is not None,
            f"training.save_steps={job.training.save_steps} with training.optimizer={name.value}: its state holds "
            "projector objects, and torch.load reads no objects from a checkpoint, so it could not be resumed",
            "leave training.save_steps unset; the trained model is saved all the same",
        ),
    ]


def _offload_limits(job: JobSpec, hardware: HardwareSpec) -> list[Limit]:
    pin = job.planner.pin
    offloaded = [
        f"planner.pin.{name}" for name in ("offload_optimizer", "offload_parameters") if getattr(pin, name)
    ]
    keys = " and ".join(offloaded)
    is_nvme, path = pin.offload_device is OffloadDevice.NVME, hardware.nvme_path
    return [
        (
            pin.engine is Engine.FSDP2 and bool(offloaded),
            f"{keys} with planner.pin.engine=fsdp2: FSDP2's offload needs a GPU, and was never compared with one",
            "planner.pin.engine=deepspeed with planner.pin.zero_stage=3",
        ),
        (
            is_nvme and not pin.offload_optimizer,
            "planner.pin.offload_device=nvme is for optimizer states: what DeepSpeed's swapper of parameters holds in "
            "host memory (0.19.8, partitioned_param_swapper.py) is not predicted",
            "planner.pin.offload_optimizer=true; offloaded parameters stay in host memory",
        ),
        (
            is_nvme and not path.startswith("/"),
            f"planner.pin.offload_device=nvme with hardware.nvme_path={path!r}: it must be the absolute path of a folder "
            "on a local NVMe file system of every node",
            "hardware.nvme_path=/<where the drive is mounted>",
        ),
    ]


def _missing_packages(job: JobSpec, is_installed: Callable[[str], bool]) -> list[Limit]:
    optimizer = job.training.optimizer
    named = f"training.optimizer={optimizer.value}"
    wanted = {
        "liger_kernel": (
            _asked_by(job, OptionalKernel.LIGER),
            _asks(job, OptionalKernel.LIGER),
            "liger",
        ),
        "galore_torch": (named, optimizer.value.startswith("galore_"), "galore"),
        "apollo_torch": (named, optimizer.value.startswith("apollo_"), "apollo"),
    }
    return [
        (
            asked and not is_installed(module),
            f"{key} needs the package {module}, which is not installed",
            f"pip install '{PACKAGE}[{extra}]', from this folder: pip install -e '.[{extra}]'",
        )
        for module, (key, asked, extra) in wanted.items()
    ]
