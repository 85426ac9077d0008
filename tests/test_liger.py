"""Liger's fused loss: what its own code allocates on a GPU, and a real run of it through Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import ConfigError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import JobSpec, Loss, PinSpec, PlannerSpec
from launcher.knob_limits import knob_limits
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import Lines, domain_of, symbolic_shape

TOKENS, WIDTH, VOCABULARY = 1000, 64, 8192
TILE = 8  # a 128th (8192 / 64) of the tokens, rounded up
H100 = HardwareSpec(name="h100", kind=DeviceKind.CUDA, supports_flash_attention=True)
T4 = HardwareSpec(name="t4", kind=DeviceKind.CUDA)
LIGER = JobSpec(planner=PlannerSpec(pin=PinSpec(loss=Loss.LIGER)))
ACCURACY = """
import gc, json, sys
import triton.runtime.interpreter as interpreter
run = interpreter.GridExecutor.__call__
def run_and_forget(self, *args, **kwargs):
    run(self, *args, **kwargs)
    gc.collect(1)  # the interpreter holds a kernel's arguments in a cycle; a GPU holds nothing
interpreter.GridExecutor.__call__ = run_and_forget
from scripts import accuracy
gc.freeze()
accuracy.ARCHITECTURES["llama"] |= {"num_hidden_layers": 2, "vocab_size": 500}
job = accuracy.AccuracyJob("llama", "full", "full", 2, 24, loss="liger", evaluation=True)
print(json.dumps(accuracy.run_job(job)))
"""


def births_of_the_loss(hardware: HardwareSpec, dtype: torch.dtype, trained_head: bool) -> list[int]:
    """Bytes of every block that one loss and its backward pass allocate."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    from launcher.planner.cuda_twin import branches
    from launcher.planner.fast_fake import FastFakeTensorMode
    from launcher.planner.liger_twin import gpu_kernels
    from launcher.planner.tape import Tape
    from launcher.planner.worst_case import twins

    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, TOKENS, False, False), twins=twins(), fake=fake)
    with gpu_kernels(hardware), branches(hardware, tape.shape), fake, tape:
        hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, dtype=dtype, requires_grad=trained_head)
        labels = torch.empty(TOKENS, dtype=torch.int64)
        before = len(tape.events)
        loss = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
        (loss / 7).backward()
        return [event.block.num_bytes for event in tape.events[before:] if event.birth]


def test_a_frozen_head_needs_one_tile_of_logits_and_the_gradient_of_its_input() -> None:
    births = births_of_the_loss(H100, torch.bfloat16, trained_head=False)
    assert births.count(TILE * VOCABULARY * 2) == 1  # one buffer for all tiles
    assert births.count(TOKENS * WIDTH * 2) == 1
    assert VOCABULARY * WIDTH * 2 not in births
    assert sum(births) < 2 * TILE * VOCABULARY * 2 + TOKENS * WIDTH * 2


def test_a_trained_heads_gradient_grows_in_place_from_compute_capability_8_on() -> None:
    births = births_of_the_loss(H100, torch.bfloat16, trained_head=True)
    assert births.count(VOCABULARY * WIDTH * 2) == 1
    assert VOCABULARY * WIDTH * 4 not in births


def test_before_that_every_tile_makes_a_product_of_the_weights_size_and_its_fp32_copy() -> None:
    births = births_of_the_loss(T4, torch.float16, trained_head=True)
    tiles = TOKENS // TILE
    assert births.count(VOCABULARY * WIDTH * 2) == 1 + tiles
    assert births.count(VOCABULARY * WIDTH * 4) == tiles


@pytest.mark.parametrize(
    ("tokens", "first", "last"), [(8192, 4097, 8192), (8193, 8193, 16384), (100, 65, 128)]
)
def test_tiles_double_with_the_tokens(tokens: int, first: int, last: int) -> None:
    """Against Triton's own functions, at both ends of the regime."""
    import triton

    def tile(count: int) -> int:
        return int(triton.next_power_of_2(triton.cdiv(count, 32)))

    domain = domain_of(1, tokens, Lines(None, (), (), 32))
    assert (domain.tokens_min, domain.tokens_max) == (first, last)
    assert tile(first) == tile(tokens) == tile(last)
    assert tile(first - 1) == tile(first) // 2 and tile(last + 1) == 2 * tile(last)


