"""What published estimators say of a job, each by its own formula, in bytes of one device.

None of them asks for everything that decides memory; what one doesn't ask for can't be held against its
arithmetic, only against its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from accelerate.commands.estimate import (
    estimate_training_usage,
)

from launcher.job import Checkpointing, Method
from launcher.plan import Plan


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model that the formulas ask for."""

    num_parameters: int
    """All weights; tied ones once."""
    largest_layer_parameters: int
    """Weights of the module that has most of its own."""
    backbone_fp32_bytes: int
    """The model without its head, in fp32: what `accelerate estimate-memory` loads (`AutoModel`)."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""


def accelerate_bytes(size: ModelSize, dtype: str) -> int:
    """`accelerate estimate-memory`, "Training using Adam": the largest of model, gradients, optimizer, step.

    Computed by accelerate's own `estimate_training_usage` (commands/estimate.py, 1.15). Its parts coexist in
    a real step, yet their maximum is shown, not their sum: 16 bytes per parameter in `float32`, 8 in
    `float16`.
    """
    return int(max(estimate_training_usage(size.backbone_fp32_bytes, dtype).values()))


def deepspeed_zero2_bytes(size: ModelSize) -> int:
    """DeepSpeed's `estimate_zero2_model_states_mem_needs` on one GPU without offload: 2 P + 18 P.

    deepspeed/runtime/zero/stage_1_and_2.py at 02aa38c: 2 for bf16 weights; 18 for gradients in bf16 and fp32,
    fp32 weights and two fp32 states, divided by the number of GPUs. Every parameter counts as trained.
    """
    return 20 * size.num_parameters


def deepspeed_zero3_bytes(size: ModelSize) -> int:
    """DeepSpeed's `estimate_zero3_model_states_mem_needs`, one GPU, no offload: 4 x largest layer + 18 P.

    deepspeed/runtime/zero/stage3.py, as in public copies of that function (2022 to 2025).
    """
    return 4 * size.largest_layer_parameters + 18 * size.num_parameters


def rule_of_thumb_bytes(size: ModelSize, plan: Plan, trainable_parameters: int) -> int:
    """16 bytes per trained parameter (2 weights, 2 gradients, 12 master weights, states), plus frozen ones.

    "Transformer Math 101" (EleutherAI 2023): model 2 P, gradients 2 P, AdamW 12 P. Frozen weights take 2
    bytes, 4-bit ones half a byte, embeddings included.
    """
    if plan.method is Method.FULL:
        return 16 * size.num_parameters
    frozen = size.num_parameters // 2 if plan.method is Method.QLORA else 2 * size.num_parameters
    return frozen + 16 * trainable_parameters


def transformer_math_bytes(size: ModelSize, plan: Plan, trainable_parameters: int) -> int:
    """`rule_of_thumb_bytes` and the activations of "Transformer Math 101".

    With recomputation 2 s b h L, without it s b h L (10 + 24 + 5 a s / h) for tensor parallelism 1
    (Korthikanti et al. 2022, section 4). Logits and everything of the recomputed layer are not in it.
    """
    tokens = plan.micro_batch_size * plan.max_length
    stream = tokens * size.hidden_size * size.num_layers
    if plan.activation_checkpointing is Checkpointing.NONE:
        activations = 34 * stream + 5 * size.num_heads * plan.max_length * tokens * size.num_layers
    else:
        activations = 2 * stream
    return rule_of_thumb_bytes(size, plan, trainable_parameters) + activations
