"""Predicted against measured peak memory on CPU, over real training jobs of small random models.

Each job runs in a process of its own: the same workload is traced on fake tensors and trained on real ones, and
the measurement comes from the profiler's allocator events, never from the tracer.

    python -m scripts.accuracy                     all jobs; prints the table
    python -m scripts.accuracy --write             also writes docs/accuracy/<date>-cpu.json and docs/accuracy.md
    python -m scripts.accuracy --subset 4          the first four jobs
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from scripts import small_vision

if TYPE_CHECKING:
    from launcher.worker.prompts import Batch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")

WIDTHS = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **WIDTHS},
    "gemma": {
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
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **WIDTHS},
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 8,
        "n_embd": 320,
        "n_head": 8,
        "n_positions": 2048,
        "vocab_size": 8000,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 208,
        "head_dim": 40,
        "tie_word_embeddings": False,
        **WIDTHS,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 40,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        **WIDTHS,
    },
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 6,
        "hidden_size": 320,
        "intermediate_size": 864,
        "moe_intermediate_size": 208,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "vocab_size": 8000,
        "max_position_embeddings": 4096,
    },
}
CLASSIFICATION = "sequence_classification"
VISION = "image_text_to_text"
IMAGES = 2
"""Images of an example."""
ARCHITECTURES |= {"gemma3": small_vision.GEMMA3, "llava": small_vision.LLAVA}
EAGER_ONLY = ("gpt_oss",)
"""Architectures for which transformers has no sdpa (attention sinks)."""


@dataclass(frozen=True)
class AccuracyJob:
    """One row of the table."""

    architecture: str
    method: str
    checkpointing: str
    micro_batch_size: int
    length: int
    accumulation: int = 1
    precision: str = "fp32"
    loss: str = "chunked"
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    packing: bool = True
    evaluation: bool = False
    keep_logits: int = 0
    """Evaluation batches whose logits are kept; 0: none."""
    save: bool = False
    new_tokens: int = 0
    """Tokens generated per prompt at the end; 0: none."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further keys of the method."""
    task: str = "causal_lm"
    """What the model is trained to do."""

    @property
    def name(self) -> str:
        """The job in words; what is usual goes without saying."""
        unusual = [
            word
            for word, usual in (
                (self.loss, "chunked"),
                (self.optimizer, "adamw_torch_fused"),
                (self.attention, "sdpa"),
                (self.task, "causal_lm"),
            )
            if word != usual
        ]
        unusual += [f"{key}={value}" for key, value in self.options]
        unusual += [f"keep_logits={self.keep_logits}"] if self.keep_logits else []
        unusual += [f"generate={self.new_tokens}"] if self.new_tokens else []
        flags = {"padded": not self.packing, "evaluation": self.evaluation, "save": self.save}
        unusual += [flag for flag, on in flags.items() if on]
        words = [self.architecture, self.method, f"checkpointing={self.checkpointing}", self.precision]
        shape = f"{self.micro_batch_size}x{self.length}"
        words += [*unusual, shape if self.accumulation == 1 else f"{shape}x{self.accumulation}"]
        return " ".join(words)


