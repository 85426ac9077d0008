"""What a rehearsal finds in a real job: a prediction that leaves something out is found, and what it left out named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from launcher.errors import Interrupted
from launcher.job import Engine
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.reconciliation import rehearsal_of
from launcher.report.rehearsal import rehearsal_text
from launcher.run.launch import launch_worker, prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import Rehearsal
from tests.tiny_job import tiny_order, write_tiny_model

LENGTH = 32
"""So short that the optimizer's states are more than all that comes and goes."""


def test_states_that_a_prediction_left_out_are_found_before_the_first_step(tmp_path: Path) -> None:
    """AdamW has two numbers of four bytes for each weight; the prediction is told of the weights alone."""
    write_tiny_model(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        num_weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # it is no mapping
    weights_bytes = 4 * num_weights
    order = tiny_order(tmp_path, Engine.NONE, num_devices=1, max_length=LENGTH, gradient_accumulation_steps=4)
    job = replace(
        order.job,
        data=replace(order.job.data, max_length=LENGTH),
        launch=replace(order.job.launch, rehearse=True),
    )
    peak = PhasePeak(Phase.TRAIN_STEP, weights_bytes, {Category.PARAMETERS: weights_bytes})
    predicted = MemoryEstimate((peak,), {Category.PARAMETERS: weights_bytes}, 0)
    order, paths = replace(order, job=job, predicted=predicted), RunPaths(tmp_path / "run")
    shown: list[str] = []
    prepare_run(paths, order, {})
    found: list[Rehearsal | None] = []

    def rehearsed() -> None:
        found.append(rehearsal_of(order, paths))
        raise Interrupted("the run itself is not of interest")

    with pytest.raises(Interrupted, match="not of interest"):
        launch_worker(paths, order, shown.append, rehearsed=rehearsed)
    assert not paths.metrics.exists() and not paths.model.exists()
    (rehearsal,) = found
    assert rehearsal is not None
    (finding,) = rehearsal.findings
    assert (finding.phase, finding.category) == (Phase.TRAIN_STEP, "optimizer_state")
    assert finding.category_excess_bytes == pytest.approx(2 * weights_bytes, rel=0.001)
    assert finding.measured_bytes > 3 * weights_bytes > finding.expected_bytes
    assert "more of optimizer_state than predicted" in " ".join(rehearsal_text(rehearsal).split())
