"""Intervals from residuals: order statistics worked by hand, and their promise kept on drawn runs."""

from __future__ import annotations

import random

import pytest

from launcher.hardware import DeviceKind
from launcher.job import Method
from launcher.planner.interval import (
    EVIDENCE,
    RUNS_FOR_HEADROOM,
    Residual,
    headroom_fraction,
    interval,
    like,
    quantile,
    read_residuals,
)


def run(measured: int, model: str = "llama", method: Method = Method.LORA) -> Residual:
    """A run on CPU whose prediction was 1000 bytes."""
    return Residual(DeviceKind.CPU, method, model, 1000, measured)


def test_with_nineteen_values_the_largest_has_95_percent() -> None:
    assert quantile([float(n) for n in range(19)]) == (18.0, 0.95)
    assert quantile([float(n) for n in range(39)]) == (37.0, 0.95)
    assert quantile([3.0, 1.0, 2.0]) == (3.0, 0.75), "three values can't promise more"


def test_the_interval_is_that_of_the_ratios() -> None:
    residuals = [run(1000 + n) for n in range(-9, 10)]
    found = interval(2_000_000, residuals, "llama")
    assert found is not None
    assert (found.low_bytes, found.high_bytes) == (1_982_000, 2_018_000)
    assert found.coverage == pytest.approx(0.95)
    assert found.num_runs == 19 and not found.is_new_architecture


def test_a_new_architecture_counts_others_by_their_worst_run() -> None:
    residuals = [run(1001), run(1002), run(1010, "gemma"), run(1003, "gemma"), run(990, "gpt2")]
    found = interval(1000, residuals, "mixtral")
    assert found is not None
    assert (found.low_bytes, found.high_bytes) == (990, 1010)
    assert found.coverage == pytest.approx(0.75), "three architectures"
    assert found.is_new_architecture
    assert interval(1000, [], "llama") is None


def test_runs_of_the_same_method_come_first() -> None:
    lora, full = run(1001), run(1050, method=Method.FULL)
    assert like([lora, full], DeviceKind.CPU, Method.LORA) == (lora,)
    assert like([lora, full], DeviceKind.CPU, Method.QLORA) == (lora, full)
    assert like([lora, full], DeviceKind.CUDA, Method.LORA) == ()


def test_headroom_waits_for_evidence() -> None:
    few = [run(1100)] * (RUNS_FOR_HEADROOM - 1)
    assert headroom_fraction(few) is None
    assert headroom_fraction([*few, run(1100)]) == pytest.approx(1 - 1 / 1.1)
    assert headroom_fraction([run(900)] * 20) == 0.0, "over-predictions need no room"


def test_the_promise_is_kept_on_drawn_runs() -> None:
    """Skewed errors, 60 known runs, 2000 next ones: the upper end is passed by one in twenty, give or take."""
    rng = random.Random(0)

    def drawn() -> Residual:
        return run(round(1000 * (1 + rng.lognormvariate(-4, 1))))

    passed = 0
    for _ in range(2000):
        found = interval(1000, [drawn() for _ in range(59)], "llama")
        assert found is not None
        passed += drawn().measured_bytes > found.high_bytes
    assert 0.03 <= passed / 2000 <= 0.07


def test_recorded_evidence_is_readable() -> None:
    residuals = read_residuals(EVIDENCE)
    here = [residual for residual in residuals if residual.device_kind is DeviceKind.CPU]
    assert len(here) >= 60
    assert {residual.method for residual in here} == set(Method)
    assert len(residuals) > len(here), "others' measurements on CUDA"
    assert read_residuals(EVIDENCE / "no such folder") == ()
