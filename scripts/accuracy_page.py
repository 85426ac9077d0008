"""What scripts/accuracy found, as errors, tables, a page, and the evidence that the planner's intervals rest on."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.accuracy_jobs import ARCHITECTURES, JOBS

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")


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


LOAD = "load"
CLOSE_BYTES = 4096
PHASES = (LOAD, "train_step", "optimizer_step", "evaluation", "generation", "save")


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


def category_table(results: list[dict[str, Any]]) -> str:
    """What memory was for at the highest moment of each phase, as a markdown table: the worst of each category.

    In percent of the phase's measured peak: a category may be next to nothing.
    """
    errors: dict[str, list[tuple[float, int]]] = {}
    for result in results:
        for phase, measured in result["measured_categories_bytes"].items():
            if phase == LOAD:
                continue
            predicted, peak = result["predicted_categories_bytes"][phase], result["measured_bytes"][phase]
            for category in {*measured, *predicted}:
                ours, seen = predicted.get(category, 0), measured.get(category, 0)
                if ours or seen:
                    errors.setdefault(category, []).append((100.0 * (ours - seen) / peak, ours - seen))
    lines = [
        "| category | phases | within 4 KiB | lowest error | highest error |",
        "|---|--:|--:|--:|--:|",
    ]
    for category, found in sorted(errors.items(), key=lambda item: (min(item[1]), item[0])):
        close = sum(abs(num_bytes) <= CLOSE_BYTES for _, num_bytes in found)
        lowest, highest = min(found)[0], max(found)[0]
        lines.append(f"| {category} | {len(found)} | {close} | {lowest:+.3f} % | {highest:+.3f} % |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Median and worst absolute error, and how many peaks were under-predicted."""
    errors = [peak_error_percent(result) for result in results]
    worst = max(errors, key=abs)
    return (
        f"{len(errors)} jobs: median absolute error {statistics.median(map(abs, errors)):.4f} %, "
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
    dates = sorted(result["date"] for result in results)
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
        f"Measured {dates[0]} to {dates[-1]}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        table(results),
        "",
        summary(results),
        "",
        "What memory was for at the highest moment of each phase, loading apart, by where in the step the allocator's",
        "events fell and which live objects lie in the blocks. Errors in percent of the phase's peak.",
        "",
        category_table(results),
        "",
        "docs/gpu.md compares with what an NVIDIA H200 and an H100 did, docs/published.md with what others measured on",
        "A100 cards.",
        "",
    ]
    (ROOT / "docs" / "accuracy.md").write_text("\n".join(page), encoding="utf-8")
