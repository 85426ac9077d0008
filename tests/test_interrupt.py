"""A run that is interrupted in the middle of an optimizer step and goes on is the undisturbed one, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoints import last_checkpoint
from launcher.documents import read_document
from launcher.job import Engine, Method
from launcher.run.launch import prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOutcome
from tests.tiny_job import tiny_order

ADAPTER = "adapter_model.safetensors"
WORKER = """
import os, signal, sys
from pathlib import Path
from launcher.documents import read_document
from launcher.libraries import hide_libraries, unneeded_libraries
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder

paths, interrupted_at, passes = RunPaths(Path(sys.argv[1])), int(sys.argv[2]), [0]
order = read_document(paths.worker, WorkerOrder)
hide_libraries(unneeded_libraries(order.plan))
import torch
from launcher.worker.train import run

def count(module, args):
    if type(module).__name__ == "PeftModelForCausalLM" and module.training:
        passes[0] += 1
        if passes[0] == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)  # what the launcher makes of the SIGTERM that it gets

torch.nn.modules.module.register_module_forward_pre_hook(count)
run(order, paths)
"""
"""A worker that is interrupted in its forward pass of that number."""
STEPS_OF_EPOCH = 4


def worked(paths: RunPaths, interrupted_at: int = 0) -> WorkerOutcome:
    """Runs a worker to its end."""
    command = [sys.executable, "-c", WORKER, str(paths.root), str(interrupted_at)]
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert child.returncode == 0, child.stderr
    return read_document(paths.outcome(0), WorkerOutcome)


def ordered(tiny: Path, root: Path) -> RunPaths:
    """A run of six steps of four micro batches, four steps an epoch, with dropout, that evaluates every second step."""
    rows = (tiny / "train.jsonl").read_text().splitlines()[:20]
    (tiny / "few.jsonl").write_text("\n".join(rows) + "\n")
    order = tiny_order(tiny, Engine.NONE, method=Method.LORA, num_devices=1)
    job = order.job
    job = replace(
        job,
        data=replace(job.data, path=str(tiny / "few.jsonl"), packing=False, max_length=64),
        method=replace(job.method, dropout=0.2),
        training=replace(job.training, max_steps=6),
        evaluation=replace(job.evaluation, enabled=True, steps=2, num_examples=4),
    )
    paths = RunPaths(root)
    prepare_run(paths, replace(order, job=job), {})
    return paths


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = ordered(tiny, tmp_path_factory.mktemp("undisturbed") / "run")
    assert worked(paths).status is Status.DONE
    return paths


@pytest.mark.parametrize(
    ("passes", "step"),
    [
        (10, 2),  # in the middle of the third step, after an evaluation
        # in the first step of the second epoch
        pytest.param(4 * STEPS_OF_EPOCH + 1, STEPS_OF_EPOCH, marks=pytest.mark.thorough),
        pytest.param(2, 0, marks=pytest.mark.thorough),  # before the first step is done
    ],
)
def test_going_on_from_an_interrupted_step_is_bit_exact(
    passes: int, step: int, undisturbed: RunPaths, tiny: Path, tmp_path: Path
) -> None:
    paths = ordered(tiny, tmp_path / "run")
    outcome = worked(paths, passes)
    assert outcome.status is Status.INTERRUPTED and outcome.steps == step
    left = last_checkpoint(paths.checkpoints)
    if step:
        assert left is not None and left.name == f"checkpoint-{step}"
        assert outcome.message == f"stopped after step {step}; a checkpoint was saved"
    else:
        assert left is None
        assert outcome.message.endswith("nothing new is saved")
    if step == STEPS_OF_EPOCH:
        assert worked(paths, 2).steps == step, "interrupted once more, before it has done a step"
    assert worked(paths).status is Status.DONE
    assert (paths.model / ADAPTER).read_bytes() == (undisturbed.model / ADAPTER).read_bytes()
