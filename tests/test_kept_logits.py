"""Evaluation that keeps its logits: against the allocator of a real run, and against sums worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
)
from launcher.knob_limits import knob_limits
from launcher.memory import Phase
from launcher.plan import Plan
from launcher.planner.skyline import Skyline
from scripts import accuracy, accuracy_jobs

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 96, 64, 4096
ROW = LENGTH * VOCABULARY * 2  # bf16 logits of one example
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def traced(num_examples: int, kind: DeviceKind = DeviceKind.CUDA, **evaluation: Any) -> Skyline:
    from launcher.planner import trace
    from launcher.workload import model_config

    spec = EvaluationSpec(enabled=True, num_examples=num_examples, **evaluation)
    job = JobSpec(model=ModelSpec(architecture=ARCHITECTURE), data=DataSpec(packing=True), evaluation=spec)
    plan = Plan(
        method=Method.LORA,
        rank=4,
        max_length=LENGTH,
        micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.FULL,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision.BF16,
    )
    subject = trace.TraceSubject(job, plan, HardwareSpec(kind=kind), model_config("", job.model))
    return trace.trace_regime(subject, BATCH, LENGTH, 1)


def evaluation_peak(skyline: Skyline) -> int:
    return next(p.allocated_bytes for p in skyline.peaks(BATCH, LENGTH, 1) if p.phase is Phase.EVALUATION)


def host_peak(skyline: Skyline) -> int:
    assert skyline.host is not None
    return evaluation_peak(skyline.host)


def test_all_logits_are_alive_twice_when_the_last_batch_is_joined() -> None:
    few, many = (evaluation_peak(traced(count, keep_logits=True)) for count in (20, 60))
    # 40 examples more: before joining, and joined; their labels and losses, 8 bytes a token and 4 an example, wait
    assert many - few == 2 * 40 * ROW + 40 * (LENGTH * 8 + 4)


def test_without_keeping_the_number_of_examples_does_not_count() -> None:
    assert evaluation_peak(traced(20)) == evaluation_peak(traced(60))


def test_moving_them_leaves_a_window_on_the_device() -> None:
    """Windows of 10 batches of 2: as if there were 20 examples, and the rest is in host memory as fp32."""
    moved = traced(60, keep_logits=True, accumulation_steps=10)
    # the joined losses, 4 bytes an example, are the only difference
    assert evaluation_peak(moved) == pytest.approx(evaluation_peak(traced(20, keep_logits=True)), abs=512)
    assert host_peak(moved) >= 60 * 2 * ROW + 40 * 2 * ROW  # the last 20 are joined to the 40 before


def test_a_window_of_one_batch_joins_nothing_on_the_device() -> None:
    one, two = (evaluation_peak(traced(60, keep_logits=True, accumulation_steps=steps)) for steps in (1, 2))
    assert two > one


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(
            accuracy_jobs.AccuracyJob("llama", "lora", "full", 2, 64, evaluation=True, keep_logits=5),
            marks=pytest.mark.thorough,
        ),
        accuracy_jobs.AccuracyJob(
            "llama", "full", "none", 2, 64, precision="bf16", loss="plain", evaluation=True, keep_logits=3
        ),
    ],
)
def test_a_real_run_allocates_what_was_predicted(
    job: accuracy_jobs.AccuracyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = accuracy_jobs.ARCHITECTURES["llama"] | {"num_hidden_layers": 2, "vocab_size": 3000}
    monkeypatch.setitem(accuracy_jobs.ARCHITECTURES, "llama", smaller)
    result = accuracy.run_job(job)
    measured = result["measured_bytes"]["evaluation"]
    assert result["predicted_bytes"]["evaluation"] == pytest.approx(measured, rel=2e-3)


def test_the_metric_counts_what_has_a_label() -> None:
    """Four of the five labels that count are guessed; each guess stands one token before its label."""
    from transformers import EvalPrediction

    from launcher.trainers import token_accuracy

    labels = np.array([[5, 1, 2, 3], [5, 4, -100, 9]])
    guesses = np.array([[1, 2, 3, 0], [4, 7, 8, 0]])
    logits = np.eye(10, dtype=np.float32)[guesses]
    assert token_accuracy(EvalPrediction(logits, labels)) == {"accuracy_of_kept_logits": 0.8}


def test_moving_needs_logits_and_another_memory() -> None:
    cuda, cpu = HardwareSpec(kind=DeviceKind.CUDA), HardwareSpec(kind=DeviceKind.CPU)
    kept = JobSpec(evaluation=EvaluationSpec(enabled=True, keep_logits=True, accumulation_steps=4))
    assert knob_limits(kept, cuda, lambda module: True) == ()
    ((what, _),) = knob_limits(kept, cpu, lambda module: True)
    assert "no other memory" in what
    plain = JobSpec(evaluation=EvaluationSpec(enabled=True, accumulation_steps=4))
    ((what, _),) = knob_limits(plain, cuda, lambda module: True)
    assert "evaluation.keep_logits is false" in what


def test_the_key_is_one_of_the_command_line() -> None:
    from launcher.config import load_job

    job = load_job(["evaluation=held_out", "evaluation.keep_logits=true", "evaluation.accumulation_steps=8"])
    assert job.evaluation.keep_logits and job.evaluation.accumulation_steps == 8
