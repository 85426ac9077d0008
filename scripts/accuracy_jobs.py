"""The jobs of scripts/accuracy: small random models, over methods, shapes, precisions, optimizers and architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripts import small_vision

WIDTHS = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **WIDTHS},
    "gemma": {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 6000,
        "max_position_embeddings": 4096,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **WIDTHS},
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 8,
        "n_embd": 320,
        "n_head": 8,
        "n_positions": 2048,
        "vocab_size": 8000,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 208,
        "head_dim": 40,
        "tie_word_embeddings": False,
        **WIDTHS,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 40,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        **WIDTHS,
    },
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 6,
        "hidden_size": 320,
        "intermediate_size": 864,
        "moe_intermediate_size": 208,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "vocab_size": 8000,
        "max_position_embeddings": 4096,
    },
}
CLASSIFICATION = "sequence_classification"
VISION = "image_text_to_text"
IMAGES = 2
"""Images of an example."""
ARCHITECTURES |= {"gemma3": small_vision.GEMMA3, "llava": small_vision.LLAVA}
EAGER_ONLY = ("gpt_oss",)
"""Architectures for which transformers has no sdpa (attention sinks)."""


@dataclass(frozen=True)
class AccuracyJob:
    """One row of the table."""

    architecture: str
    method: str
    checkpointing: str
    micro_batch_size: int
    length: int
    accumulation: int = 1
    precision: str = "fp32"
    loss: str = "chunked"
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    packing: bool = True
    evaluation: bool = False
    keep_logits: int = 0
    """Evaluation batches whose logits are kept; 0: none."""
    save: bool = False
    new_tokens: int = 0
    """Tokens generated per prompt at the end; 0: none."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further keys of the method."""
    task: str = "causal_lm"
    """What the model is trained to do."""

    @property
    def name(self) -> str:
        """The job in words; what is usual goes without saying."""
        unusual = [
            word
            for word, usual in (
                (self.loss, "chunked"),
                (self.optimizer, "adamw_torch_fused"),
                (self.attention, "sdpa"),
                (self.task, "causal_lm"),
            )
            if word != usual
        ]
        unusual += [f"{key}={value}" for key, value in self.options]
        unusual += [f"keep_logits={self.keep_logits}"] if self.keep_logits else []
        unusual += [f"generate={self.new_tokens}"] if self.new_tokens else []
        flags = {"padded": not self.packing, "evaluation": self.evaluation, "save": self.save}
        unusual += [flag for flag, on in flags.items() if on]
        words = [self.architecture, self.method, f"checkpointing={self.checkpointing}", self.precision]
        shape = f"{self.micro_batch_size}x{self.length}"
        words += [*unusual, shape if self.accumulation == 1 else f"{shape}x{self.accumulation}"]
        return " ".join(words)


