"""Host memory and disk of plans: sums worked by hand, and what is refused where they do not suffice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from launcher.checkpoints import seal
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    StoredDtype,
    TrainingSpec,
)
from launcher.memory import Category, HostEstimate, MemoryEstimate, Phase
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.estimate import read_estimate
from launcher.planner.host import checkpoints_at_once
from launcher.run.disk import bytes_in, rehearsed_bytes, require_disk
from launcher.run_paths import RunPaths
from launcher.workload import model_config

LAYERS, WIDTH, VOCABULARY, BATCH, LENGTH = 4, 512, 2048, 2, 384
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
WEIGHTS = 2 * VOCABULARY * WIDTH + LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 1024) + (2 * LAYERS + 1) * WIDTH
NORMS = (2 * LAYERS + 1) * WIDTH


@cache
def estimated(
    method: Method = Method.FULL, stored: StoredDtype = StoredDtype.BF16, **knobs: object
) -> MemoryEstimate:
    """The plan of one job on a GPU, traced at its true shape."""
    job = JobSpec(
        model=ModelSpec(architecture=LLAMA, stored_dtype=stored),
        method=MethodSpec(),
        data=DataSpec(packing=True),
        training=TrainingSpec(max_steps=5, save_steps=2, save_total_limit=1),
        hardware=HardwareSpec(kind=DeviceKind.CUDA, supports_flash_attention=True),
    )
    chosen = {
        "activation_checkpointing": Checkpointing.FULL,
        "optimizer": Optimizer.ADAMW_TORCH_FUSED,
        **knobs,
    }
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 16,
        max_length=LENGTH,
        micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        precision=Precision.BF16,
        **chosen,  # type: ignore[arg-type]  # the names are a plan's
    )
    subject = trace.TraceSubject(job, plan, job.hardware, model_config("", job.model))
    return read_estimate(trace.trace_shape(subject, BATCH, LENGTH, 1), plan, job, 700)


def host(estimate: MemoryEstimate) -> HostEstimate:
    assert estimate.host is not None
    return estimate.host


def of_phase(estimate: MemoryEstimate, phase: Phase, category: Category) -> int:
    return next(peak.by_category_bytes[category] for peak in host(estimate).phases if peak.phase is phase)


def test_weights_wait_in_host_memory_and_are_copied_there_to_be_saved() -> None:
    estimate = estimated()
    for phase in (Phase.LOAD, Phase.SAVE):
        assert of_phase(estimate, phase, Category.PARAMETERS) == 2 * WEIGHTS
    # two moments in bf16 of every weight, and a step of 4 bytes of every tensor
    states = 2 * 2 * WEIGHTS + 4 * (9 * LAYERS + 3)
    assert of_phase(estimate, Phase.RESUME, Category.OPTIMIZER_STATE) == states
    assert host(estimate).peak_bytes == sum(host(estimate).by_category_bytes.values())
    assert host(estimate).by_category_bytes["process"] == 700


def test_weights_of_another_dtype_are_there_twice() -> None:
    estimate = estimated(stored=StoredDtype.FP32)
    assert of_phase(estimate, Phase.LOAD, Category.PARAMETERS) == 2 * WEIGHTS
    assert of_phase(estimate, Phase.LOAD, Category.TEMPORARIES) == 4 * WEIGHTS


def test_offloaded_activations_are_pinned_in_powers_of_two() -> None:
    plain, offload = estimated(), estimated(activation_checkpointing=Checkpointing.OFFLOAD)
    start = 2 * BATCH * LENGTH * WIDTH  # what a layer starts from, bf16; 1.5 x a power of two
    rounded = 4 * start // 3
    kept = of_phase(offload, Phase.TRAIN_STEP, Category.ACTIVATIONS)
    assert LAYERS * rounded <= kept <= LAYERS * rounded + 4 * rounded // 100
    assert of_phase(plain, Phase.TRAIN_STEP, Category.ACTIVATIONS) == 0
    assert host(offload).pinned_bytes >= kept


def test_paged_states_are_counted_on_the_host_and_after_a_resume_on_the_device() -> None:
    paged, plain = estimated(optimizer=Optimizer.PAGED_ADAMW_8BIT), estimated(optimizer=Optimizer.ADAMW_8BIT)
    on_host = of_phase(paged, Phase.OPTIMIZER_STEP, Category.OPTIMIZER_STATE)
    # two moments of one byte; of embeddings transformers keeps them in fp32
    assert on_host == 2 * (WEIGHTS - NORMS) + 2 * 3 * VOCABULARY * WIDTH
    fresh, resumed, unpaged = (
        paged.phase(Phase.TRAIN_STEP),
        paged.phase(Phase.RESUME),
        plain.phase(Phase.TRAIN_STEP),
    )
    assert fresh and resumed and unpaged
    assert resumed.allocated_bytes == fresh.allocated_bytes + on_host
    assert resumed.allocated_bytes == pytest.approx(unpaged.allocated_bytes, rel=1e-3)


def test_a_run_leaves_its_checkpoints_and_its_model() -> None:
    disk = estimated().disk
    assert disk is not None
    assert 0 < disk.model_bytes - 2 * WEIGHTS < 20_000
    assert 0 < disk.checkpoint_bytes - 2 * WEIGHTS - 4 * WEIGHTS < 80_000
    assert (disk.num_checkpoints, disk.merged_bytes) == (2, 0)
    assert disk.total_bytes == 2 * disk.checkpoint_bytes + disk.model_bytes


@pytest.mark.parametrize(
    ("max_steps", "save_steps", "limit", "count"),
    [
        (10, None, None, 0),
        (10, 3, None, 4),
        (9, 3, None, 3),
        (9, 3, 1, 2),
        (None, 3, None, None),
        (None, 3, 2, 3),
    ],
)
def test_checkpoints_at_once(
    max_steps: int | None, save_steps: int | None, limit: int | None, count: int | None
) -> None:
    """Steps 3, 6, 9 and the last one; the oldest goes when the newest is complete."""
    spec = TrainingSpec(max_steps=max_steps, save_steps=save_steps, save_total_limit=limit)
    assert checkpoints_at_once(spec) == count


def test_a_run_does_not_start_where_its_disk_is_too_small(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_disk(tmp_path / "not" / "there yet", free // 2)
    with pytest.raises(LaunchError, match=rf"needs {free * 2} bytes .* has \d+ bytes") as caught:
        require_disk(tmp_path / "not" / "there yet", free * 2)
    assert caught.value.exit_code == 6 and str(tmp_path) in str(caught.value)


def test_what_a_rehearsal_wrote_says_what_the_run_will_write(tmp_path: Path) -> None:
    """A checkpoint of 1,000 bytes (and its seal), of which two are there at once, and a model of 200."""
    paths = RunPaths(tmp_path)
    for folder, size in ((paths.checkpoints / "checkpoint-2", 1000), (paths.model, 200)):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(size))
    training = TrainingSpec(save_steps=500, save_total_limit=1)
    assert rehearsed_bytes(paths, training) == 200, "torn: it has no seal"
    seal(paths.checkpoints / "checkpoint-2")
    sealed = bytes_in(paths.checkpoints / "checkpoint-2")
    assert 1000 < sealed < 2000
    assert rehearsed_bytes(paths, training) == 2 * sealed + 200
    assert rehearsed_bytes(paths, replace(training, save_steps=None)) == 200