JOBS = (
    # full fine-tuning and LoRA, over shapes, checkpointing and precisions
    AccuracyJob("llama", "lora", "none", 4, 128, precision="bf16"),
    AccuracyJob("llama", "full", "full", 2, 640, 2),
    AccuracyJob("llama", "qlora", "full", 2, 640),
    AccuracyJob("gemma", "lora", "none", 2, 640),
    AccuracyJob("gemma", "full", "none", 4, 128, precision="bf16", optimizer="adamw_8bit"),
    AccuracyJob("qwen2", "lora", "full", 3, 333, 3, packing=False, evaluation=True),
    AccuracyJob("gpt2", "full", "none", 2, 256, optimizer="adafactor"),
    AccuracyJob("qwen3_moe", "full", "none", 2, 192),
    AccuracyJob("llama", "lora", "full", 2, 512, loss="plain", options=(("use_dora", True),)),
    AccuracyJob("llama", "qlora", "none", 2, 512, precision="bf16", options=(("kbit_preparation", True),)),
    AccuracyJob("gpt_oss", "lora", "full", 2, 256, attention="eager"),
    AccuracyJob("deepseek", "lora", "full", 2, 256),
    # the first twelve are what continuous integration runs
    AccuracyJob("llama", "lora", "full", 2, 640),
    AccuracyJob("llama", "full", "none", 2, 640, 2),
    AccuracyJob("llama", "full", "full", 16, 288),
    AccuracyJob("llama", "lora", "none", 1, 1536),
    AccuracyJob("llama", "full", "full", 4, 128, precision="bf16_mixed"),
    AccuracyJob("llama", "lora", "none", 2, 320, precision="bf16_mixed"),
    AccuracyJob("llama", "full", "none", 2, 192, precision="bf16"),
    AccuracyJob("llama", "full", "selective", 2, 640),
    AccuracyJob("llama", "lora", "selective", 2, 640, 2),
    AccuracyJob("llama", "lora", "full", 3, 333, 3, loss="plain"),
    AccuracyJob("llama", "full", "none", 4, 320, loss="plain", evaluation=True),
    AccuracyJob("llama", "lora", "none", 2, 512, attention="eager"),
    AccuracyJob("llama", "full", "full", 3, 400, packing=False, evaluation=True, save=True),
    AccuracyJob("llama", "full", "none", 2, 256, save=True),
    AccuracyJob("llama", "lora", "full", 2, 200, new_tokens=160),
    AccuracyJob("gemma", "lora", "full", 1, 320, evaluation=True, new_tokens=200),
    AccuracyJob("qwen3_moe", "lora", "none", 1, 128, new_tokens=60),
    AccuracyJob("deepseek", "full", "full", 2, 128, new_tokens=60),
    # adapters
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("use_dora", True),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("use_rslora", True), ("dropout", 0.1))),
    AccuracyJob("llama", "lora", "none", 2, 384, options=(("dropout", 0.05),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("modules_to_save", ("embed_tokens", "lm_head")),)),
    AccuracyJob("llama", "lora", "full", 2, 512, options=(("target_modules", ("q_proj", "v_proj")),)),
    AccuracyJob(
        "llama", "lora", "full", 2, 256, precision="bf16", options=(("adapter_dtype", "base"),), save=True
    ),
    # quantised
    AccuracyJob("llama", "qlora", "full", 2, 640, 2, options=(("double_quantization", False),)),
    AccuracyJob("llama", "qlora", "full", 2, 512, options=(("quantization", "fp4"),)),
    AccuracyJob("llama", "qlora", "full", 2, 512, options=(("quantization", "int8"),)),
    AccuracyJob("llama", "qlora", "none", 2, 256, options=(("quantization", "int8"),)),
    AccuracyJob("gemma", "qlora", "full", 2, 512),
    AccuracyJob("gemma", "qlora", "none", 2, 256, optimizer="paged_adamw_8bit"),
    AccuracyJob("qwen2", "qlora", "full", 4, 256, packing=False, loss="plain", evaluation=True),
    AccuracyJob("qwen2", "qlora", "none", 2, 256, options=(("use_dora", True),)),
    AccuracyJob("llama", "qlora", "full", 2, 256, precision="bf16", save=True),
    AccuracyJob("gpt2", "qlora", "full", 2, 256),
    # optimizers
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adamw_torch"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adamw_8bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="paged_adamw_32bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="lion_8bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="lion_32bit"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="adafactor"),
    AccuracyJob("llama", "full", "full", 2, 256, optimizer="sgd"),
    AccuracyJob("gemma", "full", "full", 2, 256, precision="bf16", optimizer="adafactor"),
    # architectures
    AccuracyJob("gemma", "lora", "full", 16, 288, 2),
    AccuracyJob("gemma", "full", "full", 2, 640),
    AccuracyJob("gemma", "full", "none", 1, 2048, loss="plain"),
    AccuracyJob("qwen2", "full", "full", 4, 256),
    AccuracyJob("qwen2", "full", "none", 2, 512, packing=False),
    AccuracyJob("gpt2", "lora", "none", 2, 512),
    AccuracyJob("gpt2", "full", "full", 2, 512, loss="plain"),
    AccuracyJob("qwen3_moe", "lora", "full", 2, 320),
    AccuracyJob("qwen3_moe", "full", "full", 2, 320, optimizer="adamw_8bit"),
    AccuracyJob("gpt_oss", "full", "none", 2, 192, attention="eager"),
    AccuracyJob("deepseek", "full", "none", 2, 192),
    AccuracyJob("deepseek", "qlora", "full", 2, 192),
    # optimizers that project gradients
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="galore_adamw"),
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="galore_adamw", precision="bf16"),
    AccuracyJob("qwen2", "full", "full", 2, 64, optimizer="galore_adafactor", precision="bf16"),
    AccuracyJob("llama", "full", "full", 2, 64, optimizer="apollo_adamw"),
    # evaluation that keeps its logits
    AccuracyJob("llama", "lora", "full", 2, 256, evaluation=True, keep_logits=5),
    AccuracyJob(
        "qwen2",
        "full",
        "full",
        2,
        200,
        precision="bf16",
        loss="plain",
        packing=False,
        evaluation=True,
        keep_logits=3,
    ),
    # tasks
    AccuracyJob("gemma3", "lora", "none", 2, 320, packing=False, evaluation=True, task=VISION),
    AccuracyJob("gemma3", "lora", "full", 2, 320, 2, packing=False, task=VISION),
    AccuracyJob("gemma3", "full", "none", 3, 160, packing=False, loss="plain", task=VISION),
    AccuracyJob("llava", "lora", "none", 2, 320, packing=False, task=VISION),
    AccuracyJob("gemma3", "lora", "none", 2, 320),
    AccuracyJob(
        "llama", "lora", "none", 4, 256, loss="plain", packing=False, evaluation=True, task=CLASSIFICATION
    ),
    AccuracyJob(
        "qwen2", "full", "full", 2, 320, 2, loss="plain", packing=False, evaluation=True, task=CLASSIFICATION
    ),
)
NUM_CI_JOBS = 12
NUM_LABELS = 5


