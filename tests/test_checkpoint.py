"""Saving, resuming and merging, traced, against real runs: peaks by the profiler, sizes by the file system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from launcher import workload
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
from launcher.memory import MemoryEstimate, MemoryMeasurement
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.forecast import read_estimate
from launcher.planner.rehearsal import blank_tokenizer
from launcher.worker.progress import Progress
from launcher.worker.train import Ingredients, train

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "head_dim": 48,
}
LENGTH, BATCH = 128, 2


@dataclass(frozen=True)
class Case:
    architecture: dict[str, Any]
    method: Method
    optimizer: Optimizer = Optimizer.ADAMW_TORCH_FUSED
    use_dora: bool = False

    @property
    def job(self) -> JobSpec:
        return JobSpec(
            model=ModelSpec(architecture=self.architecture, stored_dtype=StoredDtype.FP32),
            method=MethodSpec(merge=True, use_dora=self.use_dora),
            data=DataSpec(packing=True),
            training=TrainingSpec(max_steps=2, save_steps=1, report_to=()),
            hardware=HardwareSpec(kind=DeviceKind.CPU),
        )

    @property
    def plan(self) -> Plan:
        return Plan(
            method=self.method,
            rank=0 if self.method is Method.FULL else 16,
            max_length=LENGTH,
            micro_batch_size=BATCH,
            gradient_accumulation_steps=1,
            activation_checkpointing=Checkpointing.FULL,
            attention=Attention.SDPA,
            loss=Loss.CHUNKED,
            optimizer=self.optimizer,
            precision=Precision.FP32,
        )


CASES = {
    "full": Case(LLAMA, Method.FULL),
    "lora": Case(LLAMA, Method.LORA),
    "dora, 8-bit states": Case(LLAMA, Method.LORA, Optimizer.ADAMW_8BIT, use_dora=True),
    "qlora": Case(LLAMA, Method.QLORA),
    "full, experts": Case(MOE, Method.FULL),
}


def predicted(case: Case) -> MemoryEstimate:
    config = workload.model_config("", case.job.model)
    subject = trace.TraceSubject(case.job, case.plan, case.job.hardware, config)
    return read_estimate(trace.trace_regime(subject, BATCH, LENGTH, 1), case.plan, case.job)


def trained(case: Case, folder: Path, steps: int, *, resume: bool) -> MemoryMeasurement:
    weights = folder / "weights"
    if not weights.exists():
        torch.manual_seed(0)
        config = workload.model_config("", case.job.model)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(weights)

    def load() -> torch.nn.Module:
        loaded = workload.model_config(str(weights), case.job.model)
        model = workload.build_model(loaded, case.plan, str(weights), case.job)
        return workload.attach_adapters(model, case.job, case.plan)

    rows = torch.randint(2, 2000, (8 * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ingredients = Ingredients(
        load=load,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        eval_dataset=None,
        tokenizer=blank_tokenizer(),
        changes={
            "use_cpu": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": steps,
            "report_to": [],
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
        },
        output_dir=folder / "checkpoints",
        model=folder / "model",
        merged=folder / "merged",
    )
    _, measurement = train(case.job, case.plan, ingredients, Progress(), lambda line: None, resume)
    return measurement


def with_tensors(folder: Path) -> int:
    """Bytes of the files with tensors in a folder."""
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".pt", ".pth", ".bin")
    )


@pytest.mark.parametrize("name", CASES)
def test_peaks_and_sizes_are_those_of_a_run_and_of_its_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    case = CASES[name]
    expected = predicted(case)
    first = trained(case, tmp_path, 2, resume=False)
    second = trained(case, tmp_path, 4, resume=True)
    assert expected.disk is not None
    kept = {
        "checkpoint": (expected.disk.checkpoint_bytes, tmp_path / "checkpoints" / "checkpoint-2"),
        "model": (expected.disk.model_bytes, tmp_path / "model"),
    }
    if case.method is not Method.FULL:
        kept["merged"] = expected.disk.merged_bytes, tmp_path / "merged"
    for folder, (size, path) in kept.items():
        print(name, folder, size, with_tensors(path), [(f.name, f.stat().st_size) for f in path.iterdir()])
    for measurement in (first, second):
        for phase in measurement.phases:
            ours = expected.phase(phase.phase)
            print(
                name,
                phase.phase,
                ours.allocated_bytes,
                phase.allocated_bytes,
                f"{100 * (ours.allocated_bytes / phase.allocated_bytes - 1):+.3f}",
            )
