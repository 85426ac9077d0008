"""Models with modelling code of their own: it is traced when the job trusts it, and it is what trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from launcher.config import load_job
from launcher.errors import UnsupportedByPlanner
from launcher.job import Engine, JobSpec
from launcher.memory import Phase
from launcher.planner import trace
from launcher.planner.subject import subject_of
from launcher.planning import resolve
from launcher.run_paths import RunPaths
from launcher.units import MIB
from launcher.worker.ingredients import prepare
from launcher.worker.progress import Progress
from launcher.worker.train import train
from tests.tiny_job import tiny_order, write_tiny_model

KEPT_MIB = 3
CODE = f"""
import torch
from transformers import LlamaForCausalLM

class Keeping(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.kept = torch.ones({KEPT_MIB * MIB // 4}, device=output.device)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    (folder / "keeping.py").write_text(CODE)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "keeping.Keeping"}}
    file.write_text(json.dumps(config))
    return folder


def resolved(model: Path, trusts: bool) -> JobSpec:
    words = [f"model.path={model}", f"model.trust_remote_code={str(trusts).lower()}", "hardware=cpu"]
    return resolve(load_job(words), ())


def peak_bytes(model: Path, trusts: bool) -> int:
    """Predicted peak of a step of full fine-tuning."""
    order = tiny_order(model, Engine.NONE, num_devices=1)
    job = replace(order.job, model=resolved(model, trusts).model)
    skyline = trace.trace_shape(trace.open_subject(subject_of(job, order.plan)), 1, 192, 4)
    return next(peak.allocated_bytes for peak in skyline.peaks(1, 192, 4) if peak.phase is Phase.TRAIN_STEP)


def test_own_code_is_traced_when_it_is_trusted_and_is_what_trains(model: Path, tmp_path: Path) -> None:
    trusting, other = peak_bytes(model, trusts=True), peak_bytes(model, trusts=False)
    assert trusting - other == pytest.approx(KEPT_MIB * MIB, abs=256)
    order = tiny_order(model, Engine.NONE, num_devices=1)
    order = replace(order, job=replace(order.job, model=replace(order.job.model, trust_remote_code=True)))
    classes: list[str] = []

    def look(made: nn.Module) -> nn.Module:
        classes.append(type(made).__name__)
        return made

    ingredients = replace(prepare(order, RunPaths(tmp_path / "run")), adapt=look)
    _, measurement = train(order.job, order.plan, ingredients, Progress(), lambda line: None)
    assert classes == ["Keeping"]
    (measured,) = (peak.allocated_bytes for peak in measurement.phases if peak.phase is Phase.TRAIN_STEP)
    assert trusting == pytest.approx(measured, rel=2e-3)


def test_nobody_but_the_launcher_says_that_there_is_code(model: Path) -> None:
    words = [f"model.path={model}", "model.code_digest=1a", "hardware=cpu"]
    assert not resolve(load_job(words), ()).model.code_digest
    assert not resolve(
        load_job(["recipe=llama_lora", "model.code_digest=1a", "hardware=cpu"]), ()
    ).model.code_digest
    order = tiny_order(model, Engine.NONE, num_devices=1)
    distrusting = replace(
        order.job, model=replace(resolved(model, trusts=True).model, trust_remote_code=False)
    )
    assert not subject_of(distrusting, order.plan).job.model.path


def test_other_code_is_another_model(model: Path) -> None:
    digest = resolved(model, trusts=True).model.code_digest
    assert digest and not resolved(model, trusts=False).model.code_digest
    (model / "keeping.py").write_text(CODE + "\n")
    assert resolved(model, trusts=True).model.code_digest != digest


def test_code_that_fails_is_named(model: Path) -> None:
    (model / "keeping.py").write_text("raise ValueError('not today')")
    job = resolved(model, trusts=True)
    plan = tiny_order(model, Engine.NONE, num_devices=1).plan
    with pytest.raises(UnsupportedByPlanner, match="not today"):
        trace.trace_shape(trace.open_subject(subject_of(job, plan)), 1, 192, 4)
