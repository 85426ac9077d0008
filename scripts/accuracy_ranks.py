"""Predicted and measured peak of every rank: real DeepSpeed, FSDP2 and DDP jobs on CPU, over gloo.

Each job is planned by hand, predicted by the planner's own forecaster, run by `accelerate launch`, and measured by the
allocator of every rank. Writes docs/accuracy/<date>-ranks.json after each job, and goes on after those that
are in it with the same libraries, each with its date: take those out that the code's changes concern.

    python -m scripts.accuracy_ranks [--only TEXT] [--out FILE]
    python -m scripts.accuracy_ranks --page         writes docs/ranks.md from the newest data file
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.cluster import LaunchSpec
from launcher.documents import read_document, write_text
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
    OffloadDevice,
    Optimizer,
    Precision,
    StoredDtype,
    TrainingSpec,
)
from launcher.memory import MemoryEstimate, MemoryMeasurement, Phase
from launcher.plan import Plan
from launcher.planner.buckets import default_buckets
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import TraceCache, library_versions
from launcher.planner.tracer import Tracer
from launcher.run.endings import raise_for_outcome
from launcher.run.launch import launch_worker, prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder, WorkerOutcome
from scripts.small_text import write_small_model

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GROUP_ELEMENTS = 345_000
"""A little less than the 362,496 elements of a layer that each of two ranks holds."""
STEPS = 3
TEXT, NUM_ROWS = "the step reads the plan. " * 40, 200
"""What every row of the data says, a thousand tokens; and rows: enough for every job's steps."""
WITHIN = 0.02
"""What each rank's peak may be off by."""
SHOWN = ("torch", "deepspeed", "accelerate", "transformers")
PHASES = (Phase.LOAD, Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP, Phase.SAVE)
ARRANGEMENTS = {
    "ddp": (Engine.DDP, 0),
    "zero1": (Engine.DEEPSPEED, 1),
    "zero2": (Engine.DEEPSPEED, 2),
    "zero3": (Engine.DEEPSPEED, 3),
    "fsdp2": (Engine.FSDP2, 3),
}
"""Engine and stage, by what the jobs call them."""


@dataclass(frozen=True)
class RankJob:
    """One job on several processes."""

    name: str
    plan: Plan


def jobs() -> Iterator[RankJob]:
    """Stages 0 to 3 and FSDP2 x full and LoRA x checkpointing x two shapes; offload; four processes; QLoRA; autocast."""
    for label, (engine, stage) in ARRANGEMENTS.items():
        for method in (Method.FULL, Method.LORA):
            for mode in (Checkpointing.NONE, Checkpointing.FULL):
                for micro, length, accumulation in ((1, 384, 2), (4, 192, 1)):
                    name = f"{label}-{method.value}-{mode.value}-{micro}x{length}x{accumulation}"
                    yield RankJob(name, plan_of(engine, stage, method, mode, micro, length, accumulation))
    for label, stage, offloaded in (
        ("zero2-offload", 2, {"offload_optimizer": True}),
        ("zero3-offload", 3, {"offload_optimizer": True}),
        ("zero3-offload-all", 3, {"offload_optimizer": True, "offload_parameters": True}),
    ):
        for micro, length, accumulation in ((1, 384, 2), (4, 192, 1)):
            name = f"{label}-full-none-{micro}x{length}x{accumulation}"
            shape = micro, length, accumulation
            plan = plan_of(Engine.DEEPSPEED, stage, Method.FULL, Checkpointing.NONE, *shape, **offloaded)
            yield RankJob(name, plan)
        plan = plan_of(
            Engine.DEEPSPEED, stage, Method.FULL, Checkpointing.NONE, 1, 384, 2, num_devices=1, **offloaded
        )
        yield RankJob(f"{label}-full-none-1x384x2-1rank", plan)
    plan = plan_of(Engine.DEEPSPEED, 3, Method.FULL, Checkpointing.NONE, 1, 384, 2)
    if plan.buckets is not None:
        plan = replace(plan, buckets=replace(plan.buckets, sub_group_elements=GROUP_ELEMENTS))
    yield RankJob("zero3-full-none-1x384x2-groups", plan)
    for method, num_devices in ((Method.FULL, 1), (Method.FULL, 2), (Method.LORA, 1)):
        plan = swapping_plan(method, num_devices)
        ranks = f"{num_devices}rank{'s' if num_devices > 1 else ''}"
        yield RankJob(f"zero3-nvme-{method.value}-none-1x384x2-{ranks}", plan)
    for label, (engine, stage) in ARRANGEMENTS.items():
        for method in (Method.FULL, Method.LORA):
            for mode in (Checkpointing.NONE, Checkpointing.FULL):
                plan = plan_of(engine, stage, method, mode, 1, 384, 2, num_devices=4)
                yield RankJob(f"{label}-{method.value}-{mode.value}-1x384x2-4ranks", plan)
        plan = plan_of(engine, stage, Method.LORA, Checkpointing.NONE, 1, 384, 2)
        yield RankJob(
            f"{label}-lora-none-1x384x2-bf16_autocast", replace(plan, precision=Precision.BF16_AUTOCAST)
        )
        plan = plan_of(engine, stage, Method.QLORA, Checkpointing.NONE, 1, 384, 2)
        yield RankJob(f"{label}-qlora-none-1x384x2", plan)


