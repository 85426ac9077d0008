"""Merged models against the adapted ones that they come from: plain transformers loads them, and they answer the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from launcher import workload
from launcher.job import (
    Attention,
    Checkpointing,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    Quantization,
)
from launcher.merge import merge_adapters
from launcher.plan import Plan

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 256,
}
MOE: dict[str, Any] = {
    **UNTIED,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}
CASES: dict[str, tuple[dict[str, Any], Method, MethodSpec]] = {
    "lora": (LLAMA, Method.LORA, MethodSpec()),
    "rslora of gpt2": (GPT2, Method.LORA, MethodSpec(use_rslora=True)),
    "dora": (UNTIED, Method.LORA, MethodSpec(use_dora=True)),
    "trained embeddings": (UNTIED, Method.LORA, MethodSpec(modules_to_save=("embed_tokens", "lm_head"))),
    "experts": (MOE, Method.LORA, MethodSpec()),
    "nf4": (LLAMA, Method.QLORA, MethodSpec()),
    "nf4 of some layers": (UNTIED, Method.QLORA, MethodSpec(target_modules=("q_proj", "v_proj"))),
    "nf4 of gpt2": (GPT2, Method.QLORA, MethodSpec()),
    "nf4 with dora": (UNTIED, Method.QLORA, MethodSpec(use_dora=True)),
    "nf4 with trained head": (UNTIED, Method.QLORA, MethodSpec(modules_to_save=("lm_head",))),
    "int8": (UNTIED, Method.QLORA, MethodSpec(quantization=Quantization.INT8)),
}
TOKENS = torch.arange(2, 34).reshape(2, 16)


def adapted_model(folder: Path, case: str, precision: Precision = Precision.FP32) -> Any:
    """A loaded model whose adapters are not zero."""
    architecture, method, options = CASES[case]
    job = JobSpec(model=ModelSpec(architecture=architecture), method=options)
    plan = Plan(
        method=method,
        rank=4,
        max_length=16,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=precision,
    )
    torch.manual_seed(0)
    config = workload.model_config("", job.model)
    AutoModelForCausalLM.from_config(config, dtype=workload.weight_dtype(precision)).save_pretrained(folder)
    loaded = workload.build_model(workload.model_config(str(folder), job.model), plan, str(folder), job)
    model = workload.attach_adapters(loaded, job, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=TOKENS).logits.float()
    return answer


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_stands_alone_and_answers_the_same(case: str, tmp_path: Path) -> None:
    model = adapted_model(tmp_path / "weights", case)
    adapted = logits(model)
    model.disable_adapter_layers()
    unadapted = logits(model)
    model.enable_adapter_layers()
    merge_adapters(model).save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["use_cache"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    difference = (logits(reloaded) - adapted).abs().max()
    # int8 rounds activations too, which a plain model doesn't
    limit = 0.05 if case == "int8" else 1e-4
    assert difference < limit * adapted.abs().max()
    assert difference < 0.1 * (unadapted - adapted).abs().max()


def test_what_kbit_preparation_turned_to_fp32_is_saved_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    CASES["prepared"] = (UNTIED, Method.QLORA, MethodSpec(kbit_preparation=True))
    model = adapted_model(tmp_path / "weights", "prepared", Precision.BF16)
    assert model.get_base_model().lm_head.weight.dtype is torch.float32
    merge_adapters(model).save_pretrained(tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no mapping
    assert dtypes == {"BF16"}
