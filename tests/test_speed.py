"""Step times: the arithmetic by hand, orders that must hold on real traces, and what counts as better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launcher.config import hardware_entries
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec, MatrixFlops
from launcher.job import Checkpointing, Method, Objective, Precision
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.planner import trace
from launcher.planner.objective import SAME, Price, Ranking
from launcher.planner.speed import SpeedModel
from launcher.planner.work import Stage, Terms, Work, WorkKind, WorkTable, build_table
from launcher.rates import HOST_SHARES, AttentionRate, HostRate, MatrixRate, PassRate, Rates, published_rates
from launcher.step_time import StepTime, dollars_per_million_tokens
from scripts.speed_check import joined
from tests.test_work import plan_of, subject_of

A100 = HardwareSpec(
    name="a100",
    kind=DeviceKind.CUDA,
    matrix_flops=MatrixFlops(bf16=312e12, fp32=19.5e12),
    memory_bandwidth_bytes_per_second=1.555e12,
    matrix_efficiency=0.869,
    attention_efficiency=0.5,
    bandwidth_efficiency=0.8,
    launch_seconds=1e-5,
    multiprocessors=108,
)
CPU = Rates(
    source="a CPU",
    is_calibrated=True,
    is_synchronous=True,
    launch_seconds=1e-4,
    host=(HostRate("none", 1e-4, 2e-4, 1e-4),),
    matrix=(
        MatrixRate("fp32", 64, 512, 512, "nt", 40e9),
        MatrixRate("fp32", 512, 512, 512, "nt", 80e9),
        MatrixRate("fp32", 64, 512, 512, "nn", 20e9),
    ),
    attention=(AttentionRate("fp32", 64, 10e9, 20e9), AttentionRate("fp32", 1024, 40e9, 80e9)),
    passes=(PassRate("light", "fp32", 1 << 16, 64e9), PassRate("light", "fp32", 1 << 24, 16e9)),
)


def constant(value: int) -> Terms:
    return (((0, 0, 0), value),)


def product(rows: int, inner: int, columns: int, dtype: str = "bf16", layout: str = "nt") -> Work:
    moved = 2 * (rows * inner + inner * columns + rows * columns)
    sides = (constant(rows), constant(inner), constant(columns))
    return Work(WorkKind.MATRIX, dtype, constant(2 * rows * inner * columns), constant(moved), sides, layout)


def passing(num_bytes: int, kind: WorkKind = WorkKind.LIGHT, dtype: str = "bf16") -> Work:
    return Work(kind, dtype, (), constant(num_bytes))


def table_of(*works: Work, stage: Stage = Stage.FIRST_FORWARD, times: float = 1.0) -> WorkTable:
    return build_table({(stage, work): {(0, 0, 0): times} for work in works})


def seconds(rates: Rates | None, *works: Work, times: float = 1.0) -> float:
    assert rates is not None
    return SpeedModel(table_of(*works, times=times), rates).step(1, 1, 1).seconds


def test_a_large_product_takes_its_operations_over_the_rate_of_whole_waves() -> None:
    """32 x 32 tiles of 128 on 108 multiprocessors: ten waves for 1024 tiles."""
    rate = 312e12 * 0.869 * 1024 / 1080
    assert seconds(published_rates(A100), product(4096, 4096, 4096)) == pytest.approx(2 * 4096**3 / rate)


def test_a_thin_product_takes_the_time_of_its_bytes() -> None:
    moved = 2 * (4096 * 4096 + 2 * 4096 * 16)
    assert seconds(published_rates(A100), product(4096, 4096, 16)) == pytest.approx(moved / (1.555e12 * 0.8))


def test_a_pass_takes_the_time_of_its_bytes() -> None:
    assert seconds(published_rates(A100), passing(1 << 30)) == pytest.approx((1 << 30) / (1.555e12 * 0.8))


def test_small_operations_take_the_hosts_time_on_a_gpu() -> None:
    forward, backward = HOST_SHARES["selective"]
    rates = published_rates(A100)
    assert rates is not None
    for stage, share in (
        (Stage.FIRST_FORWARD, forward),
        (Stage.FIRST_BACKWARD, backward),
        (Stage.UPDATE, 1.0),
    ):
        model = SpeedModel(table_of(passing(1024), stage=stage, times=500), rates, "selective")
        assert model.step(1, 1, 1).seconds == pytest.approx(500 * 1e-5 * share)


def test_the_host_waits_for_the_device_between_the_passes() -> None:
    """A forward pass that waits for the host and a backward pass that waits for the device: both add up."""
    rates = replace(CPU, is_synchronous=False)
    small, large = passing(1 << 16), passing(1 << 24, dtype="fp32")
    tally = {
        (Stage.FIRST_FORWARD, small): {(0, 0, 0): 100.0},
        (Stage.FIRST_BACKWARD, large): {(0, 0, 0): 10.0},
    }
    expected = 100 * 1e-4 + 10 * (1 << 24) / 16e9
    assert SpeedModel(build_table(tally), rates).step(1, 1, 1).seconds == pytest.approx(expected)


def test_on_a_cpu_the_hosts_time_comes_on_top() -> None:
    assert seconds(CPU, passing(1 << 16), times=3) == pytest.approx(3 * (1e-4 + (1 << 16) / 64e9))


def test_an_8bit_optimizer_is_slower_than_its_bytes() -> None:
    """What was measured: 8.03e9 parameters of two bytes, gradients of two, two states of one, in 206 ms."""
    h100 = replace(A100, memory_bandwidth_bytes_per_second=3.35e12, bandwidth_efficiency=0.87)
    work = passing(int(8.03e9 * 6), WorkKind.BLOCKWISE_OPTIMIZER)
    assert seconds(published_rates(h100), work) == pytest.approx(0.206, rel=0.02)


def test_measured_products_are_taken_where_they_were_measured() -> None:
    for rows, layout, rate in ((64, "nt", 40e9), (512, "nt", 80e9), (64, "nn", 20e9)):
        expected = 2 * rows * 512 * 512 / rate + 1e-4
        assert seconds(CPU, product(rows, 512, 512, "fp32", layout)) == pytest.approx(expected, rel=1e-3)
    between = 2 * 192 * 512 * 512 / (seconds(CPU, product(192, 512, 512, "fp32")) - 1e-4)
    assert 40e9 < between < 80e9


def test_measured_passes_are_interpolated_by_size() -> None:
    rate = (1 << 20) / (seconds(CPU, passing(1 << 20)) - 1e-4)
    assert rate == pytest.approx(32e9)  # half way between 64 and 16 GB/s, in logarithms


def test_a_step_is_its_first_batch_the_later_ones_and_the_update() -> None:
    tally = {
        (stage, passing(size)): {(0, 0, 0): 1.0}
        for stage, size in (
            (Stage.FIRST_FORWARD, 1 << 29),
            (Stage.FIRST_BACKWARD, 1 << 29),
            (Stage.LATER_FORWARD, 1 << 29),
            (Stage.LATER_BACKWARD, 3 << 29),
            (Stage.UPDATE, 1 << 29),
        )
    }
    rates = published_rates(A100)
    assert rates is not None
    step = SpeedModel(build_table(tally), rates).step(2, 100, 4)
    pass_seconds = (1 << 30) / (1.555e12 * 0.8)
    assert step.seconds == pytest.approx(pass_seconds * (1 + 3 * 2 + 0.5))
    assert step.tokens == 800
    assert step.tokens_per_second == pytest.approx(800 / step.seconds)
    assert dollars_per_million_tokens(step, 3.6) == pytest.approx(1e-3 * 1e6 / step.tokens_per_second)
    slower = replace(step, communication_seconds=step.seconds)
    assert slower.seconds == pytest.approx(2 * step.seconds)


def test_a_missing_rate_is_an_error_that_names_it() -> None:
    rates = published_rates(A100)
    assert rates is not None
    with pytest.raises(UnsupportedByPlanner, match="link to the host"):
        seconds(rates, passing(1 << 20, WorkKind.TRANSFER))
    with pytest.raises(UnsupportedByPlanner, match="fp16"):
        seconds(replace(rates, matrix_flops={}), product(64, 64, 64, "fp16"))


def test_every_card_has_rates_and_a_cpu_has_none_published() -> None:
    from pydantic import TypeAdapter

    found = {
        str(entry["name"]): published_rates(TypeAdapter(HardwareSpec).validate_python(entry))
        for entry in hardware_entries()
    }
    assert len(found) >= 17
    assert {name for name, rates in found.items() if rates is None} == {"auto", "cpu"}
    assert not any(rates.is_calibrated for rates in found.values() if rates)


@pytest.mark.parametrize("kind", [DeviceKind.CUDA, pytest.param(DeviceKind.CPU, marks=pytest.mark.thorough)])
def test_what_recomputes_more_takes_longer(kind: DeviceKind) -> None:
    """What the search's bounds rest on; and a step that accumulates nothing is the first batch of one that does."""
    rates = (
        published_rates(replace(A100, host_link_bytes_per_second=32e9)) if kind is DeviceKind.CUDA else CPU
    )
    assert rates is not None
    modes = [mode for mode in Checkpointing if kind is DeviceKind.CUDA or mode is not Checkpointing.OFFLOAD]
    times = []
    for mode in modes:
        knobs: dict[str, Any] = {"method": Method.LORA, "rank": 4, "precision": Precision.BF16}
        plan = plan_of(4, 96, 2, activation_checkpointing=mode, **knobs)
        table = trace.trace_regime(subject_of(plan, kind), 4, 96, 2).work
        times.append(SpeedModel(table, rates).step(4, 96, 2).seconds)
        if mode is Checkpointing.NONE:
            alone = trace.trace_regime(
                subject_of(replace(plan, gradient_accumulation_steps=1), kind), 4, 96, 1
            )
            expected = SpeedModel(alone.work, rates).step(4, 96, 1).seconds
            assert SpeedModel(table, rates).step(4, 96, 1).seconds == pytest.approx(expected, rel=2e-2)
    assert times == sorted(times)


