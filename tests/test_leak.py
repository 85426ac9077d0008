"""Leaks: told from noise on made-up readings, and found in a real training that keeps tensors of past steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from launcher.job import Engine
from launcher.leak import NUM_READINGS, Leak, Reading, find_leak
from launcher.memory import MemoryMeasurement
from launcher.run_paths import RunPaths
from launcher.units import GIB, MIB
from launcher.worker.ingredients import prepare
from launcher.worker.leaks import LeakWatch, allocated_now_bytes
from launcher.worker.progress import KEPT_LOGS, KEPT_STEPS, Progress, ProgressCallback
from launcher.worker.train import train
from tests.tiny_job import tiny_order, write_tiny_model

BASE_BYTES = 500 * MIB


def readings(level: Callable[[int], float], count: int = NUM_READINGS) -> list[Reading]:
    """Readings after steps 1, 2, ..., so many MiB above a base."""
    return [Reading(step, BASE_BYTES + int(level(step) * MIB)) for step in range(1, count + 1)]


def test_steady_growth_is_a_leak_with_its_rate_and_its_end() -> None:
    # 3 MiB a step from step 1 on, 301 MiB to spare: 100 steps' growth fits, that of 101 does not
    leak = find_leak(readings(lambda step: 3.0 * step), spare_bytes=301 * MIB)
    assert leak == Leak(1, NUM_READINGS, 3.0 * MIB, lasts_until_step=101)
    assert leak.gib_per_1000_steps == pytest.approx(3000 * MIB / GIB)
    words = leak.words(max_steps=5000)
    assert "2.930 GiB per 1,000 steps" in words
    assert "would not fit after step 101, before the end at step 5,000" in words
    assert "beyond the end at step 90" in leak.words(max_steps=90)


def test_growth_below_noise_of_batches_is_found_once_it_stands_out() -> None:
    noise = random.Random(3)
    jumping = readings(lambda step: 1.0 * step + noise.uniform(0, 12))
    leak = find_leak(jumping)
    assert leak is not None and leak.bytes_per_step == pytest.approx(MIB, rel=0.1)
    assert leak.lasts_until_step is None and "fit" not in leak.words(None)
    assert find_leak(readings(lambda step: 0.2 * step + noise.uniform(0, 40))) is None


def test_a_leak_of_every_evaluation_is_a_staircase() -> None:
    leak = find_leak(readings(lambda step: 5.0 * (step // 8)))
    assert leak is not None and leak.bytes_per_step == pytest.approx(5 * MIB / 8, rel=0.1)


@pytest.mark.parametrize(
    "level",
    [
        lambda step: 0.0,
        lambda step: 40.0 if step > 30 else 0.0,  # made once, in the middle
        lambda step: 40.0 if step > 48 else 0.0,
        lambda step: 50.0 * (1 - math.exp(-step / 12)),  # fills up and stays
        lambda step: 2.0 * (step % 16),  # let go at every evaluation
        lambda step: -1.0 * step,
        lambda step: 0.02 * step,  # a list of logged losses
        lambda step: 3.0 * max(0, step - 60),  # too new to tell
    ],
)
def test_what_is_no_leak(level: Callable[[int], float]) -> None:
    assert find_leak(readings(level)) is None


def test_noise_alone_is_never_a_leak() -> None:
    noise = random.Random(11)
    for _ in range(2000):
        amplitude = noise.choice((3.0, 30.0, 300.0))
        assert find_leak(readings(lambda step, a=amplitude: noise.uniform(0, a))) is None  # type: ignore[misc]


def test_too_few_readings_show_nothing() -> None:
    assert find_leak(readings(lambda step: 9.0 * step, NUM_READINGS - 1)) is None


def test_a_watch_finds_fast_leaks_soon_late_ones_and_slow_ones() -> None:
    def found_at(level: Callable[[int], float], last_step: int) -> tuple[int, LeakWatch]:
        watch = LeakWatch(spare_bytes=None)
        for reading in readings(level, last_step):
            watch.take(reading)
            if watch.leak is not None:
                return reading.step, watch
        return 0, watch

    assert found_at(lambda step: 1.0 * step, 5000)[0] == NUM_READINGS
    late, _ = found_at(lambda step: max(0.0, step - 5000), 9000)
    assert 5000 < late <= 5000 + 2 * NUM_READINGS
    slow, watch = found_at(lambda step: 0.002 * step, 9000)  # 2 MiB per 1,000 steps
    assert 1000 < slow <= 4 * 1024
    assert watch.leak is not None and watch.leak.bytes_per_step == pytest.approx(0.002 * MIB, rel=0.05)


def test_a_leak_that_ends_is_forgotten() -> None:
    watch = LeakWatch(spare_bytes=None)
    seen = False
    for reading in readings(lambda step: min(step, 80), 4000):
        watch.take(reading)
        seen = seen or watch.leak is not None
    assert seen and watch.leak is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the C library's heap")
def test_the_heap_counts_tensors_as_they_come_and_go() -> None:
    before = allocated_now_bytes()
    assert before is not None, "glibc older than 2.33"
    held = [torch.zeros(MIB // 4) for _ in range(10)]
    full = allocated_now_bytes()
    assert full is not None and full - before == pytest.approx(10 * MIB, rel=0.01)
    del held
    after = allocated_now_bytes()
    assert after is not None and abs(after - before) < MIB // 10


def trained(model: Path, run_dir: Path, kept_elements: int) -> tuple[MemoryMeasurement, list[str]]:
    """Trains the tiny model 70 steps; each forward pass in training keeps so many fp32 elements for ever."""
    order = tiny_order(model, Engine.NONE, num_devices=1, training={"max_steps": 70, "save_steps": 0})
    order = replace(order, plan=replace(order.plan, micro_batch_size=4, gradient_accumulation_steps=1))
    order = replace(order, job=replace(order.job, hardware=replace(order.job.hardware, memory_bytes=GIB)))
    ingredients = prepare(order, RunPaths(run_dir))
    kept: list[torch.Tensor] = []

    def leaky(module: nn.Module) -> nn.Module:
        adapted = ingredients.adapt(module)

        def keep(layer: nn.Module, arguments: object) -> None:
            if layer.training and kept_elements:
                kept.append(torch.ones(kept_elements))

        adapted.register_forward_pre_hook(keep)
        return adapted

    said: list[str] = []
    _, measurement = train(order.job, order.plan, replace(ingredients, adapt=leaky), Progress(), said.append)
    return measurement, said


@pytest.mark.thorough
def test_a_training_that_keeps_tensors_is_told_so_and_another_is_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_model(model)
    measurement, said = trained(model, tmp_path / "leaks", kept_elements=MIB // 4)
    leak = measurement.leak
    assert leak is not None
    assert leak.bytes_per_step == pytest.approx(MIB, rel=0.02)
    # the prediction of this order is one byte, so the whole GiB is spare: 1,024 steps of 1 MiB
    assert leak.lasts_until_step == pytest.approx(leak.from_step + 1024, rel=0.02)
    findings = [line for line in said if line.startswith("finding")]
    assert len(findings) == 1 and "GiB per 1,000 steps" in findings[0] and "end at step 70" in findings[0]
    sound, said = trained(model, tmp_path / "sound", kept_elements=0)
    assert sound.leak is None
    assert not [line for line in said if line.startswith("finding")]


def test_what_is_kept_of_steps_and_logs_does_not_grow_with_the_run(tmp_path: Path) -> None:
    plan = tiny_order(tmp_path, Engine.NONE, num_devices=1).plan
    progress = Progress()
    callback = ProgressCallback(progress, plan, None, lambda line: None)
    arguments, control = TrainingArguments(str(tmp_path), report_to=[]), TrainerControl()
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(arguments, state, control)
    for step in range(1, 20 * KEPT_LOGS + 1):
        state.global_step = step
        progress.tokens = step
        callback.on_step_end(arguments, state, control)
        state.log_history.append({"loss": 1.0 / step, "step": step})
        callback.on_log(arguments, state, control, {"loss": 1.0 / step})
        assert len(state.log_history) <= 2 * KEPT_LOGS
    assert [entry["step"] for entry in state.log_history[-KEPT_LOGS:]] == [
        *range(19 * KEPT_LOGS + 1, step + 1)
    ]
    assert (progress.first_loss, progress.last_loss) == (1.0, 1.0 / step)
    assert list(progress.step_tokens) == [*range(step - KEPT_STEPS + 1, step + 1)]
    assert len(progress.step_ends) == KEPT_STEPS + 1
