"""Real ranks over gloo: what was predicted for a rank is what it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    Engine,
    Method,
)
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from scripts.accuracy_ranks import (
    ARCHITECTURE,
    ROOT,
    WITHIN,
    RankJob,
    compare,
    job_of,
    jobs,
    page,
    plan_of,
    write_model,
)
from tests.rank_plans import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.mark.parametrize(
    ("engine", "stage", "method"),
    [
        pytest.param(Engine.DDP, 0, Method.FULL, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 1, Method.FULL, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, Method.LORA, marks=pytest.mark.thorough),
        (Engine.DEEPSPEED, 3, Method.FULL),
        pytest.param(Engine.DEEPSPEED, 3, Method.LORA, marks=pytest.mark.thorough),
        pytest.param(Engine.FSDP2, 3, Method.FULL, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, Method.QLORA, marks=pytest.mark.thorough),
        (Engine.FSDP2, 3, Method.QLORA),
    ],
)
def test_each_rank_takes_what_was_predicted(engine: Engine, stage: int, method: Method, model: Path) -> None:
    """Real processes over gloo, the allocator's peak of each; nothing in common with the tracer."""
    check_ranks(plan_of(engine, stage, method, Checkpointing.NONE, 1, 384, 2), model)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_with_its_states_in_host_memory_takes_what_was_predicted(stage: int, model: Path) -> None:
    """DeepSpeed alone: whatever it shards, it has all of it."""
    shape = 1, 384, 2
    plan = plan_of(
        Engine.DEEPSPEED,
        stage,
        Method.FULL,
        Checkpointing.NONE,
        *shape,
        num_devices=1,
        offload_optimizer=True,
    )
    check_ranks(plan, model)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "method"),
    [(2, Method.FULL), (2, Method.LORA), (3, Method.FULL), (3, Method.LORA)],
)
def test_each_rank_takes_what_was_predicted_with_small_buckets(
    stage: int, method: Method, model: Path
) -> None:
    """Of a CPU's jobs neither overlaps, so that the sizes alone differ; and buckets come after loading."""
    check_ranks(
        small(plan_of(Engine.DEEPSPEED, stage, method, Checkpointing.NONE, 1, 384, 2)), model, loads=False
    )


def check_ranks(plan: Plan, model: Path, *, loads: bool = True) -> None:
    """Compares what each rank takes with what was predicted; while loading too, unless that is of no interest."""
    result = compare(RankJob("job", plan), model)
    assert len(result["errors"]) == plan.world_size
    for phase in ("train_step", "optimizer_step"):
        assert all(abs(error) <= WITHIN for error in result["phases"][phase]["errors"]), result
    assert all(abs(error) <= WITHIN for error in result["errors"]), result
    saving = result["phases"]["save"]  # rank 0 gathers, and the plan is for the rank that takes most
    assert saving["predicted_bytes"] == pytest.approx(max(saving["measured_bytes"]), rel=WITHIN)
    loading = result["phases"]["load"]
    # what DDP broadcasts first is a copy of all weights, which gloo's threads may release last: unseen by the profiler
    copy_bytes = 4 * num_parameters() if plan.engine is Engine.DDP else 0
    for measured_bytes in loading["measured_bytes"] if loads else ():
        wanted = [loading["predicted_bytes"], loading["predicted_bytes"] + copy_bytes]
        assert any(measured_bytes == pytest.approx(size, rel=WITHIN) for size in wanted), result


def num_parameters() -> int:
    """Parameters of this benchmark's model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_gpu_that_fsdp2_shares_holds_no_whole_model_while_it_loads_and_saves() -> None:
    """Weights wait in host memory, come and go one at a time: a rank's parts, and twice the largest weight at most."""
    plan = plan_of(Engine.FSDP2, 3, Method.FULL, Checkpointing.NONE, 1, 384, 2)
    job = job_of(plan, Path("nowhere"))
    gpu = HardwareSpec(name="a100_40g", kind=DeviceKind.CUDA, num_devices=2, memory_bytes=40 << 30)
    with Tracer() as tracer:
        estimate = Forecaster(replace(job, hardware=gpu), tracer, TraceCache(None)).estimate(plan, exact=True)
    whole = 4 * num_parameters()
    largest = 4 * ARCHITECTURE["vocab_size"] * ARCHITECTURE["hidden_size"]
    loading, saving = estimate.phase(Phase.LOAD), estimate.phase(Phase.SAVE)
    assert loading is not None and saving is not None and estimate.host is not None
    assert whole / 2 + largest <= loading.allocated_bytes <= whole / 2 + 1.1 * largest
    assert 3 * whole / 2 + largest <= saving.allocated_bytes <= 3 * whole / 2 + 2.1 * largest
    assert estimate.host.by_category_bytes[Category.PARAMETERS] >= whole


def test_the_page_is_that_of_the_newest_data() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-ranks.json"))
    document = json.loads(newest.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8") == page(document)
    errors = [error for result in document["jobs"] for error in result["errors"]]
    assert len(document["jobs"]) == sum(1 for _ in jobs()) and max(map(abs, errors)) <= WITHIN
