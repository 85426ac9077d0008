"""Methods and knobs, each traced: what they take and what they save, against sums worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    AdapterDtype,
    Attention,
    Checkpointing,
    DataSpec,
    GenerationSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    Quantization,
    TrainingSpec,
)
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner import cuda_twin, trace
from launcher.planner.polynomial import TracedShape
from launcher.planner.skyline import Skyline
from launcher.workload import model_config

BATCH, LENGTH, LAYERS, WIDTH, VOCABULARY = 2, 512, 4, 64, 512
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LINEAR = (64 * 64, 32 * 64, 32 * 64, 64 * 64, 192 * 64, 192 * 64, 192 * 64)
"""Weights of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
OUTSIDE = 2 * VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
"""Weights that are never quantised: embeddings, head and norms."""
ADAPTERS = 16 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 192, 64 + 192, 192 + 64)) * LAYERS
"""Weights of rank-16 adapters on every linear layer."""
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def traced(
    method: Method = Method.LORA,
    *,
    kind: DeviceKind = DeviceKind.CUDA,
    architecture: dict[str, Any] | None = None,
    options: MethodSpec | None = None,
    generation: GenerationSpec | None = None,
    packing: bool = True,
    batch: int = BATCH,
    **knobs: Any,
) -> Skyline:
    """The skyline of one shape of a job."""
    job = JobSpec(
        model=ModelSpec(architecture=architecture or LLAMA),
        method=options or MethodSpec(),
        data=DataSpec(packing=packing),
        training=TrainingSpec(max_steps=2, report_to=()),
        generation=generation or GenerationSpec(),
    )
    chosen = {
        "activation_checkpointing": Checkpointing.NONE,
        "attention": Attention.SDPA,
        "loss": Loss.CHUNKED,
        "optimizer": Optimizer.ADAMW_TORCH_FUSED,
        "precision": Precision.BF16,
        **knobs,
    }
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 16,
        max_length=LENGTH,
        micro_batch_size=batch,
        gradient_accumulation_steps=1,
        **chosen,
    )
    hardware = HardwareSpec(kind=kind, supports_flash_attention=True)
    subject = trace.TraceSubject(job, plan, hardware, model_config("", job.model))
    return trace.trace_shape(subject, batch, LENGTH, 1)


def peak(skyline: Skyline, phase: Phase = Phase.TRAIN_STEP, batch: int = BATCH) -> int:
    """Peak of a phase, bytes."""
    return next(p.allocated_bytes for p in skyline.peaks(batch, LENGTH, 1) if p.phase is phase)


def resident(skyline: Skyline, category: Category) -> int:
    """Full size of a resident category, bytes."""
    return skyline.resident_bytes(BATCH, LENGTH)[category]


