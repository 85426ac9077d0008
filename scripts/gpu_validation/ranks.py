"""Predicted and measured memory of every rank: real DDP, DeepSpeed and FSDP2 jobs of two ranks that share one CUDA card.

    python -m scripts.gpu_validation.ranks --out ranks.json         all jobs, most informative first, for nine minutes
    python -m scripts.gpu_validation.ranks --out ranks.json         again: what is left, and what did not end well
    python -m scripts.gpu_validation.ranks --table ranks.json       the comparison as a markdown table
    python -m scripts.gpu_validation.ranks --repredict ranks.json   today's predictions in place of those in the file
    python -m scripts.gpu_validation.ranks --cpu --out ranks.json   the same jobs, small, over gloo on a CPU

Each rank is started as a node of its own, with the launcher's own command and worker, and meets the other one over NCCL.
Predictions are made on the CPU while the card works, from plan and hardware alone. The file is written after each job.

What a rank holds on the card (`device_bytes`) is right where NVML lists its process; where it does not, the other
ranks' memory is counted too (see `launcher.worker.meter.CudaMeter`). Allocated and reserved bytes are each rank's own.

It needs what `python -m scripts.gpu_validation` needs, and DeepSpeed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from launcher.documents import read_document, write_document
from launcher.errors import LauncherError, LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.memory import MemoryEstimate, Phase, PhasePeak
from launcher.planner.trace_cache import library_versions
from launcher.run.launch import prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from scripts.accuracy_ranks import NUM_ROWS, TEXT, RankJob
from scripts.gpu_validation.processes import tracer_environment
from scripts.gpu_validation.rank_jobs import bench_of, rank_jobs, spec_of
from scripts.gpu_validation.rank_predict import RankAnswer, RankPredictor, RankSubject
from scripts.gpu_validation.rank_results import (
    RankResult,
    RankResults,
    rank_line,
    rank_table,
    result_of,
    waiting_jobs,
    with_estimate,
    with_rank_result,
)
from scripts.gpu_validation.rank_run import SETTINGS, RankRun, free_port, run_ranks
from scripts.gpu_validation.results import Status
from scripts.gpu_validation.schedule import detect_hardware
from scripts.small_text import write_small_model

SHORTEST_SECONDS = 40.0
"""With less time than this no job is begun: libraries alone take a third of it."""
TRACE_SECONDS = 90.0
"""How long one prediction is waited for when its job has run; nearly all are there before."""
UNKNOWN = MemoryEstimate((PhasePeak(Phase.LOAD, 0, {}),), {}, 0)
"""What the ranks are told of the prediction, which is made at the same time: nothing."""


@dataclass(frozen=True)
class Order:
    """What to do."""

    out: Path
    """The results file; one that exists is continued."""
    jobs: tuple[RankJob, ...]
    """Most informative first."""
    hardware: HardwareSpec
    """The device at hand, one of it."""
    budget_seconds: float
    limit_seconds: float
    """For each job."""
    parallel: int
    """Jobs that run at a time."""


def new_results(hardware: HardwareSpec) -> RankResults:
    """A file without jobs, with what there is to say of this machine."""
    return RankResults(
        date=datetime.now(UTC).date().isoformat(),
        device=hardware.product or hardware.name,
        hardware=hardware,
        versions=library_versions() | _device_versions(hardware),
        environment={**SETTINGS, "NCCL_HOSTID": "<job>-rank-<rank>"},
        architecture=dict(bench_of(hardware).architecture),
    )


def _device_versions(hardware: HardwareSpec) -> dict[str, str]:
    if hardware.kind is DeviceKind.CPU:
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # needs no device
    return {"cuda": str(torch.version.cuda), "nccl": nccl}


def known_results(out: Path, hardware: HardwareSpec) -> RankResults:
    """The results file, or a new one.

    Raises:
        LaunchError: When the file is of another device.
    """
    if not out.exists():
        return new_results(hardware)
    results = read_document(out, RankResults)
    if results.device != (hardware.product or hardware.name):
        raise LaunchError(f"`{out}` was measured on {results.device}", "give another file")
    return results


def validate(order: Order, folder: Path, say: Callable[[str], None]) -> RankResults:
    """Runs what is left of the jobs until the time is up.

    Args:
        order: What to do.
        folder: For the model, run directories and predictions.
        say: Called with a line after each job.

    Raises:
        LaunchError: When the results file is of another device.
    """
    ends_at = time.monotonic() + order.budget_seconds
    results = known_results(order.out, order.hardware)
    waiting = waiting_jobs(order.jobs, results.jobs)
    if not waiting:
        return results
    with _predictor(waiting, order.hardware, folder) as predictor, _stopping() as stop:
        model = _written_model(order.hardware, folder)
        with ThreadPoolExecutor(order.parallel) as pool:
            futures = {
                pool.submit(_run, entry, order, model, folder, ends_at, stop): entry for entry in waiting
            }
            try:
                for future in as_completed(futures):
                    entry, run = futures[future], future.result()
                    if run is None:
                        say(f"time is up, {entry.name} is left for another call")
                        continue
                    results = with_rank_result(results, result_of(entry, run))
                    write_document(order.out, results)  # before its prediction is waited for
                    result = _completed(result_of(entry, run), predictor.answer(entry.name, TRACE_SECONDS))
                    results = with_rank_result(results, result)
                    write_document(order.out, results)
                    say(rank_line(result))
            finally:
                stop.set()  # before the pool waits for its threads
    return results


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that is set when this is left, however it is."""
    stop = threading.Event()
    try:
        yield stop
    finally:
        stop.set()


