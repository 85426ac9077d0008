"""Models with random weights, built where they will train: nothing is downloaded, and little passes through the host."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from launcher import workload
from launcher.hardware import DeviceKind
from launcher.job import JobSpec
from launcher.plan import Plan

SEED_NUMBERS = 1 << 22
"""How many random numbers are drawn; larger tensors repeat them, because drawing is slow and values do not matter."""
STANDARD_DEVIATION = 0.02


def load_random(config: PretrainedConfig, spec: JobSpec, plan: Plan) -> nn.Module:
    """Loads a model as the launcher does, but from random weights; adapters included.

    Quantised models go through transformers' own loading, tensor by tensor from the host, as from a file.
    Others are made on the device: the launcher loads them into host memory and the trainer moves them, which
    leaves the same tensors on the device. What initialising takes there for a moment, the launcher takes on the host
    (an output layer that is tied afterwards, for one), and the peak of it is forgotten.
    """
    if workload.quantization_config(spec.method, plan) is not None:
        return workload.attach_adapters(_load_quantized(config, spec, plan), spec, plan)
    with torch.device("cpu" if spec.hardware.kind is DeviceKind.CPU else "cuda"):
        model = workload.build_model(config, plan, "", spec)
        if spec.hardware.kind is not DeviceKind.CPU:
            torch.cuda.reset_peak_memory_stats()
        return workload.attach_adapters(model, spec, plan)


def load_stored(folder: Path, spec: JobSpec, plan: Plan) -> nn.Module:
    """Loads a model that `store` wrote, exactly as the launcher does."""
    config = workload.model_config(str(folder), spec.model)
    model = workload.build_model(config, plan, str(folder), spec)
    return workload.attach_adapters(model, spec, plan)


def store(config: PretrainedConfig, spec: JobSpec, plan: Plan, folder: Path) -> None:
    """Writes a model with random weights to a folder."""
    with torch.device("meta"):
        model = workload.build_model(config, plan, "", spec)
    assert isinstance(model, PreTrainedModel)
    state = random_state(model)
    model.save_pretrained(folder, state_dict={name: value.clone() for name, value in state.items()})


def random_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random host tensors for every parameter of a model without data; they share one piece of memory.

    A tied parameter is named once, as in a checkpoint.
    """
    shells = {
        name: shell for name, shell in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    dtype = next(iter(shells.values())).dtype
    drawn = torch.empty(SEED_NUMBERS, dtype=dtype).normal_(0.0, STANDARD_DEVIATION)
    largest = max(shell.numel() for shell in shells.values())
    pool = drawn.repeat(math.ceil(largest / SEED_NUMBERS))
    return {name: pool[: shell.numel()].view(shell.shape).to(shell.dtype) for name, shell in shells.items()}


def _load_quantized(config: PretrainedConfig, spec: JobSpec, plan: Plan) -> nn.Module:
    """As `workload.build_model` with weights, which come from memory and not from a file."""
    with torch.device("meta"):
        shell = workload.build_model(config, plan, "", spec)
    assert isinstance(shell, PreTrainedModel)
    on_cpu = spec.hardware.kind is DeviceKind.CPU
    state = random_state(shell)
    if on_cpu:  # nothing is copied there, and parameters would stay views of one large piece
        state = {name: value.clone() for name, value in state.items()}
    model: nn.Module = type(shell).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=workload.weight_dtype(plan.precision),
        attn_implementation=plan.attention.value,
        quantization_config=workload.quantization_config(spec.method, plan),
        device_map={"": "cpu" if on_cpu else "cuda"},
    )
    return model