JOBS = (
    # full fine-tuning and LoRA, over shapes, checkpointing and precisions
    AccuracyJob("llama", "lora", "none", 4, 128, precision="bf16"),
    AccuracyJob("llama", "full", "full", 2, 640, 2),
    AccuracyJob("llama", "qlora", "full", 2, 640),
    AccuracyJob("gemma", "lora", "none", 2, 640),
    AccuracyJob("gemma", "full", "none", 4, 128, precision="bf16", optimizer="adamw_8bit"),
    AccuracyJob("qwen2", "lora", "full", 3, 333, 3, packing=False, evaluation=True),
    AccuracyJob("gpt2", "full", "none", 2, 256, optimizer="adafactor"),
    AccuracyJob("qwen3_moe", "full", "none", 2, 192),
    AccuracyJob("llama", "lora", "full", 2, 512, loss="plain", options=(("use_dora", True),)),
    AccuracyJob("llama", "qlora", "none", 2, 512, precision="bf16", options=(("kbit_preparation", True),)),
    AccuracyJob("gpt_oss", "lora", "full", 2, 256, attention="eager"),
    AccuracyJob("deepseek", "lora", "full", 2, 256),
    # the first twelve are what continuous integration runs
    AccuracyJob("llama", "lora", "full", 2, 640),
    AccuracyJob("llama", "full", "none", 2, 640, 2),
    AccuracyJob("llama", "full", "full", 16, 288),
    AccuracyJob("llama", "lora", "none", 1, 1536),
    AccuracyJob("llama", "full", "full", 4, 128, precision="bf16_mixed"),
    AccuracyJob("llama", "lora", "none", 2, 320, precision="bf16_mixed"),
    AccuracyJob("llama", "full", "none", 2, 192, precision="bf16"),
    AccuracyJob("llama", "full", "selective", 2, 640),
    AccuracyJob("llama", "lora", "selective", 2, 640, 2),
    AccuracyJob("llama", "lora", "full", 3, 333, 3, loss="plain"),
    AccuracyJob("llama", "full", "none", 4, 320, loss="plain", evaluation=True),
    AccuracyJob("llama", "lora", "none", 2, 512, attention="eager"),
    AccuracyJob("llama", "full", "full", 3, 400, packing=False, evaluation=True, save=True),
    AccuracyJob("llama", "full", "none", 2, 256, save=True),
    AccuracyJob("llama", "lora", "full", 2, 200, new_tokens=160),
    AccuracyJob("gemma", "lora", "full", 1, 320, evaluation=True, new_tokens=200),
    AccuracyJob("qwen3_moe", "lora", "none", 1, 128, new_tokens=60),
    AccuracyJob("deepseek", "full", "full", 2, 128, new_tokens=60),
    # adapters
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("use_dora", True),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("use_rslora", True), ("dropout", 0.1))),
    AccuracyJob("llama", "lora", "none", 2, 384, options=(("dropout", 0.05),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("modules_to_save", ("embed_tokens", "lm_head")),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("target_modules", ("q_proj", "v_proj")),)),
    AccuracyJob(
        "llama", "lora", "full", 2, 256, precision="bf16", options=(("adapter_dtype", "base"),), save=True
    ),
    # quantised
    AccuracyJob("llama", "qlora", "full", 2, 640, 2, options=(("double_quantization", False),)),
    AccuracyJob("llama", "qlora", "full", 2, 512, options=(("quantization", "fp4"),)),
    AccuracyJob("llama", "qlora", "full", 2, 512, options=(("quantization", "int8"),)),
    AccuracyJob("llama", "qlora", "none", 2, 256, options=(("quantization", "int8"),)),
    AccuracyJob("gemma", "qlora", "full", 2, 512),
    AccuracyJob("gemma", "qlora", "none", 2, 256, optimizer="paged_adamw_8bit"),
    AccuracyJob("qwen2", "qlora", "full", 4, 256, packing=False, loss="plain", evaluation=True),
    AccuracyJob("qwen2", "qlora", "none", 2, 256, options=(("use_dora", True),)),
    AccuracyJob("llama", "qlora", "full", 2, 256, precision="bf16", save=True),
    AccuracyJob("gpt2", "qlora", "full", 2, 256),
    # optimizers
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adamw_torch"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adamw_8bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="paged_adamw_32bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="lion_8bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="lion_32bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adafactor"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="sgd"),
    AccuracyJob("gemma", "full", "full", 2, 256, precision="bf16", optimizer="adafactor"),
    # architectures
    AccuracyJob("gemma", "lora", "full", 16, 288, 2),
    AccuracyJob("gemma", "full", "full", 2, 640),
    AccuracyJob("gemma", "full", "none", 1, 2048, loss="plain"),
    AccuracyJob("qwen2", "full", "full", 4, 256),
    AccuracyJob("qwen2", "full", "none", 2, 512, packing=False),
    AccuracyJob("gpt2", "lora", "none", 2, 512),
    AccuracyJob("gpt2", "full", "full", 2, 512, loss="plain"),
    AccuracyJob("qwen3_moe", "lora", "full", 2, 320),
    AccuracyJob("qwen3_moe", "full", "full", 2, 320, optimizer="adamw_8bit"),
    AccuracyJob("gpt_oss", "full", "none", 2, 192, attention="eager"),
    AccuracyJob("deepseek", "full", "none", 2, 192),
    AccuracyJob("deepseek", "qlora", "full", 2, 192),
    # optimizers that project gradients
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="galore_adamw"),
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="galore_adamw", precision="bf16"),
    AccuracyJob("qwen2", "full", "full", 2, 64, optimizer="galore_adafactor", precision="bf16"),
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="apollo_adamw"),
    # evaluation that keeps its logits
    AccuracyJob("llama", "lora", "full", 2, 256, evaluation=True, keep_logits=5),
    AccuracyJob(
        "qwen2",
        "full",
        "full",
        2,
        200,
        precision="bf16",
        loss="plain",
        packing=False,
        evaluation=True,
        keep_logits=3,
    ),
    # tasks
    AccuracyJob("gemma3", "lora", "none", 2, 320, packing=False, evaluation=True, task=VISION),
    AccuracyJob("gemma3", "lora", "full", 2, 320, 2, packing=False, task=VISION),
    AccuracyJob("gemma3", "full", "none", 3, 160, packing=False, loss="plain", task=VISION),
    AccuracyJob("llava", "lora", "none", 2, 320, packing=False, task=VISION),
    AccuracyJob("gemma3", "lora", "none", 2, 320),
    AccuracyJob(
        "llama", "lora", "none", 4, 256, loss="plain", packing=False, evaluation=True, task=CLASSIFICATION
    ),
    AccuracyJob(
        "qwen2", "full", "full", 2, 320, 2, loss="plain", packing=False, evaluation=True, task=CLASSIFICATION
    ),
    AccuracyJob("llama", "lora", "none", 2, 320, precision="bf16_autocast"),
    AccuracyJob("qwen2", "lora", "selective", 4, 256, precision="bf16_autocast"),
    AccuracyJob("llama", "full", "full", 4, 128, precision="bf16_autocast"),
)
NUM_CI_JOBS = 12
NUM_LABELS = 5
