"""Saving, resuming and merging, traced, against real runs: peaks by the profiler, sizes by the file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from launcher import workload
from launcher.checkpoints import last_checkpoint
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
from launcher.memory import MemoryEstimate, MemoryMeasurement, Phase
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.estimate import read_estimate
from launcher.planner.rehearsal import blank_tokenizer
from launcher.worker.ingredients import Ingredients
from launcher.worker.progress import Progress
from launcher.worker.train import train

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
ROOT = Path(__file__).resolve().parent.parent
SLACK_BYTES = 2048
"""Files of torch hold names and numbers whose digits differ from run to run."""
LOOSE_BYTES = 50_000
"""Generators' states, profiler marks, blank tokens: 34 kB in every run, whatever its size."""


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


ALIKE = ("full", "dora, 8-bit states", "qlora", "full, experts")
"""Cases that others cover nearly as well."""
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
    begin = last_checkpoint(folder / "checkpoints") if resume else None
    _, measurement = train(case.job, case.plan, ingredients, Progress(), lambda line: None, begin)
    return measurement


def worked_out(name: str, folder: str, *, resume: bool) -> str:
    """Predicted and measured of one run, as JSON; runs in a process of its own, where no other tensors are alive."""
    case = CASES[name]
    expected = predicted(case)
    measurement = trained(case, Path(folder), 4 if resume else 2, resume=resume)
    assert expected.disk is not None
    sizes = {
        "checkpoint": expected.disk.checkpoint_bytes,
        "model": expected.disk.model_bytes,
        "merged": expected.disk.merged_bytes,
    }
    peaks = {peak.phase: peak.allocated_bytes for peak in expected.phases}
    return json.dumps(
        {
            "sizes": {key: [sizes[key], size] for key, size in measurement.disk_bytes.items()},
            "peaks": {peak.phase: [peaks[peak.phase], peak.allocated_bytes] for peak in measurement.phases},
        }
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name in ALIKE else ()) for name in CASES],
)
def test_peaks_and_sizes_are_those_of_a_run_and_of_its_resume(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    for resume in (False, True):
        call = f"worked_out({name!r}, {str(tmp_path)!r}, resume={resume})"
        command = [sys.executable, "-c", f"from tests.test_checkpoint import worked_out; print({call})"]
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT
        )
        assert child.returncode == 0, child.stderr[-3000:]
        result = json.loads(child.stdout.splitlines()[-1])
        merged = set() if CASES[name].method is Method.FULL else {"merged"}
        assert set(result["sizes"]) == {"checkpoint", "model"} | merged
        assert set(result["peaks"]) >= {Phase.SAVE, Phase.TRAIN_STEP, *([Phase.RESUME] if resume else [])}
        for folder, (ours, real) in result["sizes"].items():
            assert abs(ours - real) <= max(SLACK_BYTES, 0.001 * real), (resume, folder, ours, real)
        for phase, (ours, real) in result["peaks"].items():
            if phase != Phase.LOAD:
                assert abs(ours - real) <= max(LOOSE_BYTES, 0.003 * real), (resume, phase, ours, real)