def _predictor(entries: Sequence[RankJob], hardware: HardwareSpec, folder: Path) -> RankPredictor:
    subjects = [
        RankSubject(entry.name, spec_of(entry.plan, hardware, Path()), entry.plan) for entry in entries
    ]
    return RankPredictor(subjects, tracer_environment(os.environ), folder)


def _written_model(hardware: HardwareSpec, folder: Path) -> Path:
    """A random model with its tokenizer and data, once for all jobs."""
    bench, model = bench_of(hardware), folder / "model"
    model.mkdir()
    dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[bench.stored_dtype.value])
    write_small_model(model, bench.architecture, TEXT, NUM_ROWS, dtype)
    return model


def _run(
    entry: RankJob, order: Order, model: Path, folder: Path, ends_at: float, stop: threading.Event
) -> RankRun | None:
    """Runs one job; None when there is no time for it."""
    seconds = min(order.limit_seconds, ends_at - time.monotonic())
    if stop.is_set() or seconds < min(SHORTEST_SECONDS, order.limit_seconds):
        return None
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:  # checkpoints take gigabytes
            spec = spec_of(entry.plan, order.hardware, model, free_port())
            paths = RunPaths(Path(place) / "run")
            task = WorkerOrder(spec, entry.plan, UNKNOWN, str(model), "")
            prepare_run(paths, task, {})
            return run_ranks(paths, task, entry.name, seconds, os.environ, stop)
    except Exception as failure:  # one job that can't be started must not cost the others theirs
        return RankRun(Status.FAILED, f"{type(failure).__name__}: {failure}"[:1000])


def _completed(result: RankResult, answer: RankAnswer | None) -> RankResult:
    """The result with what was predicted, or with why nothing was."""
    if answer is not None and answer.estimate is not None:
        return with_estimate(result, answer.estimate, answer.seconds)
    reason = "not predicted: " + ("not in time" if answer is None else answer.message)
    return replace(result, message=f"{result.message}\n{reason}".strip())


def predict_again(path: Path, folder: Path) -> RankResults:
    """Replaces the predictions of a results file by those of today's tracer; measurements stay."""
    results = read_document(path, RankResults)
    entries = [RankJob(result.name, result.plan) for result in results.jobs if result.measured]
    with _predictor(entries, results.hardware, folder) as predictor:
        for result in results.jobs:
            answer = predictor.answer(result.name, TRACE_SECONDS) if result.measured else None
            if answer is not None and answer.estimate is not None:
                results = with_rank_result(results, with_estimate(result, answer.estimate, answer.seconds))
    write_document(path, results)
    return results


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_validation.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="results file; one that exists is continued")
    parser.add_argument(
        "--only", default="", help="jobs whose name has this text; several, with commas between"
    )
    parser.add_argument("--cpu", action="store_true", help="small jobs on a CPU, over gloo")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--limit-seconds", type=float, default=100.0, help="for each job")
    parser.add_argument("--parallel", type=int, default=2, help="jobs that run at a time")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file")
    parser.add_argument("--repredict", type=Path, metavar="FILE", help="predict a results file's jobs again")
    return parser


def main() -> int:
    """Entry point."""
    parser = arguments()
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that children end with us
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.table is not None:
                results = read_document(options.table, RankResults)
            elif options.repredict is not None:
                results = predict_again(options.repredict, Path(folder))
            elif options.out is not None:
                hardware = detect_hardware(cpu=options.cpu)
                texts = options.only.split(",")
                jobs = tuple(job for job in rank_jobs(hardware) if any(text in job.name for text in texts))
                limits = options.budget_seconds, options.limit_seconds, options.parallel
                order = Order(options.out, jobs, hardware, *limits)
                results = validate(order, Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
            else:
                parser.error("one of --out, --table and --repredict is needed")
    except LauncherError as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    print(rank_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
