"""What the code behind published measurements did otherwise than today's libraries, put back for one trace.

A prediction is for the libraries that are installed. A measurement of 2024 is of those of 2024, often with
kernels of other projects. Each difference here was read in the source that its text names, and can be put
back while a job is traced: what is left between prediction and measurement then is the tracer's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Any

import torch
import transformers.integrations.flash_attention as flash_attention
import transformers.models.granite.modeling_granite as granite
import transformers.models.llama.modeling_llama as llama
import transformers.models.mistral.modeling_mistral as mistral
from torch import nn
from torch.autograd import Function
from torch.nn import functional
from transformers.loss.loss_utils import LOSS_MAPPING

from launcher import workload
from launcher.planner.replaced import replaced


class Difference(StrEnum):
    """One thing that a row's code did otherwise."""

    SHIFTED_LOGITS = "shifted logits"
    IN_PLACE_CROSS_ENTROPY = "in-place cross entropy"
    FUSED_NORM = "fused norm"
    FUSED_ROTARY = "fused rotary embedding"
    FUSED_LORA = "fused LoRA"
    REENTRANT_CHECKPOINTING = "reentrant checkpointing"
    REPEATED_KEYS = "repeated keys and values"
    FP32_ADAPTERS = "fp32 adapters"
    BF16_EMBEDDINGS = "bf16 embeddings"


TEXTS = {
    Difference.SHIFTED_LOGITS: (
        "transformers 4.45.2 turned the logits into fp32 at once and copied them without the last position "
        "(`LlamaForCausalLM.forward`, and Granite's and Mistral's); since then the labels are shifted, not "
        "the logits (`loss_utils.ForCausalLMLoss`). Both hold 12 bytes per logit at the highest moment, but "
        "the old code in the forward pass, with the last hidden states beside them, the new one in the "
        "backward pass, without"
    ),
    Difference.IN_PLACE_CROSS_ENTROPY: (
        "fms-acceleration's cross entropy writes the gradient over the shifted logits "
        "(`Fast_CrossEntropyLoss` of kernels/unsloth/cross_entropy_loss.py): 8 bytes per logit in place of "
        "12"
    ),
    Difference.FUSED_NORM: (
        "fms-acceleration's RMSNorm keeps its input and one number per token, no fp32 copies, and writes "
        "the gradient over the incoming one (`Fast_RMS_Layernorm`, kernels/unsloth/rms_layernorm.py)"
    ),
    Difference.FUSED_ROTARY: (
        "fms-acceleration's rotary embedding works in place (`Fast_RoPE_Embedding`, "
        "kernels/unsloth/rope_embedding.py)"
    ),
    Difference.FUSED_LORA: (
        "fms-acceleration's LoRA over quantised weights keeps its input, once for query, key and value, and "
        "no dropout masks (`LoRA_QKV` and `LoRA_W`, fused_ops/unsloth_lora/bnb/fast_lora.py)"
    ),
    Difference.REENTRANT_CHECKPOINTING: (
        "transformers 4.45.2 checkpointed with `use_reentrant=True` "
        "(`PreTrainedModel.gradient_checkpointing_enable`), which holds a recomputed layer's output during "
        "its backward pass; the default is False now"
    ),
    Difference.REPEATED_KEYS: (
        "Mistral's FlashAttention-2 of transformers 4.45.2 repeated keys and values for every query head "
        "(`MistralFlashAttention2.forward`); Llama's did not, and today none does"
    ),
    Difference.FP32_ADAPTERS: (
        "trl 0.11.4 left QLoRA's adapters in fp32; 1.16 turns them to bf16 (`SFTTrainer.__init__`)"
    ),
    Difference.BF16_EMBEDDINGS: (
        "trl 0.11.4 turned the embeddings back to bf16 after PEFT's k-bit preparation "
        "(`peft_module_casting_to_bf16`); 1.16 leaves them in fp32"
    ),
}
"""What each difference is, and where it was read (wheels of the named versions; fms-acceleration 0.7.4)."""
MODELLING = (granite, llama, mistral)
NORMS = (granite.GraniteRMSNorm, llama.LlamaRMSNorm, mistral.MistralRMSNorm)


@contextmanager
def put_back(differences: Set[Difference]) -> Iterator[None]:
    """Puts differences back while it is open."""
    with ExitStack() as stack:
        if Difference.SHIFTED_LOGITS in differences:
            stack.enter_context(_loss(functional.cross_entropy))
        if Difference.IN_PLACE_CROSS_ENTROPY in differences:
            stack.enter_context(_loss(_in_place_cross_entropy))
        if Difference.FUSED_NORM in differences:
            for norm in NORMS:
                stack.enter_context(replaced(norm, "forward", _fused_norm))
        if Difference.FUSED_ROTARY in differences:
            for module in MODELLING:
                stack.enter_context(replaced(module, "apply_rotary_pos_emb", _fused_rotary))
        if Difference.FUSED_LORA in differences:
            stack.enter_context(replaced(nn.Dropout, "forward", _dropout_without_mask))
        if Difference.REENTRANT_CHECKPOINTING in differences:
            stack.enter_context(_reentrant_checkpointing())
        if Difference.REPEATED_KEYS in differences:
            stack.enter_context(_repeated_keys())
        changes = [change for kind, change in MODEL_CHANGES.items() if kind in differences]
        stack.enter_context(_changed_after_building(changes))
        yield