def run_job(job: AccuracyJob) -> dict[str, Any]:
    """Traces and trains one job in this process; returns predicted and measured bytes per phase."""
    import torch  # noqa: PLC0415  # only the child process needs the heavy libraries
    from datasets import Dataset  # noqa: PLC0415

    from launcher import workload  # noqa: PLC0415
    from launcher.hardware import DeviceKind, HardwareSpec  # noqa: PLC0415
    from launcher.job import (  # noqa: PLC0415
        Attention,
        Checkpointing,
        DataSpec,
        EvaluationSpec,
        GenerationSpec,
        JobSpec,
        Loss,
        Method,
        MethodSpec,
        ModelSpec,
        Optimizer,
        Precision,
        StoredDtype,
        Task,
        TrainingSpec,
    )
    from launcher.plan import Plan  # noqa: PLC0415
    from launcher.planner import trace  # noqa: PLC0415
    from launcher.planner.estimate import read_estimate  # noqa: PLC0415
    from launcher.worker.ingredients import Ingredients  # noqa: PLC0415
    from launcher.worker.progress import Progress  # noqa: PLC0415
    from launcher.worker.train import train  # noqa: PLC0415

    torch.manual_seed(0)
    precision = Precision(job.precision)
    weight_dtype = workload.weight_dtype(precision)
    spec = JobSpec(
        model=ModelSpec(
            architecture=ARCHITECTURES[job.architecture],
            stored_dtype=StoredDtype.BF16 if weight_dtype is torch.bfloat16 else StoredDtype.FP32,
            task=Task(job.task),
            num_labels=NUM_LABELS,
        ),
        method=TypeAdapter(MethodSpec).validate_python(dict(job.options)),
        data=DataSpec(packing=job.packing, images_per_example=IMAGES),
        training=TrainingSpec(max_steps=3, save_steps=2 if job.save else None, report_to=()),
        evaluation=EvaluationSpec(
            enabled=job.evaluation,
            steps=2,
            num_examples=(job.keep_logits or 2) * job.micro_batch_size,
            keep_logits=job.keep_logits > 0,
        ),
        generation=GenerationSpec(
            enabled=job.new_tokens > 0,
            num_prompts=2 * job.micro_batch_size,
            batch_size=2 * job.micro_batch_size,
            prompt_length=job.length // 2,
            max_new_tokens=max(2, job.new_tokens),
        ),
        hardware=HardwareSpec(kind=DeviceKind.CPU),
    )
    plan = Plan(
        method=Method(job.method),
        rank=0 if job.method == "full" else 16,
        max_length=job.length,
        micro_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.accumulation,
        activation_checkpointing=Checkpointing(job.checkpointing),
        attention=Attention(job.attention),
        loss=Loss(job.loss),
        optimizer=Optimizer(job.optimizer),
        precision=precision,
    )
    config = workload.model_config("", spec.model)
    subject = trace.TraceSubject(spec, plan, spec.hardware, config)
    skyline = trace.trace_regime(subject, job.micro_batch_size, job.length, job.accumulation)
    predicted = read_estimate(skyline, plan, spec).phases

    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights")
        auto_class = workload.AUTO_CLASSES[spec.model.task]
        auto_class.from_config(config, dtype=weight_dtype).save_pretrained(weights)

        def load() -> torch.nn.Module:
            return workload.build_model(workload.model_config(weights, spec.model), plan, weights, spec)

        ingredients = Ingredients(
            load=load,
            adapt=lambda model: workload.attach_adapters(model, spec, plan),
            train_dataset=Dataset.from_list(_rows(job, 3 * job.micro_batch_size * job.accumulation)),
            eval_dataset=Dataset.from_list(_rows(job, spec.evaluation.num_examples))
            if job.evaluation
            else None,
            tokenizer=_processing(job),
            changes={
                "use_cpu": True,
                "save_strategy": "steps" if job.save else "no",
                "save_steps": 2,
                "report_to": [],
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "dataloader_pin_memory": False,
                "train_sampling_strategy": "sequential",
            },
            output_dir=Path(folder) / "checkpoints",
            prompts=_prompts(job) if job.new_tokens else (),
        )
        _, measured = train(spec, plan, ingredients, Progress(), lambda line: None)
    return {
        "job": job.name,
        "predicted_bytes": {peak.phase.value: peak.allocated_bytes for peak in predicted},
        "measured_bytes": {peak.phase.value: peak.allocated_bytes for peak in measured.phases},
    }