def scales(weights: int, *, double: bool) -> int:
    """Bytes of the scales of a 4-bit matrix: one per 64 weights, fp32; or 8 bits, and an fp32 one per 256 of them."""
    blocks = -(-weights // 64)
    return blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_have_the_bytes_of_the_format(double: bool) -> None:
    skyline = traced(Method.QLORA, options=MethodSpec(double_quantization=double))
    # beside every matrix the 16 values of the format, fp32, and the 256 that 8-bit scales stand for
    tables = (64 + (1024 if double else 0)) * len(LINEAR) * LAYERS
    packed = sum(weights // 2 + scales(weights, double=double) for weights in LINEAR) * LAYERS
    # TRL holds the adapters of quantised models in bf16
    assert resident(skyline, Category.PARAMETERS) == packed + tables + 2 * OUTSIDE + 2 * ADAPTERS
    assert resident(skyline, Category.GRADIENTS) == 2 * ADAPTERS


def test_eight_bit_weights_have_a_scale_per_row() -> None:
    skyline = traced(Method.QLORA, options=MethodSpec(quantization=Quantization.INT8))
    rows = 64 + 32 + 32 + 64 + 192 + 192 + 64
    quantized = (sum(LINEAR) + 4 * rows) * LAYERS
    assert resident(skyline, Category.PARAMETERS) == quantized + 2 * OUTSIDE + 2 * ADAPTERS


def test_kbit_preparation_doubles_what_is_not_quantised() -> None:
    plain, prepared = (
        traced(Method.QLORA, options=MethodSpec(kbit_preparation=prepares)) for prepares in (False, True)
    )
    grown = resident(prepared, Category.PARAMETERS) - resident(plain, Category.PARAMETERS)
    assert grown == 2 * OUTSIDE


def test_adapters_are_fp32_unless_asked_otherwise() -> None:
    wide, narrow = (traced(options=MethodSpec(adapter_dtype=dtype)) for dtype in AdapterDtype)
    assert resident(wide, Category.GRADIENTS) == 4 * ADAPTERS
    assert resident(narrow, Category.GRADIENTS) == 2 * ADAPTERS
    assert resident(narrow, Category.OPTIMIZER_STATE) < resident(wide, Category.OPTIMIZER_STATE)


def test_dora_adds_one_size_per_output() -> None:
    plain, dora = (traced(options=MethodSpec(use_dora=uses)) for uses in (False, True))
    outputs = (64 + 32 + 32 + 64 + 192 + 192 + 64) * LAYERS
    # the sizes keep the weights' dtype, whatever the adapters' (peft/tuners/lora/dora.py)
    grown = resident(dora, Category.GRADIENTS) - resident(plain, Category.GRADIENTS)
    assert grown in (2 * outputs, 4 * outputs)


def test_modules_to_save_are_copied_and_trained() -> None:
    skyline = traced(options=MethodSpec(modules_to_save=("lm_head",)))
    plain = traced()
    grown = resident(skyline, Category.GRADIENTS) - resident(plain, Category.GRADIENTS)
    assert grown in (2 * VOCABULARY * WIDTH, 4 * VOCABULARY * WIDTH)
    assert resident(skyline, Category.PARAMETERS) - resident(plain, Category.PARAMETERS) == grown


def test_who_asks_whether_cuda_autocasts_hears_what_a_gpu_would_say() -> None:
    """PEFT's quantised layers ask, and cast their input where nothing autocasts."""
    shape = TracedShape(2, 64, batch_is_symbol=False, length_is_symbol=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_autocast_enabled()
        with cuda_twin.branches(HardwareSpec(kind=DeviceKind.CUDA), shape):
            assert torch.is_autocast_enabled()
            assert torch.is_autocast_enabled("cuda")
    with cuda_twin.branches(HardwareSpec(kind=DeviceKind.CUDA), shape):
        assert not torch.is_autocast_enabled()


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [
        (Optimizer.ADAMW_TORCH_FUSED, 4.0),
        (Optimizer.ADAMW_TORCH, 4.0),
        (Optimizer.LION_32BIT, 4.0),
        (Optimizer.PAGED_LION_32BIT, 4.0),
        (Optimizer.SGD, 0.0),
    ],
)
def test_optimizer_states_have_their_bytes(optimizer: Optimizer, bytes_per_weight: float) -> None:
    """Torch's keep the weights' dtype, bf16, twice; Lion keeps one fp32. No matrix here is large enough to be paged."""
    skyline = traced(Method.FULL, optimizer=optimizer)
    weights = resident(skyline, Category.PARAMETERS) / 2
    steps = 4 * (3 + 9 * LAYERS)  # torch's counters, one fp32 each
    assert resident(skyline, Category.OPTIMIZER_STATE) == pytest.approx(bytes_per_weight * weights, abs=steps)


def test_paged_states_leave_the_device() -> None:
    """Matrices of 100,000 weights and more: embeddings and head of this vocabulary, two fp32 states each."""
    wide = {**LLAMA, "vocab_size": 4096}
    plain, paged = (
        traced(Method.FULL, optimizer=optimizer, architecture=wide)
        for optimizer in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)
    )
    embeddings, head = 8 * 4096 * WIDTH, 2 * 4096 * WIDTH
    left = resident(plain, Category.OPTIMIZER_STATE) - resident(paged, Category.OPTIMIZER_STATE)
    # transformers keeps the states of embeddings in 32 bits; the head's 8-bit states are paged, their scales are not
    assert left == embeddings + head


def test_offload_keeps_what_layers_start_from_off_the_device() -> None:
    full, offload = (
        traced(Method.FULL, activation_checkpointing=mode)
        for mode in (Checkpointing.FULL, Checkpointing.OFFLOAD)
    )
    held = {
        mode: next(
            p.by_category_bytes[Category.ACTIVATIONS]
            for p in skyline.peaks(BATCH, LENGTH, 1)
            if p.phase is Phase.TRAIN_STEP
        )
        for mode, skyline in (("full", full), ("offload", offload))
    }
    starts = LAYERS * BATCH * LENGTH * WIDTH * 2
    assert held["full"] - held["offload"] == pytest.approx(starts, rel=0.3)
    assert peak(offload) < peak(full)


def test_selective_checkpointing_lies_between_none_and_full() -> None:
    none, selective, full = (
        traced(Method.FULL, activation_checkpointing=mode)
        for mode in (Checkpointing.NONE, Checkpointing.SELECTIVE, Checkpointing.FULL)
    )
    assert peak(none) > peak(selective) >= peak(full)
    # attention's output and fp32 log-sum-exp of every layer but the one at work
    kept = BATCH * LENGTH * (WIDTH * 2 + 4 * 4)
    assert peak(selective) - peak(full) == pytest.approx((LAYERS - 1) * kept, rel=0.4)


def test_flash_attention_2_takes_what_torchs_flash_kernel_takes() -> None:
    assert peak(traced(attention=Attention.FLASH_ATTENTION_2)) == peak(traced(attention=Attention.SDPA))


def test_flash_attention_2_has_no_mask_in_padded_batches() -> None:
    """Padded, sdpa keeps an additive bf16 mask of batch x heads x length x length; FlashAttention-2 drops the padding."""
    padded = traced(packing=False)
    dropped = traced(packing=False, attention=Attention.FLASH_ATTENTION_2)
    assert peak(padded) - peak(dropped) > BATCH * LENGTH * LENGTH * 2


def test_the_cache_of_generation_can_exceed_the_weights() -> None:
    """The textbook case: Llama-2-7B, batch 8, 4096 tokens: keys and values of 4095 tokens in 32 layers of 4096 x bf16."""
    generation = GenerationSpec(
        enabled=True, num_prompts=8, batch_size=8, prompt_length=2048, max_new_tokens=2048
    )
    skyline = traced(architecture=LLAMA_2_7B, generation=generation, batch=1)
    weights = skyline.resident_bytes(1, LENGTH)[Category.PARAMETERS]
    cache = 2 * 32 * 4096 * 2 * 8 * 4095
    without = peak(skyline, Phase.SAVE, batch=1)
    grown = peak(skyline, Phase.GENERATION, batch=1) - without
    assert cache > weights > 12.5 * 2**30
    assert cache <= grown <= 1.05 * cache


def test_generation_of_sliding_layers_keeps_a_window() -> None:
    window = 64
    sliding = {
        **LLAMA,
        "model_type": "mistral",
        "sliding_window": window,
    }
    generation = GenerationSpec(
        enabled=True, num_prompts=4, batch_size=4, prompt_length=32, max_new_tokens=1000
    )
    short, long = (
        peak(traced(architecture=architecture, generation=generation), Phase.GENERATION)
        for architecture in (sliding, LLAMA)
    )
    per_token = 2 * LAYERS * 2 * 16 * 2 * 4  # keys and values, layers, heads, size, bf16, prompts
    assert long - short == pytest.approx((1030 - window) * per_token, rel=0.2)


def test_an_attention_that_a_cpu_lacks_is_an_error() -> None:
    with pytest.raises(UnsupportedByPlanner, match="flash_attention_2"):
        traced(kind=DeviceKind.CPU, attention=Attention.FLASH_ATTENTION_2)
