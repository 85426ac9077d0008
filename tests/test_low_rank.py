"""GaLore and APOLLO: against the allocator of real runs, sums worked by hand, and the library that reads checkpoints."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    ChoicesSpec,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    PlannerSpec,
    Precision,
    TrainingSpec,
)
from launcher.knob_limits import knob_limits
from launcher.memory import Category
from launcher.plan import Plan
from scripts import accuracy, accuracy_jobs

WIDTH, INNER, LAYERS, VOCABULARY, RANK = 64, 192, 2, 512, 8
CUDA = HardwareSpec(kind=DeviceKind.CUDA, supports_flash_attention=True)


def full_job(optimizer: Optimizer, **training: Any) -> JobSpec:
    return JobSpec(
        method=MethodSpec(name=Method.FULL), training=TrainingSpec(optimizer=optimizer, **training)
    )


def state_bytes(optimizer: Optimizer, **training: Any) -> int:
    from launcher.planner import trace
    from launcher.workload import model_config

    architecture = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    job = replace(
        full_job(optimizer, optimizer_rank=RANK, **training),
        model=ModelSpec(architecture=architecture),
        data=DataSpec(packing=True),
    )
    plan = Plan(
        method=Method.FULL,
        rank=0,
        max_length=64,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=optimizer,
        precision=Precision.BF16,
    )
    subject = trace.TraceSubject(job, plan, CUDA, model_config("", job.model))
    return trace.trace_shape(subject, 2, 64, 1).resident_bytes(2, 64)[Category.OPTIMIZER_STATE]


def projected(rows: int, columns: int) -> int:
    """Elements for one matrix: two states of rank x the longer side, and a projection of rank x the shorter one."""
    return 2 * RANK * max(rows, columns) + RANK * min(rows, columns)


ATTENTION = LAYERS * 4 * projected(WIDTH, WIDTH)
FEED_FORWARD = LAYERS * 3 * projected(INNER, WIDTH)
HEAD = projected(VOCABULARY, WIDTH)
REST = 2 * (VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH)
"""Embeddings and norms are not projected."""


@pytest.mark.parametrize("optimizer", [Optimizer.GALORE_ADAMW, Optimizer.APOLLO_ADAMW])
def test_states_belong_to_projected_gradients(optimizer: Optimizer) -> None:
    # APOLLO keeps one norm per matrix besides
    norms = 2 * (7 * LAYERS + 1) if optimizer is Optimizer.APOLLO_ADAMW else 0
    assert state_bytes(optimizer) == 2 * (ATTENTION + FEED_FORWARD + HEAD + REST) + norms


def test_other_modules_keep_whole_states() -> None:
    """Only queries are projected: every other matrix has two whole states."""
    whole = 2 * (LAYERS * (3 * WIDTH * WIDTH + 3 * INNER * WIDTH) + VOCABULARY * WIDTH)
    queries = LAYERS * projected(WIDTH, WIDTH)
    found = state_bytes(Optimizer.GALORE_ADAMW, optimizer_target_modules=("q_proj",))
    assert found == 2 * (queries + whole + REST)


@pytest.mark.parametrize(("rows", "columns"), [(1000, 200), (200, 1000), (300, 300)])
def test_a_decomposition_holds_a_copy_of_its_matrix(rows: int, columns: int) -> None:
    """torch.linalg.svd for real, under the profiler; LAPACK's own small buffers are left out."""
    from torch.profiler import ProfilerActivity, profile

    from launcher.planner.fast_fake import FastFakeTensorMode
    from launcher.planner.polynomial import TracedShape
    from launcher.planner.tape import Tape
    from launcher.planner.worst_case import twins

    def highest(changes: list[int]) -> int:
        totals = [sum(changes[: index + 1]) for index in range(len(changes))]
        return max(totals)

    matrix = torch.randn(rows, columns)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        factors = torch.linalg.svd(matrix, full_matrices=False)
    events: Any = profiler.profiler.kineto_results.events()
    found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    measured = highest([num_bytes for _, num_bytes in found])
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 8, False, False), twins=twins(), fake=fake)
    with fake, tape:
        traced = torch.empty(rows, columns)
        begin = len(tape.events)
        shapes = [tuple(factor.shape) for factor in torch.linalg.svd(traced, full_matrices=False)]
    changes = [event.block.num_bytes * (1 if event.birth else -1) for event in tape.events[begin:]]
    assert shapes == [tuple(factor.shape) for factor in factors]
    assert highest(changes) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        pytest.param("galore_adamw", "bf16", marks=pytest.mark.thorough),
        pytest.param("galore_adafactor", "fp32", marks=pytest.mark.thorough),
        pytest.param("apollo_adamw", "bf16", marks=pytest.mark.thorough),
    ],
)
def test_a_real_run_allocates_what_was_predicted(
    optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = accuracy_jobs.ARCHITECTURES["llama"] | {"num_hidden_layers": 2, "vocab_size": 3000}
    monkeypatch.setitem(accuracy_jobs.ARCHITECTURES, "llama", smaller)
    job = accuracy_jobs.AccuracyJob("llama", "full", "full", 2, 32, optimizer=optimizer, precision=precision)
    result = accuracy.run_job(job)
    for phase, measured in result["measured_bytes"].items():
        assert result["predicted_bytes"][phase] == pytest.approx(measured, rel=3e-3), phase


def test_adapters_and_checkpoints_are_refused() -> None:
    lora = JobSpec(training=TrainingSpec(optimizer=Optimizer.GALORE_ADAMW))
    ((what, hint),) = knob_limits(lora, CUDA, lambda module: True)
    assert "method lora trains adapters" in what and "method=full" in hint
    job = full_job(Optimizer.GALORE_ADAMW)
    either = replace(job, planner=PlannerSpec(choices=ChoicesSpec(method=(Method.FULL, Method.QLORA))))
    ((what, _),) = knob_limits(either, CUDA, lambda module: True)
    assert "method qlora" in what
    saves = full_job(Optimizer.APOLLO_ADAMW, save_steps=10)
    ((what, _),) = knob_limits(saves, CUDA, lambda module: True)
    assert "save_steps=10" in what and "could not be resumed" in what
    assert knob_limits(job, CUDA, lambda module: True) == ()


def test_torch_does_not_read_a_projector_back(tmp_path: Path) -> None:
    """Why checkpoints are refused: transformers reads the optimizer's file with `weights_only`."""
    from galore_torch.galore_projector import GaLoreProjector

    projector = GaLoreProjector(4)
    projector.project(torch.randn(8, 6), 0)
    torch.save({"state": {0: {"projector": projector}}}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_a_missing_package_names_its_extra(name: str) -> None:
    job = full_job(Optimizer(f"{name}_adamw"))
    ((what, hint),) = knob_limits(job, CUDA, lambda module: module != f"{name}_torch")
    assert f"{name}_torch" in what and f"[{name}]" in hint


def test_layerwise_names_are_not_offered() -> None:
    from launcher.config import load_job
    from launcher.errors import ConfigError

    with pytest.raises(ConfigError, match="galore_adamw, galore_adafactor, apollo_adamw"):
        load_job(["training.optimizer=galore_adamw_layerwise", "data.path=x"])
