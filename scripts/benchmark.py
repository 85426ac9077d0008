"""How long the command line takes: medians of a few runs, printed as a table.

python -m scripts.benchmark            prints the table
python -m scripts.benchmark --write    also writes docs/benchmarks.md and a dated data file beside it
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from launcher.hardware import HardwareSpec
from launcher.planner.skyline import Skyline
from launcher.planner.speed import SpeedModel
from launcher.rates import published_rates

ROOT = Path(__file__).resolve().parent.parent
PLAN = ("recipe=llama_lora", "hardware=a100_40g", "action=plan")
DEFAULT_JOB = ()
"""`launch` alone, with the weights in the user's cache: plans, rehearses, trains and reconciles."""
LIBRARIES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Case:
    """One command, timed."""

    name: str
    arguments: tuple[str, ...]
    target_seconds: float
    warm: bool
    exit_code: int = 0
    num_runs: int | None = None
    """How often; None: as often as the command line says."""


CASES = (
    Case("launch --help", ("--help",), 1.0, warm=True),
    Case("configuration error", ("data.max_lenght=1",), 2.0, warm=True, exit_code=2),
    Case("plan llama_lora on a100_40g, no cached trace", PLAN, 15.0, warm=False),
    Case("plan llama_lora on a100_40g, traces cached", PLAN, 3.0, warm=True),
    Case("the default job, no cached trace", DEFAULT_JOB, 300.0, warm=False, num_runs=1),
)


PACE = "10 million additions in Python"


@dataclass(frozen=True)
class Measure:
    """One measurement inside a process that has loaded the libraries."""

    name: str
    unit: str
    target: float


MEASURES = (
    Measure("cold trace of one regime, Llama-3.1-8B LoRA", "s", 3.0),
    Measure("cold trace of one regime, Llama-3.3-70B LoRA", "s", 5.0),
    Measure("memory of the tracing process", "GiB", 1.5),
    Measure("10,000 look-ups of (batch, length)", "ms", 100.0),
    Measure("100,000 candidates ranked by time, with their peaks", "ms", 1000.0),
    Measure("search of 100,000 candidates that do not fit, once traced (CPU time)", "s", 1.0),
    Measure("search of 100,000 candidates of which the last ones fit, once traced (CPU time)", "s", 1.0),
)


def measure_traces() -> list[float]:
    """The values of `MEASURES`, in a process of their own."""
    child = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark", "--traces"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if child.returncode:
        raise SystemExit(child.stderr)
    values: list[float] = json.loads(child.stdout.splitlines()[-1])
    return values