def _processing(job: AccuracyJob) -> Any:
    """A tokenizer for rows of token ids, or a processor for images."""
    from launcher.planner.rehearsal import blank_tokenizer  # noqa: PLC0415

    return small_vision.small_processor(job.architecture) if job.task == VISION else blank_tokenizer()


def _prompts(job: AccuracyJob) -> tuple[Batch, ...]:
    """One batch of random prompts, one of them shorter than the others."""
    import torch  # noqa: PLC0415  # only the child process needs the heavy libraries

    shape = (2 * job.micro_batch_size, job.length // 2)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, :3] = 0
    return ((torch.randint(2, ARCHITECTURES[job.architecture]["vocab_size"], shape), mask),)


def _rows(job: AccuracyJob, count: int) -> list[dict[str, Any]]:
    """Random rows; without packing every other one is shorter, so that each batch has padding."""
    if job.task == VISION:
        return small_vision.rows_with_images(count, job.length, IMAGES)
    rng = random.Random(0)
    facts = ARCHITECTURES[job.architecture]
    vocabulary = facts.get("text_config", facts)["vocab_size"]
    lengths = [job.length if job.packing or index % 2 == 0 else job.length // 2 for index in range(count)]
    rows: list[dict[str, Any]] = [
        {"input_ids": [rng.randrange(2, vocabulary) for _ in range(length)]} for length in lengths
    ]
    if job.task == CLASSIFICATION:
        rows = [{**row, "label": number % NUM_LABELS} for number, row in enumerate(rows)]
    return rows


class JobFailed(Exception):
    """A job that could not be traced or trained, with the end of what it printed."""


def measure(job: AccuracyJob) -> dict[str, Any]:
    """Runs one job in a process of its own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "scripts.accuracy", "--job", str(JOBS.index(job))]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if child.returncode:
        raise JobFailed(f"{job.name} failed:\n{child.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def peak_error_percent(result: dict[str, Any]) -> float:
    """Signed error of the highest peak, percent of the measurement."""
    measured = max(result["measured_bytes"].values())
    predicted = max(result["predicted_bytes"][phase] for phase in result["measured_bytes"])
    return 100.0 * float(predicted - measured) / float(measured)


def phase_error_percent(result: dict[str, Any], phase: str) -> float | None:
    """Signed error of the peak of one phase; None where the job has no such phase."""
    if phase not in result["measured_bytes"]:
        return None
    measured = result["measured_bytes"][phase]
    return 100.0 * float(result["predicted_bytes"][phase] - measured) / float(measured)


PHASES = ("load", "train_step", "optimizer_step", "evaluation", "generation", "save")


def table(results: list[dict[str, Any]]) -> str:
    """The results as a markdown table, under-predictions first."""
    lines = [
        "| job | predicted peak, MiB | measured peak, MiB | error | " + " | ".join(PHASES) + " |",
        "|---|--:|--:|--:|" + "--:|" * len(PHASES),
    ]
    for result in sorted(results, key=peak_error_percent):
        measured = max(result["measured_bytes"].values())
        predicted = max(result["predicted_bytes"][phase] for phase in result["measured_bytes"])
        errors = [phase_error_percent(result, phase) for phase in PHASES]
        by_phase = " | ".join("" if error is None else f"{error:+.3f} %" for error in errors)
        lines.append(
            f"| {result['job']} | {predicted / 2**20:.2f} | {measured / 2**20:.2f} "
            f"| {peak_error_percent(result):+.3f} % | {by_phase} |"
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


def evidence(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The residuals of the results, as the planner reads them (launcher/planner/interval.py)."""
    jobs = {job.name: job for job in JOBS}
    return [
        {
            "device_kind": "cpu",
            "method": jobs[result["job"]].method,
            "model_type": ARCHITECTURES[jobs[result["job"]].architecture]["model_type"],
            "predicted_bytes": max(result["predicted_bytes"][phase] for phase in result["measured_bytes"]),
            "measured_bytes": max(result["measured_bytes"].values()),
        }
        for result in results
    ]


def write_report(results: list[dict[str, Any]]) -> None:
    """Writes the dated data file, the page generated from it, and the evidence that the planner's intervals rest on."""
    kept = json.dumps(evidence(results), indent=1) + "\n"
    (ROOT / "launcher" / "planner" / "evidence" / "cpu.json").write_text(kept, encoding="utf-8")
    today = datetime.date.today().isoformat()
    versions = {name: version(name) for name in LIBRARIES}
    data = {"date": today, "machine": platform.machine(), "versions": versions, "results": results}
    target = ROOT / "docs" / "accuracy" / f"{today}-cpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = [
        "# Accuracy",
        "",
        "Generated by `python -m scripts.accuracy --write`; the data lie in docs/accuracy/. Signed errors,",
        "under-predictions first. Measured: allocator-level peak of real training on CPU, from the profiler's",
        "memory events. Predicted: the skyline of a trace at another, prime-numbered shape, extended over depth.",
        "The error is that of the highest peak over all phases. `load` depends on how far the threads that read",
        "weights run ahead, and varies from run to run.",
        "",
        f"{today}, " + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        table(results),
        "",
        summary(results),
        "",
        "docs/gpu.md compares with what an NVIDIA H200 and an H100 did, docs/published.md with what others measured on",
        "A100 cards.",
        "",
    ]
    (ROOT / "docs" / "accuracy.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=int, help="run one job in this process and print JSON")
    parser.add_argument("--only", type=int, nargs="+", help="the jobs of these numbers")
    parser.add_argument("--subset", type=int, default=len(JOBS), help="only the first so many jobs")
    parser.add_argument(
        "--write", action="store_true", help="write docs/accuracy and launcher/planner/evidence/cpu.json"
    )
    parser.add_argument("--page", type=Path, help="write them from the results of this data file")
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_job(JOBS[options.job])))
        return
    if options.page is not None:
        write_report(json.loads(options.page.read_text(encoding="utf-8"))["results"])
        return
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    chosen = JOBS[: options.subset] if options.only is None else [JOBS[number] for number in options.only]
    for job in chosen:
        try:
            results.append(measure(job))
        except JobFailed as failure:
            print(failure, file=sys.stderr, flush=True)
            failed.append(job.name)
            continue
        errors = {phase: phase_error_percent(results[-1], phase) for phase in PHASES}
        words = [f"{phase} {error:+.3f} %" for phase, error in errors.items() if error is not None]
        print(
            f"{JOBS.index(job)} {job.name}: {peak_error_percent(results[-1]):+.3f} % ({', '.join(words)})",
            file=sys.stderr,
            flush=True,
        )
    if failed:
        raise SystemExit(f"failed: {failed}")
    print(table(results))
    print(summary(results))
    if options.write:
        write_report(results)


if __name__ == "__main__":
    main()
