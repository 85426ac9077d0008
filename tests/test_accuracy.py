"""The drift alarm: predicted against measured peak of real training, for a part of scripts/accuracy.

A library that changes what it allocates fails this test, and so does a tracer that no longer sees it. The page
docs/accuracy.md must be what its data file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import accuracy, accuracy_jobs, accuracy_page

ROOT = Path(__file__).resolve().parent.parent
CI_JOBS = [pytest.param(job, id=job.name) for job in accuracy_jobs.JOBS[: accuracy_jobs.NUM_CI_JOBS]]
"""Every method, seven architectures, both losses, padding, evaluation, several optimizers, bf16 and fp32."""
LIMIT_PERCENT = 0.3
MEDIAN_PERCENT, WORST_PERCENT = 0.2, 1.0
"""What the published table promises of the absolute errors of the highest peaks."""


@pytest.fixture(scope="module")
def bench() -> Iterator[accuracy.Bench]:
    with accuracy.Bench() as opened:
        yield opened


@pytest.mark.parametrize("job", CI_JOBS)
def test_predicted_peak_is_the_measured_peak(job: accuracy_jobs.AccuracyJob, bench: accuracy.Bench) -> None:
    result = bench.measure(job)
    assert abs(accuracy_page.peak_error_percent(result)) <= LIMIT_PERCENT
    for phase in ("train_step", "optimizer_step", "evaluation", "generation"):
        error = accuracy_page.phase_error_percent(result, phase)
        assert error is None or abs(error) <= LIMIT_PERCENT, phase
        if error is not None:
            check_categories(result, phase)


def check_categories(result: dict[str, Any], phase: str) -> None:
    """What memory was for at the highest moment, as the meter tells it, is what was predicted."""
    predicted = result["predicted_categories_bytes"][phase]
    measured = result["measured_categories_bytes"][phase]
    peak = result["measured_bytes"][phase]
    assert sum(measured.values()) == peak
    for category in {*predicted, *measured}:
        error = 100.0 * (predicted.get(category, 0) - measured.get(category, 0)) / peak
        assert abs(error) <= LIMIT_PERCENT, (phase, category)


def test_published_table_keeps_its_promise() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-cpu.json"))
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    errors = sorted(abs(accuracy_page.peak_error_percent(result)) for result in results)
    assert len(errors) >= 60
    assert errors[len(errors) // 2] <= MEDIAN_PERCENT
    assert errors[-1] <= WORST_PERCENT
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert accuracy_page.category_table(results) in page
    assert accuracy_page.table(results) in page and accuracy_page.summary(results) in page
