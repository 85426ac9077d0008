"""Runs one job for real and leaves what it measured.

    python -m scripts.gpu_validation.device_run

imports the libraries, then waits for one line on stdin: the order. So the next process can get ready while the
last one has the device.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from launcher import workload
from launcher.documents import from_json, write_document
from launcher.hardware import DeviceKind
from launcher.job import JobSpec
from launcher.memory import MemoryMeasurement
from launcher.plan import Plan
from launcher.worker.ingredients import Ingredients
from launcher.worker.progress import Progress
from launcher.worker.train import train
from scripts.gpu_validation.jobs import ValidationJob, architecture, by_name, plan_of, spec_of
from scripts.gpu_validation.orders import RunOrder
from scripts.gpu_validation.results import Outcome, PhaseBytes, Status
from scripts.gpu_validation.snapshot import Recording, write_timeline
from scripts.gpu_validation.weights import load_random, load_stored, store

SNAPSHOT_STEPS = 2
"""Optimizer steps of a rerun with a timeline: the peak is in the second, the optimizer's state is born in the first."""


def run(order: RunOrder) -> Outcome:
    """Trains as ordered, with the launcher's own training loop and meter."""
    job = by_name()[order.name]
    spec = spec_of(job, order.hardware)
    if order.snapshot:
        spec = replace(spec, training=replace(spec.training, max_steps=SNAPSHOT_STEPS))
    began = time.perf_counter()
    progress = Progress(step_ends=_DeviceTimes())
    with tempfile.TemporaryDirectory() as folder:
        try:
            measurement = _train(job, spec, Path(folder), order.snapshot, progress)
        except (torch.OutOfMemoryError, MemoryError) as failure:
            return Outcome(Status.OUT_OF_MEMORY, str(failure)[:600], time.perf_counter() - began)
    return Outcome(
        status=Status.DONE,
        message=", ".join(f"{shape.micro_batch_size} x {shape.length}" for shape in measurement.shapes),
        seconds=time.perf_counter() - began,
        measured={
            peak.phase: PhaseBytes(
                peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes, peak.by_category_bytes
            )
            for peak in measurement.phases
        },
        resident_bytes=measurement.resident_bytes,
        allocator_retries=(
            torch.cuda.memory_stats().get("num_alloc_retries") if torch.cuda.is_available() else None
        ),
        step_seconds=tuple(end - start for start, end in pairwise(progress.step_ends)),
    )


class _DeviceTimes(list[float]):
    """Ends of steps, each when the device has done what it was given."""

    def append(self, _: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().append(time.perf_counter())


def _train(
    job: ValidationJob, spec: JobSpec, folder: Path, snapshot: str, progress: Progress
) -> MemoryMeasurement:
    plan = plan_of(job)
    config = workload.model_config("", spec.model)
    stored = folder / "weights"
    if job.stored:
        store(config, spec, plan, stored)
    recording = Recording() if snapshot else None

    def load() -> nn.Module:
        _say("building the model")
        model = load_stored(stored, spec, plan) if job.stored else load_random(config, spec, plan)
        if recording is not None:
            recording.watch(model)
        _say("training")
        return model

    _, measurement = train(spec, plan, _ingredients(job, spec, plan, folder, load), progress, _say)
    if recording is not None:
        write_timeline(Path(snapshot), job.name, recording.stop())
    return measurement


def _ingredients(
    job: ValidationJob, spec: JobSpec, plan: Plan, folder: Path, load: Callable[[], nn.Module]
) -> Ingredients:
    on_cpu = spec.hardware.kind is DeviceKind.CPU
    steps = spec.training.max_steps or 0
    return Ingredients(
        load=load,
        train_dataset=_rows(job, steps * plan.micro_batch_size * plan.gradient_accumulation_steps),
        eval_dataset=_rows(job, 2 * plan.micro_batch_size) if job.evaluation else None,
        tokenizer=_tokenizer(),
        # as launcher.worker.ingredients.prepare, and rows that are tokens already
        changes={
            "use_cpu": on_cpu,
            "save_strategy": "steps" if job.save else "no",
            "save_steps": spec.training.steps_between_saves or 500,
            "report_to": [],
            "dataloader_pin_memory": not on_cpu,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "train_sampling_strategy": "sequential",
        },
        output_dir=folder / "checkpoints",
    )


def _rows(job: ValidationJob, count: int) -> Dataset:
    """Random rows; without packing every other one is shorter, so that each batch of several has padding."""
    rng = random.Random(0)
    facts = architecture(job)
    vocabulary = facts.get("text_config", facts)["vocab_size"]
    lengths = [job.length if job.packing or index % 2 == 0 else job.length // 2 for index in range(count)]
    return Dataset.from_list(
        [{"input_ids": [rng.randrange(3, vocabulary) for _ in range(length)]} for length in lengths]
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One of two words: the trainer asks for a tokenizer, rows that are tokens already need none."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    line = sys.stdin.readline()
    if line.strip():  # else nobody needs this process any more
        order = from_json(RunOrder, line)
        write_document(Path(order.outcome), run(order))


if __name__ == "__main__":
    main()
