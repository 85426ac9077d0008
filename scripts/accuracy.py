"""Predicted against measured peak memory on CPU, over real training jobs of small random models.

Each job runs in a process of its own, forked from one that has imported the libraries: the same workload is traced on
fake tensors and trained on real ones, and the measurement comes from the profiler's allocator events, never from the
tracer.

    python -m scripts.accuracy                     all jobs; prints the table
    python -m scripts.accuracy --write             also writes docs/accuracy/<date>-cpu.json and docs/accuracy.md
    python -m scripts.accuracy --subset 4          the first four jobs
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from scripts import small_vision
from scripts.accuracy_jobs import ARCHITECTURES, CLASSIFICATION, IMAGES, JOBS, NUM_LABELS, VISION, AccuracyJob
from scripts.accuracy_page import (
    PHASES,
    peak_error_percent,
    phase_error_percent,
    summary,
    table,
    write_report,
)

if TYPE_CHECKING:
    from launcher.worker.prompts import Batch

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "datasets", "launcher.planner.trace", "launcher.worker.train")
"""What each job would import for itself: six seconds."""
RESULT, FAILED = "result: ", "failed"
"""How the lines begin that tell how a job went."""


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
        "date": datetime.now(UTC).date().isoformat(),
        "predicted_bytes": {peak.phase.value: peak.allocated_bytes for peak in predicted},
        "measured_bytes": {peak.phase.value: peak.allocated_bytes for peak in measured.phases},
        "predicted_categories_bytes": {peak.phase.value: peak.by_category_bytes for peak in predicted},
        "measured_categories_bytes": {peak.phase.value: peak.by_category_bytes for peak in measured.phases},
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


class Bench:
    """Runs jobs one after another, each in a process of its own."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the bench
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "scripts.accuracy", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def measure(self, job: AccuracyJob) -> dict[str, Any]:
        """Traces and trains a job; predicted and measured bytes per phase.

        Raises:
            JobFailed: When it could not be traced or trained.
        """
        assert self._server.stdin is not None and self._server.stdout is not None  # both are pipes
        begin = self._log.seek(0, os.SEEK_END)
        self._server.stdin.write(f"{JOBS.index(job)}\n")
        self._server.stdin.flush()
        for line in self._server.stdout:
            if line.startswith(RESULT):
                result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                return result
            if line.startswith(FAILED):
                break
        self._log.seek(begin)
        raise JobFailed(f"{job.name} failed:\n{self._log.read()[-3000:]}")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *failure: object) -> None:
        self._server.kill()
        self._server.wait()
        self._log.close()


def serve(numbers: Iterable[str]) -> None:
    """Runs the jobs of these numbers, each in a fork of this process, which imports what all of them need."""
    for name in HEAVY:
        importlib.import_module(name)
    for number in numbers:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = 1
            try:
                print(f"{RESULT}{json.dumps(run_job(JOBS[int(number)]))}", flush=True)
                status = 0
            except BaseException:  # the border of a process: its log says what it was
                traceback.print_exc()
            os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(FAILED, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve", action="store_true", help="run the jobs whose numbers come on stdin")
    parser.add_argument("--only", type=int, nargs="+", help="the jobs of these numbers")
    parser.add_argument("--subset", type=int, default=len(JOBS), help="only the first so many jobs")
    parser.add_argument(
        "--write", action="store_true", help="write docs/accuracy and launcher/planner/evidence/cpu.json"
    )
    parser.add_argument("--page", type=Path, help="write them from the results of this data file")
    options = parser.parse_args()
    if options.serve:
        serve(sys.stdin)
        return
    if options.page is not None:
        document = json.loads(options.page.read_text(encoding="utf-8"))
        write_report([{"date": document["date"], **result} for result in document["results"]])
        return
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    chosen = JOBS[: options.subset] if options.only is None else [JOBS[number] for number in options.only]
    with Bench() as bench:
        for job in chosen:
            try:
                results.append(bench.measure(job))
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
