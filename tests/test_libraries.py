"""Which optional libraries a plan calls, and that a worker starts without the others."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import load_job
from launcher.documents import write_document
from launcher.job import Engine, Method, Optimizer
from launcher.libraries import unneeded_libraries
from launcher.planning import needed_libraries
from launcher.run_paths import RunPaths
from tests.tiny_job import tiny_order


@pytest.mark.parametrize(
    ("changes", "unneeded"),
    [
        ({}, ("bitsandbytes", "deepspeed")),
        ({"method": Method.QLORA, "rank": 8}, ("deepspeed",)),
        ({"optimizer": Optimizer.PAGED_ADAMW_8BIT}, ("deepspeed",)),
        ({"optimizer": Optimizer.GALORE_ADAMW}, ("deepspeed",)),
        ({"optimizer": Optimizer.APOLLO_ADAMW}, ("deepspeed",)),
    ],
)
def test_what_a_plan_does_not_call_is_hidden(
    changes: dict[str, object], unneeded: tuple[str, ...], tmp_path: Path
) -> None:
    plan = replace(tiny_order(tmp_path, Engine.NONE, num_devices=1).plan, **changes)  # type: ignore[arg-type]
    assert unneeded_libraries(plan) == unneeded


@pytest.mark.parametrize(
    ("engine", "unneeded"),
    [(Engine.DEEPSPEED, ("bitsandbytes",)), (Engine.DDP, ("bitsandbytes", "deepspeed"))],
)
def test_deepspeed_is_there_for_its_own_plans(
    engine: Engine, unneeded: tuple[str, ...], tmp_path: Path
) -> None:
    assert unneeded_libraries(tiny_order(tmp_path, engine, num_devices=2).plan) == unneeded


@pytest.mark.parametrize("package", ["galore_torch", "apollo_torch"])
def test_packages_of_low_rank_optimizers_import_bitsandbytes(package: str) -> None:
    """So their plans need it, whichever of their optimizers they name."""
    code = f"import sys; sys.modules['bitsandbytes'] = None; import {package}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "bitsandbytes" in result.stderr
    name = package.removesuffix("_torch")
    job = load_job(["method=full", f"training.optimizer={name}_adamw"])
    assert "bitsandbytes" in needed_libraries(job)


def test_a_worker_starts_without_what_its_plan_does_not_call(tmp_path: Path) -> None:
    """Its model is not there, so it ends after its imports."""
    paths = RunPaths(tmp_path / "run")
    order = tiny_order(tmp_path / "nowhere", Engine.NONE, num_devices=1)
    for folder in (paths.root, paths.logs):
        folder.mkdir(parents=True)
    write_document(paths.worker, order)
    command = [sys.executable, "-X", "importtime", "-m", "launcher.worker", str(paths.root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    wanted = {"torch", "peft", "trl", "launcher.worker.ingredients"}
    assert not wanted - imported, result.stderr[-800:]
    assert not [name for name in imported if name.startswith(("bitsandbytes.", "deepspeed."))]
    assert int(paths.pid(0).read_text()) > 0 and paths.host(0).exists()
