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
CI_JOBS = (accuracy.JOBS[0], accuracy.JOBS[4], accuracy.JOBS[7])
"""LoRA and full, with and without checkpointing, one of each architecture, bf16 and fp32."""
LIMIT_PERCENT = 0.3


@pytest.mark.parametrize("job", CI_JOBS, ids=lambda job: job.name)
def test_predicted_peak_is_the_measured_peak(job: accuracy.AccuracyJob) -> None:
    result = accuracy.measure(job)
    for phase in ("train_step", "optimizer_step"):
        predicted, measured = result["predicted_bytes"][phase], result["measured_bytes"][phase]
        assert abs(predicted - measured) / measured * 100 <= LIMIT_PERCENT, phase


def test_published_table_keeps_its_promise() -> None:
    newest = max((ROOT / "docs" / "accuracy").glob("*-cpu.json"))
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    errors = sorted(abs(accuracy.peak_error_percent(result)) for result in results)
    assert len(errors) >= 12
    assert errors[len(errors) // 2] <= 0.2
    assert errors[-1] <= 1.0
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert accuracy.table(results) in page and accuracy.summary(results) in page