def plan_of(
    engine: Engine,
    stage: int,
    method: Method,
    mode: Checkpointing,
    micro: int,
    length: int,
    accumulation: int,
    num_devices: int = 2,
    **changes: Any,
) -> Plan:
    """A plan for the model of this benchmark."""
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 16,
        max_length=length,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=mode,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH,
        precision=Precision.FP32,
        engine=engine,
        num_devices=num_devices,
        zero_stage=stage,
        **changes,
    )
    return replace(plan, buckets=default_buckets(ARCHITECTURE, plan))


def swapping_plan(method: Method, num_devices: int) -> Plan:
    """A plan with optimizer states on NVMe, in groups of a layer: those, the embedding and the head are large enough."""
    plan = plan_of(
        Engine.DEEPSPEED,
        3,
        method,
        Checkpointing.NONE,
        1,
        384,
        2,
        num_devices=num_devices,
        offload_optimizer=True,
        offload_device=OffloadDevice.NVME,
    )
    if plan.buckets is None or method is not Method.FULL:
        return plan
    elements = 2 * GROUP_ELEMENTS // num_devices
    return replace(plan, buckets=replace(plan.buckets, sub_group_elements=elements))


def job_of(plan: Plan, folder: Path) -> JobSpec:
    """The job of a plan, on the model in a folder."""
    return JobSpec(
        model=ModelSpec(path=str(folder), architecture=ARCHITECTURE, stored_dtype=StoredDtype.FP32),
        method=MethodSpec(name=plan.method, rank=max(1, plan.rank)),
        data=DataSpec(
            path=str(folder / "train.jsonl"), format=DataFormat.TEXT, max_length=plan.max_length, packing=True
        ),
        training=TrainingSpec(
            global_batch_size=plan.global_batch_size,
            max_steps=STEPS,
            precision=plan.precision,
            optimizer=plan.optimizer,
            report_to=(),
        ),
        launch=LaunchSpec(rehearse=False),
        hardware=HardwareSpec(
            name="cpu",
            kind=DeviceKind.CPU,
            num_devices=plan.num_devices,
            memory_bytes=1 << 34,
            nvme_path=str(folder) if plan.swaps else "",
        ),
    )


def write_model(folder: Path) -> None:
    """A random model of the architecture, a tokenizer and text."""
    write_small_model(folder, ARCHITECTURE, TEXT, NUM_ROWS)


def predict(job: JobSpec, plan: Plan) -> MemoryEstimate:
    """What the planner says of a plan."""
    with Tracer(("deepspeed",) if plan.engine is Engine.DEEPSPEED else ()) as tracer:
        return Forecaster(job, tracer, TraceCache(None)).estimate(plan, exact=True)


def measure(
    job: JobSpec, plan: Plan, predicted: MemoryEstimate, folder: Path
) -> tuple[WorkerOutcome, list[MemoryMeasurement]]:
    """How a run ended, and what each rank really took."""
    paths = RunPaths(folder / "run")
    prepare_run(paths, WorkerOrder(job, plan, predicted, job.model.path, ""), {})
    outcome = launch_worker(paths, WorkerOrder(job, plan, predicted, job.model.path, ""), lambda line: None)
    raise_for_outcome(outcome, paths, plan.world_size)
    ranks = range(plan.world_size)
    return outcome, [read_document(paths.measured(rank), MemoryMeasurement) for rank in ranks]