def trace_here() -> list[float]:
    """Traces in this process; the first trace, which fills the libraries' caches, is not counted."""
    import resource  # noqa: PLC0415  # only the child process needs these

    from launcher.config import load_job  # noqa: PLC0415
    from launcher.libraries import OPTIONAL_LIBRARIES, hide_libraries  # noqa: PLC0415

    hide_libraries(OPTIONAL_LIBRARIES)
    from launcher.planner import trace  # noqa: PLC0415
    from launcher.planner.space import semantic_plans  # noqa: PLC0415
    from launcher.planner.subject import subject_of  # noqa: PLC0415

    values = []
    skyline = None
    for model in ("llama3_2_1b", "llama3_1_8b", "llama3_3_70b"):
        job = load_job(["recipe=llama_lora", f"model={model}", "hardware=h100_80g"])
        subject = trace.open_subject(subject_of(job, next(semantic_plans(job))))
        began = time.perf_counter()
        skyline = trace.trace_regime(subject, 4, 4096, 2)
        values.append(time.perf_counter() - began)
    assert skyline is not None
    shapes = np.arange(10_000)
    began = time.perf_counter()
    skyline.highest_bytes(4 + shapes % 13, 2048 + shapes % 777, 2)
    look_up = 1000 * (time.perf_counter() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    ranked = rank_candidates(skyline, job.hardware)
    return [*values[1:], memory, look_up, ranked, *search_candidates()]


def search_candidates() -> list[float]:
    """CPU seconds of `search` over 209 lengths x 60 micro batches x 4 kinds of checkpointing x 2 losses, once traced.

    On a device that holds none of these plans, and on one that holds some of the shortest length, which comes last.
    """
    from launcher.config import load_job  # noqa: PLC0415  # only the child process needs these
    from launcher.planner.forecast import Forecaster  # noqa: PLC0415
    from launcher.planner.search import search  # noqa: PLC0415
    from launcher.planner.trace_cache import TraceCache  # noqa: PLC0415
    from launcher.planner.tracer import Tracer  # noqa: PLC0415

    words = ["recipe=llama_lora", "model=llama3_2_1b", "hardware=h100_80g", "training.global_batch_size=5040"]
    lengths = ",".join(str(length) for length in (*range(4096, 4096 - 208 * 8, -8), 256))
    words += ["planner.pin.engine=none", "planner.headroom=0.0", f"planner.choices.max_length=[{lengths}]"]
    job = load_job(words)
    job = replace(job, hardware=replace(job.hardware, memory_bytes=1 << 31))
    values = []
    with tempfile.TemporaryDirectory() as folder, Tracer() as tracer:
        cache, rates = TraceCache(Path(folder)), published_rates(job.hardware)
        for fits in (False, True):
            search(job, Forecaster(job, tracer, cache, rates=rates))  # makes the traces
            began = time.process_time()
            choice = search(job, Forecaster(job, tracer, cache, rates=rates))
            values.append(time.process_time() - began)
            assert choice.feasible is fits
            assert choice.num_considered >= 100_000  # what the table says
            if choice.nearest is not None:
                rounding_bytes = 128 << 20  # of the allocator, at the true shape
                enough = job.hardware.memory_bytes + choice.nearest.short_by_bytes + rounding_bytes
                job = replace(job, hardware=replace(job.hardware, memory_bytes=enough))
    return values


def rank_candidates(skyline: Skyline, hardware: HardwareSpec) -> float:
    """Milliseconds for 100,000 candidates: 20 micro batches x 50 lengths x 100 numbers of micro batches."""
    rates = published_rates(hardware)
    assert rates is not None  # every card has
    began = time.perf_counter()
    model = SpeedModel(skyline.work, rates)
    shapes = [(batch, length) for batch in range(4, 24) for length in range(2048, 4096, 41)]
    batches, lengths = (np.array(column, dtype=np.int64) for column in zip(*shapes, strict=True))
    ranked: list[tuple[float, float]] = []
    for accumulation in range(2, 102):
        peaks = skyline.highest_bytes(batches, lengths, accumulation).tolist()
        steps = [model.step(batch, length, accumulation) for batch, length in shapes]
        ranked += [(step.seconds / step.tokens, peak) for step, peak in zip(steps, peaks, strict=True)]
    ranked.sort()
    assert len(ranked) == 100_000
    return 1000 * (time.perf_counter() - began)


def pace_seconds() -> float:
    """What ten million additions in Python take: by it, figures of a busy hour compare with those of a quiet one."""
    began, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return time.perf_counter() - began


def seconds_of(case: Case, cache: Path) -> float:
    """Wall time of one run, in a folder of its own: a job leaves a run directory."""
    arguments = [*case.arguments]
    if case.arguments in (PLAN, DEFAULT_JOB):
        arguments.append(f"trace_cache={cache if case.warm else 'off'}")
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        child = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        elapsed = time.perf_counter() - began
    if child.returncode != case.exit_code:
        raise SystemExit(f"{case.name}: exit code {child.returncode}\n{child.stderr}")
    return elapsed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--traces", action="store_true", help="measure traces in this process; prints JSON")
    options = parser.parse_args()
    if options.traces:
        print(json.dumps(trace_here()))
        return
    results: dict[str, list[float]] = {PACE: []}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for case in CASES:
            if case.warm:
                seconds_of(case, cache)
            results[PACE].append(pace_seconds())
            results[case.name] = [seconds_of(case, cache) for _ in range(case.num_runs or options.runs)]
    lines = ["| what | median | worst | target |", "|---|--:|--:|--:|"]
    for case in CASES:
        runs = results[case.name]
        lines.append(
            f"| {case.name} | {statistics.median(runs):.2f} s | {max(runs):.2f} s | {case.target_seconds:.0f} s |"
        )
    for measure, *values in zip(MEASURES, *(measure_traces() for _ in range(options.runs)), strict=True):
        results[measure.name] = list(values)
        lines.append(
            f"| {measure.name} | {statistics.median(values):.2f} {measure.unit} | {max(values):.2f} {measure.unit} "
            f"| {measure.target:g} {measure.unit} |"
        )
    lines.append(
        f"| {PACE} | {statistics.median(results[PACE]):.2f} s | {max(results[PACE]):.2f} s | the machine's pace |"
    )
    print("\n".join(lines))
    if options.write:
        write(lines, results)


def write(lines: list[str], results: dict[str, list[float]]) -> None:
    """Writes the page and the dated data file."""
    today = datetime.date.today().isoformat()
    versions = {name: version(name) for name in LIBRARIES}
    data = {"date": today, "cores": os.cpu_count(), "versions": versions, "values": results}
    target = ROOT / "docs" / "benchmarks" / f"{today}-cli.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = [
        "# Benchmarks",
        "",
        f"Generated by `python -m scripts.benchmark --write`, {today}, {os.cpu_count()} cores, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Wall time, imports included.",
        "",
        *lines,
        "",
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
