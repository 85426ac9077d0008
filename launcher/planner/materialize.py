"""Loading on fake tensors: puts fake weights in place of those of a model on the meta device."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key

from launcher import workload
from launcher.planner.tape import ON_DEVICE


def quantized_layers() -> Any:
    """What knows bitsandbytes; importing it takes a second that most jobs need not wait."""
    return importlib.import_module("launcher.planner.quantized")


def weight_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, and the scales that belong to quantised ones."""
    return with_scales(list(model.parameters()))


def with_scales(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """These parameters, and the scales of those among them that are quantised."""
    return parameters + [scale for parameter in parameters for scale in workload.scales_of(parameter)]


def materialize(
    model: nn.Module,
    *,
    adapters_as_base: bool,
    prepared: bool,
    on_gpu: bool,
    shard: Callable[[nn.Parameter], None] | None = None,
    device: torch.device = ON_DEVICE,
) -> None:
    """Puts fake tensors on the fake device in place of parameters and buffers; shared ones stay shared.

    In the order in which weights are loaded: the base model's by name, adapters afterwards. On the meta device PEFT
    leaves adapters in fp32; `adapters_as_base` gives them the dtype of the base model, as it does elsewhere.
    `prepared` for k-bit training, the base model is there in its own dtype before it is turned to fp32. `shard` takes
    each weight of the base model as it comes, and leaves a rank's part of it. `device` is where weights are read to.
    """
    fakes: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    places = [
        (f"{path}.{name}", module, name) for path, module in modules.items() for name in module._parameters
    ]
    names = [place for place in places if place[1]._parameters[place[2]] is not None]
    dtype: Any = model.config.dtype
    copies = _copies_by_pattern(model, on_gpu=on_gpu)
    to_cast: list[nn.Parameter] = []
    for full, module, name in sorted(
        names, key=lambda item: (_is_adapter(item[0]), dot_natural_key(item[0]))
    ):
        if _is_adapter(full):
            _cast_prepared(to_cast)
        parameter = module._parameters[name]
        assert parameter is not None  # listed above
        if id(parameter) not in fakes:
            waiting = [
                torch.empty(parameter.shape, dtype=dtype, device=device)
                for pattern, count in copies.items()
                for _ in range(count if pattern.search(full) else 0)
            ]
            adapter_dtype = dtype if adapters_as_base and _is_adapter(full) else parameter.dtype
            if _is_quantized(module, name, parameter):
                fake = quantized_layers().quantize_weight(module, dtype)
            else:
                is_cast = prepared and not _is_adapter(full) and parameter.dtype != dtype
                bare = torch.empty(parameter.shape, dtype=dtype if is_cast else adapter_dtype, device=device)
                fake = nn.Parameter(bare, requires_grad=parameter.requires_grad)
                del bare
                to_cast += [fake] if is_cast else []
            fakes[id(parameter)] = fake
            del waiting
            if shard is not None and not _is_adapter(full):
                shard(fake)
        module._parameters[name] = fakes[id(parameter)]
    _cast_prepared(to_cast)
    for module in modules.values():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    # Fake parameters are in place; torch can't swap fake tensors, which moving a module asks for.
    model.to = lambda *args, **kwargs: model  # type: ignore[method-assign]


def forget_weights(model: nn.Module) -> nn.Module:
    """Leaves shapes on the meta device in the place of parameters and buffers, as `model.to("meta")` does."""
    shapes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in shapes:
                    bare = torch.empty_like(parameter, device="meta")
                    shapes[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
                module._parameters[name] = shapes[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
    return model


def _cast_prepared(parameters: list[nn.Parameter]) -> None:
    """What `prepare_model_for_kbit_training` did on the meta device; empties the list."""
    while parameters:
        parameter = parameters.pop(0)
        parameter.data = parameter.data.to(torch.float32)


def _copies_by_pattern(model: nn.Module, *, on_gpu: bool) -> dict[re.Pattern[str], int]:
    """How many copies of a weight exist while it is put together from several tensors of a checkpoint, by its name.

    One for each operation but the last (experts are stacked, then joined: transformers 5.23, conversion_mapping.py and
    core_model_loading.py), and on a GPU one of the tensors read, which on a CPU are views of the file.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    converters = [item for item in get_model_conversion_mapping(base) if isinstance(item, WeightConverter)]
    return {
        re.compile(target.replace(".", r"\.").replace("*", r"\d+")): len(item.operations) - 1 + on_gpu
        for item in converters
        for target in item.target_patterns
    }


def initialize_dora(model: nn.Module) -> None:
    """Repeats on fake tensors what PEFT did on the meta device: the norms of weights and adapters together."""
    for module in model.modules():
        adapted: Any = module
        for name, layer in getattr(adapted, "lora_magnitude_vector", {}).items():
            if isinstance(layer, DoraLinearLayer):
                with torch.no_grad():
                    layer.update_layer(
                        base_layer=adapted.get_base_layer(),
                        lora_A=adapted.lora_A[name].weight,
                        lora_B=adapted.lora_B[name].weight,
                        scaling=adapted.scaling[name],
                    )


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _is_quantized(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight is to be quantised; plain parameters never are, and need no bitsandbytes to know it."""
    return (
        type(parameter) is not nn.Parameter
        and name == "weight"
        and bool(quantized_layers().is_quantized(module))
    )