def compare(entry: RankJob, model: Path) -> dict[str, Any]:
    """Predicts, runs, and sets both side by side."""
    job = job_of(entry.plan, model)
    began = time.perf_counter()
    predicted = predict(job, entry.plan)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        outcome, measured = measure(job, entry.plan, predicted, Path(folder))
    phases: dict[str, Any] = {}
    for phase in PHASES:
        expected = predicted.phase(phase)
        taken = [found.allocated_bytes if (found := rank.phase(phase)) else None for rank in measured]
        if expected is not None and None not in taken:
            phases[phase.value] = {
                "predicted_bytes": expected.allocated_bytes,
                "measured_bytes": taken,
                "errors": [expected.allocated_bytes / size - 1 for size in taken if size],
            }
    highest = [rank.peak_allocated_bytes for rank in measured]
    return {
        "name": entry.name,
        "ranks": entry.plan.world_size,
        "predicted_bytes": predicted.peak_allocated_bytes,
        "measured_bytes": highest,
        "errors": [predicted.peak_allocated_bytes / size - 1 for size in highest],
        "phases": phases,
        "nvme_bytes": 0 if predicted.nvme is None else predicted.nvme.file_bytes,
        "last_loss": outcome.last_loss,
        "predicting_seconds": round(seconds, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }


def page(document: dict[str, Any]) -> str:
    """The jobs as a table, the lowest prediction first.

    Args:
        document: What the data file holds.
    """
    jobs_found = document["jobs"]
    worst = [max(result["errors"], key=abs) for result in jobs_found]
    within = sum(abs(error) <= WITHIN for result in jobs_found for error in result["errors"])
    ranks = sum(len(result["errors"]) for result in jobs_found)
    dates = sorted(result["date"] for result in jobs_found)
    lines = [
        "# Predicted and measured peak of every rank",
        "",
        f"Generated by `python -m scripts.accuracy_ranks --page` from docs/accuracy/{document['date']}-ranks.json: "
        f"{len(jobs_found)} real jobs on several processes of a CPU, over gloo, measured {dates[0]} to {dates[-1]}; a "
        "Llama of 6 layers, fp32 but where the name says another precision, the allocator's peak of every rank. The name "
        "of a job: engine and stage, method, what is recomputed, micro batch x length x accumulation. "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items() if name in SHOWN)
        + ".",
        "",
        f"{within} of {ranks} ranks within 2 %; the median of the jobs' largest errors is "
        f"{100 * statistics.median(map(abs, worst)):.3f} %, the lowest {100 * min(worst):+.2f} %, the highest "
        f"{100 * max(worst):+.2f} %. Phases are compared with the rank that takes most.",
        "",
        "| job | predicted peak, MiB | measured, MiB | errors | load | train_step | optimizer_step | save | date |",
        "|---|--:|---|---|--:|--:|--:|--:|---|",
    ]
    for result in sorted(jobs_found, key=lambda item: float(min(item["errors"]))):
        phases = [result["phases"].get(phase.value) for phase in PHASES]
        errors = [
            f"{100 * (phase['predicted_bytes'] / max(phase['measured_bytes']) - 1):+.2f} %" if phase else ""
            for phase in phases
        ]
        lines.append(
            f"| {result['name']} | {result['predicted_bytes'] / (1 << 20):.2f} | "
            f"{', '.join(f'{size / (1 << 20):.2f}' for size in result['measured_bytes'])} | "
            f"{', '.join(f'{100 * error:+.3f} %' for error in result['errors'])} | {' | '.join(errors)} | "
            f"{result['date']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the jobs and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="jobs whose name has this text")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file; default: docs/accuracy/<date>-ranks.json"
    )
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        newest = max((ROOT / "docs" / "accuracy").glob("????-??-??-ranks.json"))
        write_text(ROOT / "docs" / "ranks.md", page(json.loads(newest.read_text(encoding="utf-8"))))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    date = datetime.now(UTC).date().isoformat()
    out = arguments.out or ROOT / "docs" / "accuracy" / f"{date}-ranks.json"
    versions = dict(library_versions())
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    results = earlier["jobs"] if earlier.get("versions") == versions else []
    done = {result["name"] for result in results}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for entry in jobs():
            if arguments.only not in entry.name or entry.name in done:
                continue
            result = compare(entry, Path(folder))
            results.append(result)
            errors = " ".join(f"{error:+.2%}" for error in result["errors"])
            print(f"{entry.name:40} {result['predicted_bytes'] / 1e6:9.2f} MB  {errors}", flush=True)
            for name, phase in result["phases"].items():
                sizes = " ".join(f"{size / 1e6:9.2f}" for size in phase["measured_bytes"])
                print(f"    {name:16} {phase['predicted_bytes'] / 1e6:9.2f} {sizes}", flush=True)
            document = {
                "date": date,
                "versions": versions,
                "architecture": ARCHITECTURE,
                "jobs": results,
            }
            write_text(
                out, json.dumps(document, indent=1) + "\n"
            )  # after each: all of them take half an hour
    return 0


if __name__ == "__main__":
    sys.exit(main())