def test_the_last_tile_is_never_taken_for_a_symbol() -> None:
    """At 5 x 269 the last of the tiles of 256 has 65 tokens, which 5 divides: another shape is traced."""
    lines = Lines(None, (), (64, 320), 8)
    for batch, length in ((4, 300), (5, 269), (2, 4000), (16, 70)):
        shape = symbolic_shape(domain_of(batch, length, lines), lines)
        assert shape is not None
        tokens = shape.batch * shape.length
        tile = 1 << (-(-tokens // 8) - 1).bit_length()
        rest = tokens % tile
        assert all(
            rest % symbol for symbol in (shape.batch, shape.length - 1, shape.length, shape.length + 1)
        )


def test_a_trace_with_symbols_answers_as_one_of_the_shape_itself(traced: Callable[..., Any]) -> None:
    by_symbols, exact = traced(Loss.LIGER, symbolic=True), traced(Loss.LIGER, symbolic=False)
    for one, other in zip(by_symbols, exact, strict=True):
        assert one.allocated_bytes == pytest.approx(other.allocated_bytes, rel=1e-4)


def test_it_needs_less_than_whole_logits(traced: Callable[..., Any]) -> None:
    liger, plain = (
        max(peak.allocated_bytes for peak in traced(loss, symbolic=False))
        for loss in (Loss.LIGER, Loss.PLAIN)
    )
    assert liger < plain - 4 * 300 * VOCABULARY * 2


@pytest.fixture
def traced() -> Callable[..., Any]:
    from launcher.job import Attention, Checkpointing, DataSpec, Method, ModelSpec, Optimizer, Precision
    from launcher.plan import Plan
    from launcher.planner import trace
    from launcher.workload import model_config

    architecture = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }

    def peaks(loss: Loss, *, symbolic: bool, model_type: str = "llama", targets: Any = "all-linear") -> Any:
        job = JobSpec(model=ModelSpec(architecture=architecture | {"model_type": model_type}))
        job = replace(job, data=DataSpec(packing=True), method=replace(job.method, target_modules=targets))
        plan = Plan(
            method=Method.LORA,
            rank=8,
            max_length=300,
            micro_batch_size=4,
            gradient_accumulation_steps=1,
            activation_checkpointing=Checkpointing.NONE,
            attention=Attention.SDPA,
            loss=loss,
            optimizer=Optimizer.ADAMW_TORCH_FUSED,
            precision=Precision.BF16,
        )
        subject = trace.TraceSubject(job, plan, H100, model_config("", job.model))
        make = trace.trace_regime if symbolic else trace.trace_shape
        return make(subject, 4, 300, 1).peaks(4, 300, 1)

    return peaks


def test_a_model_without_a_kernel_is_refused(traced: Callable[..., Any]) -> None:
    """Transformers would train it with the plain loss and say nothing."""
    with pytest.raises(ConfigError, match=r"no fused loss for starcoder2; it has one for .*llama.*qwen3"):
        traced(Loss.LIGER, symbolic=False, model_type="starcoder2")


def test_an_adapter_on_the_head_is_refused(traced: Callable[..., Any]) -> None:
    """Liger reads the head's own weight: the adapter would never be trained."""
    with pytest.raises(ConfigError, match="the head has an adapter"):
        traced(Loss.LIGER, symbolic=False, targets=("q_proj", "lm_head"))


def test_a_cpu_and_a_missing_package_are_refused() -> None:
    ((what, hint),) = knob_limits(LIGER, HardwareSpec(kind=DeviceKind.CPU), lambda module: True)
    assert "Triton has no CPU" in what and "chunked" in hint
    ((what, hint),) = knob_limits(LIGER, H100, lambda module: module != "liger_kernel")
    assert "liger_kernel" in what and "[liger]" in hint
    assert knob_limits(LIGER, H100, lambda module: True) == ()


def test_the_extra_is_one_of_the_projects() -> None:
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(name.startswith("liger-kernel") for name in project["optional-dependencies"]["liger"])


def test_a_real_run_allocates_what_was_predicted() -> None:
    """Liger's code and kernels for real on a CPU, through Triton's interpreter, under the profiler's eyes."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    child = subprocess.run(
        [sys.executable, "-c", ACCURACY], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    result = json.loads(child.stdout.splitlines()[-1])
    for phase, measured in result["measured_bytes"].items():
        assert result["predicted_bytes"][phase] == pytest.approx(measured, rel=2e-3), phase
