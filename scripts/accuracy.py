"""Predicted against measured peak memory on CPU, over real training jobs of small random models.

Each job runs in a process of its own: the same workload is traced on fake tensors and trained on real ones, and
the measurement comes from the profiler's allocator events, never from the tracer.

    python scripts/accuracy.py                     all jobs; prints the table
    python scripts/accuracy.py --write             also writes docs/accuracy/<date>-cpu.json and docs/accuracy.md
    python scripts/accuracy.py --subset 4          the first four jobs
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 6000,
    "max_position_embeddings": 4096,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
}
ARCHITECTURES = {"llama": LLAMA, "gemma": GEMMA}


@dataclass(frozen=True)
class AccuracyJob:
    """One row of the table."""

    architecture: str
    method: str
    checkpointing: str
    micro_batch_size: int
    length: int
    accumulation: int = 1
    precision: str = "bf16"
    loss: str = "chunked"

    @property
    def name(self) -> str:
        """The job in words."""
        return (
            f"{self.architecture} {self.method} checkpointing={self.checkpointing} {self.precision} "
            f"{self.loss} {self.micro_batch_size}x{self.length} accumulation={self.accumulation}"
        )


JOBS = (
    AccuracyJob("llama", "lora", "none", 4, 128),
    AccuracyJob("llama", "lora", "full", 2, 640, precision="fp32"),
    AccuracyJob("llama", "full", "none", 2, 640, accumulation=2, precision="fp32"),
    AccuracyJob("llama", "full", "full", 16, 288, precision="fp32"),
    AccuracyJob("gemma", "lora", "none", 2, 640, precision="fp32"),
    AccuracyJob("gemma", "lora", "full", 16, 288, accumulation=2, precision="fp32"),
    AccuracyJob("gemma", "full", "none", 4, 128),
    AccuracyJob("gemma", "full", "full", 2, 640, precision="fp32"),
    AccuracyJob("llama", "lora", "none", 1, 1536, precision="fp32"),
    AccuracyJob("llama", "full", "full", 4, 128, precision="bf16_mixed"),
    AccuracyJob("llama", "lora", "full", 3, 333, accumulation=3, precision="fp32", loss="plain"),
    AccuracyJob("gemma", "full", "none", 1, 2048, precision="fp32", loss="plain"),
)


def run_job(job: AccuracyJob) -> dict[str, Any]:
    """Traces and trains one job in this process; returns predicted and measured bytes per phase."""
    import torch  # noqa: PLC0415  # only the child process needs the heavy libraries
    from datasets import Dataset  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from launcher import workload  # noqa: PLC0415
    from launcher.hardware import DeviceKind, HardwareSpec  # noqa: PLC0415
    from launcher.job import (  # noqa: PLC0415
        Attention,
        Checkpointing,
        DataSpec,
        JobSpec,
        Loss,
        Method,
        ModelSpec,
        Optimizer,
        Precision,
        TrainingSpec,
    )
    from launcher.plan import Plan  # noqa: PLC0415
    from launcher.planner import trace  # noqa: PLC0415
    from launcher.worker.train import Ingredients, Progress, train  # noqa: PLC0415

    torch.manual_seed(0)
    spec = JobSpec(
        model=ModelSpec(architecture=ARCHITECTURES[job.architecture]),
        data=DataSpec(packing=True),
        training=TrainingSpec(max_steps=3, report_to=()),
    )
    plan = Plan(
        method=Method(job.method),
        rank=16 if job.method == "lora" else 0,
        max_length=job.length,
        micro_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.accumulation,
        activation_checkpointing=Checkpointing(job.checkpointing),
        attention=Attention.SDPA,
        loss=Loss(job.loss),
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision(job.precision),
    )
    config = workload.model_config("", spec.model)
    subject = trace.TraceSubject(spec, plan, HardwareSpec(kind=DeviceKind.CPU), config)
    skyline = trace.trace_regime(subject, job.micro_batch_size, job.length, job.accumulation)
    predicted = skyline.peaks(job.micro_batch_size, job.length, job.accumulation)

    def load() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_config(config, dtype=workload.weight_dtype(plan.precision))
        return workload.attach_adapters(model, spec, plan)

    rows = 3 * job.micro_batch_size * job.accumulation
    tokens = torch.randint(2, config.vocab_size, (rows, job.length)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        ingredients = Ingredients(
            load=load,
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
            eval_dataset=None,
            tokenizer=trace.blank_tokenizer(),
            changes={
                "use_cpu": True,
                "save_strategy": "no",
                "report_to": [],
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "dataloader_pin_memory": False,
            },
            output_dir=Path(folder),
        )
        _, measured = train(spec, plan, ingredients, Progress(), lambda line: None)
    return {
        "job": job.name,
        "predicted_bytes": {peak.phase.value: peak.allocated_bytes for peak in predicted},
        "measured_bytes": {peak.phase.value: peak.allocated_bytes for peak in measured.phases},
    }


def measure(job: AccuracyJob) -> dict[str, Any]:
    """Runs one job in a process of its own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--job", str(JOBS.index(job))]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        raise SystemExit(f"{job.name} failed:\n{child.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def peak_error_percent(result: dict[str, Any]) -> float:
    """Signed error of the highest peak, percent of the measurement."""
    phases = ("train_step", "optimizer_step")
    predicted = max(result["predicted_bytes"][phase] for phase in phases)
    measured = max(result["measured_bytes"][phase] for phase in phases)
    return 100.0 * float(predicted - measured) / float(measured)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a markdown table, under-predictions first."""
    lines = [
        "| job | predicted peak, MiB | measured peak, MiB | error | train step | optimizer step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in sorted(results, key=peak_error_percent):
        predicted, measured = result["predicted_bytes"], result["measured_bytes"]
        by_phase = [
            f"{100.0 * (predicted[phase] - measured[phase]) / measured[phase]:+.3f} %"
            for phase in ("train_step", "optimizer_step")
        ]
        highest = [max(side["train_step"], side["optimizer_step"]) / 2**20 for side in (predicted, measured)]
        lines.append(
            f"| {result['job']} | {highest[0]:.2f} | {highest[1]:.2f} | {peak_error_percent(result):+.3f} % "
            f"| {by_phase[0]} | {by_phase[1]} |"
        )
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Median and worst absolute error, and how many peaks were under-predicted."""
    errors = [peak_error_percent(result) for result in results]
    worst = max(errors, key=abs)
    return (
        f"{len(errors)} jobs: median absolute error {statistics.median(map(abs, errors)):.3f} %, "
        f"worst {worst:+.3f} %, under-predicted {sum(error < 0 for error in errors)}"
    )


def write_report(results: list[dict[str, Any]]) -> None:
    """Writes the dated data file and the page generated from it."""
    today = datetime.date.today().isoformat()
    versions = {name: version(name) for name in LIBRARIES}
    data = {"date": today, "machine": platform.machine(), "versions": versions, "results": results}
    target = ROOT / "docs" / "accuracy" / f"{today}-cpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = [
        "# Accuracy",
        "",
        "Generated by `python scripts/accuracy.py --write`; the data lie in docs/accuracy/. Signed errors,",
        "under-predictions first. Measured: allocator-level peak of real training on CPU, from the profiler's",
        "memory events. Predicted: the skyline of a trace at another, prime-numbered shape, extended over depth.",
        "",
        f"{today}, " + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        table(results),
        "",
        summary(results),
        "",
        "Not verified: everything on CUDA. The CUDA side of the tracer (launcher/planner/cuda_twin.py) follows the",
        "libraries' sources; no GPU has confirmed it yet.",
        "",
    ]
    (ROOT / "docs" / "accuracy.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=int, help="run one job in this process and print JSON")
    parser.add_argument("--subset", type=int, default=len(JOBS), help="only the first so many jobs")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy")
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_job(JOBS[options.job])))
        return
    results = []
    for job in JOBS[: options.subset]:
        results.append(measure(job))
        print(f"{job.name}: {peak_error_percent(results[-1]):+.3f} %", file=sys.stderr, flush=True)
    print(table(results))
    print(summary(results))
    if options.write:
        write_report(results)


if __name__ == "__main__":
    main()