# what is better


def priced(seconds: float, peak: int, mode: Checkpointing = Checkpointing.NONE, micro: int = 1) -> Price:
    plan = plan_of(micro, 64, 16 // micro, activation_checkpointing=mode)
    step = StepTime(seconds, 0.0, 0.0, 1, 1000, "", True)
    phase = PhasePeak(Phase.TRAIN_STEP, peak, {Category.ACTIVATIONS: peak})
    return Price(plan, MemoryEstimate((phase,), {}, 0), step)


def test_the_fastest_plan_is_the_best_and_among_equals_the_one_with_the_lowest_peak() -> None:
    ranking = Ranking(Objective.SPEED, knows_speed=True)
    fast, same, slow = priced(1.0, 900), priced(1.0 + SAME / 2, 500), priced(1.0 + 2 * SAME, 100)
    assert ranking.best([slow, fast]) is fast
    assert ranking.best([slow, fast, same]) is same
    assert Ranking(Objective.MEMORY, knows_speed=True).best([slow, fast, same]) is slow
    assert Ranking(Objective.COST, knows_speed=True).best([slow, fast, same]) is same


def test_full_ties_go_to_the_simpler_plan() -> None:
    ranking = Ranking(Objective.SPEED, knows_speed=True)
    recomputes, accumulates, simple = (
        priced(1.0, 500, Checkpointing.FULL, 16),
        priced(1.0, 500, micro=4),
        priced(1.0, 500, micro=16),
    )
    assert ranking.best([recomputes, accumulates, simple]) is simple
    assert ranking.best([recomputes, accumulates]) is accumulates


def test_without_rates_two_rules_decide() -> None:
    ranking = Ranking(Objective.SPEED, knows_speed=False)
    prices = [
        replace(priced(1.0, peak, mode, micro), step=None)
        for peak, mode, micro in (
            (1, Checkpointing.FULL, 16),
            (9, Checkpointing.NONE, 4),
            (5, Checkpointing.NONE, 2),
        )
    ]
    assert ranking.best(prices) is prices[1]
    values = np.array([ranking.value(price) for price in prices])
    assert values.argsort().tolist() == [1, 2, 0]


def test_what_was_measured_of_the_same_job_before_counts_too() -> None:
    """The speed check's own joining: the shortest step of all, and today's prediction; of another job nothing."""

    def findings(predicted: float, times: list[float], job: str = "a") -> dict[str, Any]:
        plan = {"loss": "chunked", "checkpointing": "none", "micro_batch_size": 1, "processes": 2}
        result = plan | {
            "predicted_seconds": predicted,
            "steps_seconds": times,
            "measured_seconds": min(times),
        }
        return {"date": "d", "job": job, "threads": "", "versions": {}, "results": [result]}

    earlier, today = findings(1.0, [4.0, 3.0]), findings(2.0, [5.0])
    (result,) = joined(today, earlier)["results"]
    assert (result["predicted_seconds"], result["measured_seconds"], result["processes"]) == (2.0, 3.0, 4)
    assert result["steps_seconds"] == [4.0, 3.0, 5.0]
    assert joined(today, findings(1.0, [3.0], job="b")) == today