@contextmanager
def bf16_weights_under_autocast() -> Iterator[None]:
    """Makes the mixed precisions hold bf16 weights: `torch_dtype=bfloat16` together with `bf16=True`.

    PEFT's quantised layers ask, without naming a device, whether CUDA autocasts (lora/bnb.py); traced on the
    fake CPU they must hear what a GPU would say.
    """
    known = torch.is_autocast_enabled

    def is_enabled(device_type: str = "cpu") -> bool:
        return known(device_type)

    with (
        replaced(workload, "weight_dtype", lambda precision: torch.bfloat16),
        replaced(torch, "is_autocast_enabled", is_enabled),
    ):
        yield


@contextmanager
def _loss(cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The causal loss of transformers 4.45.2 around a cross entropy."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **rest: Any) -> torch.Tensor:
        shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
        return cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))

    known = LOSS_MAPPING["ForCausalLM"]
    LOSS_MAPPING["ForCausalLM"] = loss
    try:
        with _changed_after_building([_fp32_logits]):
            yield
    finally:
        LOSS_MAPPING["ForCausalLM"] = known


def _fp32_logits(model: nn.Module) -> None:
    """Turns the head's output to fp32 before anything holds the bf16 one."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # every model has one
    head.register_forward_hook(lambda module, inputs, logits: logits.float())


class _InPlaceCrossEntropy(Function):
    """Allocates a loss and a log-sum-exp per token; its gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        ctx.save_for_backward(logits, torch.empty_like(losses), labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def _in_place_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = _InPlaceCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses.sum() / torch.count_nonzero(labels != -100)


class _FusedNorm(Function):
    """Keeps its input and one number per token; its gradient is written over the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _fused_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _FusedNorm.apply(hidden, norm.weight)  # type: ignore[no-untyped-call]
    return output


class _InPlaceRotary(Function):
    """Rotates in place, forward and backward; keeps nothing of its own."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor) -> torch.Tensor:
        return heads.view(heads.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        batch, length, heads, size = gradients[0].shape
        rows = gradients[0].reshape(batch * length, heads * size)  # a copy where the gradient is transposed
        return rows.view(batch, length, heads, size)


def _fused_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(heads: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = _InPlaceRotary.apply(heads.transpose(1, 2))  # type: ignore[no-untyped-call]
        return rotated.transpose(1, 2)

    return rotate(query), rotate(key)


class _DropoutWithoutMask(Function):
    """Keeps its input, which query, key and value share, and its output; zeros of the output are the mask."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _dropout_without_mask(dropout: nn.Dropout, hidden: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _DropoutWithoutMask.apply(hidden)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def _reentrant_checkpointing() -> Iterator[None]:
    known = workload.training_arguments

    def arguments(job: Any, plan: Any, output_dir: Any, changes: Any) -> Any:
        return known(
            job, plan, output_dir, {**changes, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        )

    with replaced(workload, "training_arguments", arguments):
        yield


@contextmanager
def _repeated_keys() -> Iterator[None]:
    name = "_flash_attention_forward"
    known = getattr(flash_attention, name)

    def repeat(heads: torch.Tensor, times: int) -> torch.Tensor:
        batch, length, count, size = heads.shape
        wide = heads.transpose(1, 2)[:, :, None].expand(batch, count, times, length, size)
        return wide.reshape(batch, count * times, length, size).transpose(1, 2)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **named: Any
    ) -> torch.Tensor:
        times = query.shape[2] // key.shape[2]
        output: torch.Tensor = known(query, repeat(key, times), repeat(value, times), *args, **named)
        return output

    with replaced(flash_attention, name, attend):
        yield


@contextmanager
def _changed_after_building(changes: list[Callable[[nn.Module], None]]) -> Iterator[None]:
    """Changes the model once its trainer is built, which is after TRL's own changes."""
    known = workload.build_trainer

    def build(model: nn.Module, *args: Any, **named: Any) -> Any:
        trainer = known(model, *args, **named)
        for change in changes:
            change(model)
        return trainer

    with replaced(workload, "build_trainer", build):
        yield


def _fp32_adapters(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _bf16_embeddings(model: nn.Module) -> None:
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # every model has one
    embeddings.weight.data = embeddings.weight.data.bfloat16()


MODEL_CHANGES: dict[Difference, Callable[[nn.Module], None]] = {
    Difference.FP32_ADAPTERS: _fp32_adapters,
    Difference.BF16_EMBEDDINGS: _bf16_embeddings,
}
"""Differences that are another dtype of weights."""
