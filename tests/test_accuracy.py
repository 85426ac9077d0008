"""The drift alarm: predicted against measured peak of real training, for a part of scripts/accuracy.

A library that changes what it allocates fails this test, and so does a tracer that no longer sees it. The page
docs/accuracy.md must be what its data file says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import accuracy

ROOT = Path(__file__).resolve().parent.parent
QUICK_JOBS = 5
CI_JOBS = [
    pytest.param(job, marks=() if number < QUICK_JOBS else pytest.mark.thorough, id=job.name)
    for number, job in enumerate(accuracy.JOBS[: accuracy.NUM_CI_JOBS])
]
"""Every method, seven architectures, both losses, padding, evaluation, several optimizers, bf16 and fp32."""
LIMIT_PERCENT = 0.3
MEDIAN_PERCENT, WORST_PERCENT = 0.2, 1.0
"""What the published table promises of the absolute errors of the highest peaks."""


@pytest.mark.parametrize("job", CI_JOBS)
def test_predicted_peak_is_the_measured_peak(job: accuracy.AccuracyJob) -> None:
    result = accuracy.measure(job)
    assert abs(accuracy.peak_error_percent(result)) <= LIMIT_PERCENT
    for phase in ("train_step", "optimizer_step", "evaluation", "generation"):
        error = accuracy.phase_error_percent(result, phase)
        assert error is None or abs(error) <= LIMIT_PERCENT, phase


def test_published_table_keeps_its_promise() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-cpu.json"))
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    errors = sorted(abs(accuracy.peak_error_percent(result)) for result in results)
    assert len(errors) >= 60
    assert errors[len(errors) // 2] <= MEDIAN_PERCENT
    assert errors[-1] <= WORST_PERCENT
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert accuracy.table(results) in page and accuracy.summary(results) in page
