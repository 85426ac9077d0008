"""A job that trains in seconds: a small random Llama with a byte-level tokenizer, and text from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.cluster import LaunchSpec
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataFormat,
    DataSpec,
    Engine,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Buckets, Plan
from launcher.run_record import WorkerOrder
from scripts.small_text import VOCABULARY, write_small_model

BUCKETS = Buckets(
    reduce_bucket_elements=200_000,
    allgather_bucket_elements=200_000,
    prefetch_bucket_elements=200_000,
    persistence_threshold_elements=1_000,
    max_live_elements=1_000_000,
    max_reuse_distance_elements=1_000_000,
)
PREDICTED = MemoryEstimate((PhasePeak(Phase.TRAIN_STEP, 1, {Category.INPUTS: 1}),), {}, 0)
"""A prediction for runs that are not about one."""


ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def write_tiny_model(folder: Path) -> None:
    """Writes the model, its tokenizer and `train.jsonl` into a folder."""
    text = "the planner reads the trace and the trace reads the step. "
    write_small_model(folder, ARCHITECTURE, text * 12, 60)


def tiny_order(
    model: Path,
    engine: Engine,
    zero_stage: int = 0,
    method: Method = Method.FULL,
    num_devices: int = 2,
    num_nodes: int = 1,
    launch: LaunchSpec | None = None,
    training: dict[str, Any] | None = None,
    **plan_changes: Any,
) -> WorkerOrder:
    """An order to train the tiny model, four sequences a step, with an engine.

    Args:
        model: Folder that `write_tiny_model` wrote.
        engine: What trains.
        zero_stage: What is sharded.
        method: What is trained.
        num_devices: Processes on each machine.
        num_nodes: Machines.
        launch: How it is started.
        training: Changes to the optimisation.
        plan_changes: Changes to the plan.
    """
    world_size = num_devices * num_nodes
    optimisation = TrainingSpec(
        global_batch_size=4, max_steps=4, precision=Precision.FP32, report_to=(), learning_rate=1e-3
    )
    job = JobSpec(
        model=ModelSpec(path=str(model)),
        method=MethodSpec(name=method),
        data=DataSpec(path=str(model / "train.jsonl"), format=DataFormat.TEXT, max_length=192, packing=True),
        training=replace(optimisation, **(training or {})),
        hardware=HardwareSpec(name="cpu", kind=DeviceKind.CPU, num_devices=num_devices, num_nodes=num_nodes),
        launch=replace(launch or LaunchSpec(), rehearse=False),
    )
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 8,
        max_length=192,
        micro_batch_size=1,
        gradient_accumulation_steps=4 // world_size,
        activation_checkpointing=Checkpointing.NONE,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH,
        precision=job.training.precision,
        engine=engine,
        num_devices=num_devices,
        num_nodes=num_nodes,
        zero_stage=zero_stage,
        buckets=BUCKETS if engine is not Engine.NONE else None,
    )
    return WorkerOrder(job, replace(plan, **plan_changes), PREDICTED, str(model), "")
