"""Merging: adapters become part of the weights, and the model stands alone. Traced AND run, as the workload is.

A quantised model is put back to full weights first. PEFT would merge into 4 bits, and quantise the sum again: then
the merged model answers differently from the one that was trained. The weights that 4 or 8 bits stand for plus what
the adapters add give the same answers, in a model that needs no bitsandbytes, and that is as large as an unquantised
one.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import dora as peft_dora
from torch import nn
from transformers.pytorch_utils import Conv1D


def merge_adapters(model: Any) -> Any:
    """Merges LoRA adapters into the weights, in place, and drops them.

    Args:
        model: A `PeftModel`; not to be used afterwards.

    Returns:
        The transformers model below it, whose weights have the dtype that the config names.
    """
    base = model.get_base_model()
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        _restore_weights(model, base.config.dtype)
    merged = model.merge_and_unload()
    if quantizer is not None:
        quantizer.remove_quantization_config(merged)
        for tensor in (*merged.parameters(), *merged.buffers()):
            # k-bit preparation and TRL have turned some to other dtypes; buffers are fp32 on purpose
            if isinstance(tensor, nn.Parameter) and tensor.dtype != base.config.dtype:
                tensor.data = tensor.data.to(base.config.dtype)
    merged.config.get_text_config().use_cache = True  # it was off for training
    return merged


def drop_optimizer(trainer: Any) -> None:
    """Gives back what the optimizer keeps; training is over, and merging needs the room."""
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()


def _restore_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts plain layers in place of quantised ones, adapted or not; biases stay the same objects."""
    quantized = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "source_cls") and type(module).__module__.startswith("bitsandbytes.")
    ]
    for name in quantized:
        module: Any = model.get_submodule(name)
        model.set_submodule(name, _plain_layer(module, dtype))
        # layer and weight refer to each other: without this they would wait for the garbage collector
        module.weight = module.quant_state = module.state = None
    modules: list[Any] = list(model.modules())
    for adapted in modules:
        if issubclass(type(adapted), LoraLayer) and type(adapted).__module__.endswith(".bnb"):
            # PEFT's class for plain layers merges into plain weights, and keeps its adapters under the same names
            adapted.__class__ = AdaptedLinear
            adapted.fan_in_fan_out = isinstance(adapted.get_base_layer(), Conv1D)
            adapted.is_target_conv_1d_layer = adapted.fan_in_fan_out


def _plain_layer(module: Any, dtype: torch.dtype) -> Any:
    """A layer of the class that was quantised, with the weights that the quantised ones stand for."""
    weight = peft_dora.dequantize_module_weight(module).detach().to(dtype)  # type: ignore[attr-defined]
    is_transposed = issubclass(module.source_cls, Conv1D)
    # smallest layers of their classes, given the weights: nothing of their own size is made on the way
    layer: Any = Conv1D(1, 1) if is_transposed else nn.Linear(1, 1, bias=False)
    if is_transposed:
        layer.nx, layer.nf = module.in_features, module.out_features
    else:
        layer.in_features, layer.out_features = module.in_features, module.out_features
    layer.weight = nn.Parameter(weight.T.contiguous() if is_transposed else weight, requires_grad=False)
    layer.bias = module.bias
    return layer
