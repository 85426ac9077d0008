"""Published measurements: rows have a prediction or a reason, the page is its data, formulas are others'."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.job import Checkpointing, Method, Precision
from launcher.plan import Plan
from scripts import published, published_estimators, published_page
from scripts.published_differences import TEXTS, Difference
from scripts.published_rows import Quantity, Row, express, read_rows, reason_not_expressed

ROOT = Path(__file__).resolve().parent.parent
NEWEST = max((ROOT / "docs" / "accuracy").glob("*-published.json"))
SIZE = published_estimators.ModelSize(
    num_parameters=1_000,
    largest_layer_parameters=100,
    backbone_fp32_bytes=3_600,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows()


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(NEWEST.read_text(encoding="utf-8"))
    return stored


def plan_of(row: Row) -> Plan:
    return express(row).plan


def test_rows_are_facts_with_a_source(rows: list[Row]) -> None:
    assert len(rows) == 360 and len({row.id for row in rows}) == 360
    assert all(row.source and row.measured_bytes > 0 and row.confidence in ("A", "B") for row in rows)


def test_every_row_is_predicted_or_has_a_reason(rows: list[Row], data: dict[str, Any]) -> None:
    stored = {result["id"]: result for result in data["rows"]}
    assert list(stored) == [row.id for row in rows]
    for row in rows:
        reason = reason_not_expressed(row)
        assert stored[row.id]["reason"] == reason
        if reason:
            continue
        assert stored[row.id]["measured_bytes"] == row.measured_bytes
        assert stored[row.id]["predicted_bytes"] > 0
        assert stored[row.id]["quantity"] == row.counter
    assert len([result for result in data["rows"] if not result["reason"]]) >= 60


def test_page_is_generated_from_the_data(data: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert page == published_page.page(data, NEWEST.name)


def test_page_keeps_its_promise(data: dict[str, Any]) -> None:
    allocated = published_page.predicted(data["rows"], Quantity.ALLOCATED.value)
    as_run = [abs(published_page.as_run_percent(result)) for result in allocated]
    assert statistics.median(as_run) <= 0.05 and max(as_run) <= 0.3
    own = [result for result in allocated if result["kernels"] == "library"]
    assert len(own) >= 8 and all(abs(published_page.today_percent(result)) <= 2.0 for result in own)
    errors = [published_page.today_percent(result) for result in allocated]
    assert errors == sorted(errors)


def test_a_row_becomes_the_job_that_it_was(rows: list[Row]) -> None:
    by_id = {row.id: row for row in rows}
    full, lora, prepared = (express(by_id[name]) for name in ("FMSG-003", "FMSL-064", "FMSG-017"))
    assert (full.plan.method, full.plan.micro_batch_size, full.plan.max_length) == (Method.FULL, 8, 4096)
    assert full.plan.precision is Precision.BF16 and not full.autocast_over_bf16
    assert full.plan.activation_checkpointing is Checkpointing.FULL and full.job.data.packing
    assert lora.plan.rank == 16 and lora.job.method.dropout == 0.1
    assert lora.job.method.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert lora.autocast_over_bf16 and Difference.REPEATED_KEYS in lora.differences
    assert prepared.plan.method is Method.QLORA and prepared.job.method.kbit_preparation
    padded = express(by_id["PEFT-006"])
    assert not padded.job.data.packing and padded.job.method.use_dora and padded.plan.rank == 32


def test_a_row_that_differs_is_not_expressed(rows: list[Row]) -> None:
    row = next(row for row in rows if row.id == "FMSG-001")
    assert not reason_not_expressed(row)
    for change in ({"num_gpus": 2}, {"method": "gptq-lora"}, {"length": 0}, {"quantity": "unknown"}):
        assert reason_not_expressed(replace(row, **change))


def test_every_difference_says_where_it_was_read() -> None:
    assert set(TEXTS) == set(Difference)


def test_accelerate_shows_the_largest_of_its_parts() -> None:
    # float16: model 3600, gradients 3600 + 1800, optimizer and step 2 x 3600; float32: step 4 x 3600
    assert published_estimators.accelerate_bytes(SIZE, "float16") == 7_200
    assert published_estimators.accelerate_bytes(SIZE, "float32") == 14_400


def test_deepspeed_counts_every_weight_as_trained() -> None:
    assert published_estimators.deepspeed_zero2_bytes(SIZE) == 2 * 1_000 + 18 * 1_000
    assert published_estimators.deepspeed_zero3_bytes(SIZE) == 4 * 100 + 18 * 1_000


def test_rule_of_thumb_and_transformer_math(rows: list[Row]) -> None:
    by_id = {row.id: row for row in rows}
    full, lora, qlora = (
        replace(plan_of(by_id[name]), micro_batch_size=3, max_length=10)
        for name in ("FMSG-001", "FMSG-009", "FMSG-021")
    )
    rule = published_estimators.rule_of_thumb_bytes
    assert rule(SIZE, full, 1_000) == 16_000
    assert rule(SIZE, lora, 10) == 2_000 + 160
    assert rule(SIZE, qlora, 10) == 500 + 160
    # s b h L = 3 x 10 x 8 x 2 = 480; 5 a s / h of it: 5 x 4 heads x 10 tokens x 30 x 2 layers = 12000
    math = published_estimators.transformer_math_bytes
    assert math(SIZE, full, 1_000) == 16_000 + 2 * 480
    kept = replace(full, activation_checkpointing=Checkpointing.NONE)
    assert math(SIZE, kept, 1_000) == 16_000 + 34 * 480 + 12_000


def test_the_smallest_row_is_traced_again(rows: list[Row], data: dict[str, Any]) -> None:
    """Of those that need no bitsandbytes; with and without what its code did otherwise."""
    stored = [
        result
        for result in published_page.predicted(data["rows"], Quantity.ALLOCATED.value)
        if result["method"] != Method.QLORA.value
    ]
    smallest = min(stored, key=lambda result: int(result["measured_bytes"]))
    row = next(row for row in rows if row.id == smallest["id"])
    live = published.predict(row, published.Traces())
    for figure in ("predicted_bytes", "predicted_as_run_bytes"):
        assert abs(live[figure] - smallest[figure]) <= 0.005 * smallest[figure], figure
    assert live["others_bytes"] == smallest["others_bytes"]
