"""Every engine trains the same job on two processes as one process does, saves what others load, and resumes.

Nothing is played: `accelerate launch`, DeepSpeed, FSDP2 and gloo, on a model of a million parameters. The loss of the
same job must not depend on how many processes share it (DeepSpeed and FSDP2 against one plain process).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.documents import read_document
from launcher.errors import Interrupted, LaunchError, WorkerOutOfMemory
from launcher.job import Checkpointing, Engine, Method, Optimizer
from launcher.memory import Category, MemoryMeasurement, Phase
from launcher.run.endings import raise_for_outcome
from launcher.run.launch import launch_worker, prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOrder, WorkerOutcome
from tests.memory_group import memory_group
from tests.tiny_job import tiny_order, write_tiny_model

SAME_LOSS = 1e-3
"""What the loss of the same job may differ by, relative."""


@dataclass
class Run:
    """A run of the tiny job, and what was shown of it."""

    paths: RunPaths
    order: WorkerOrder
    shown: list[str]
    on_line: Callable[[str], None] = lambda line: None

    def launch(self) -> WorkerOutcome:
        outcome = launch_worker(self.paths, self.order, self._show)
        raise_for_outcome(outcome, self.paths, self.order.plan.world_size)
        return outcome

    def losses(self) -> list[float]:
        lines = [json.loads(line) for line in self.paths.metrics.read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    def measured(self) -> list[MemoryMeasurement]:
        ranks = range(self.order.plan.world_size)
        return [read_document(self.paths.measured(rank), MemoryMeasurement) for rank in ranks]

    def resume_after(self, step: int) -> list[float]:
        """Losses after a checkpoint, when training goes on from there."""
        for folder in self.paths.checkpoints.glob("checkpoint-*"):
            if int(folder.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(folder)
        self.paths.metrics.unlink()
        self.launch()
        return self.losses()

    def _show(self, line: str) -> None:
        self.shown.append(line)
        self.on_line(line)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


def prepared(folder: Path, order: WorkerOrder) -> Run:
    paths = RunPaths(folder / "run")
    prepare_run(paths, order, {})
    return Run(paths, order, [])


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The job on one process, all weights trained."""
    order = tiny_order(tiny, Engine.NONE, num_devices=1)
    run = prepared(tmp_path_factory.mktemp("alone"), order)
    run.launch()
    return run


def weights(folder: Path) -> dict[str, Any]:
    """The weights of a saved model, loaded as anybody would."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def members_of(paths: RunPaths) -> list[str]:
    """Processes that still work on a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(paths.root) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


def listeners_of(paths: RunPaths) -> set[str]:
    """Addresses on which the processes that work on a run, and theirs, listen."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if str(paths.root) in (process.info["cmdline"] or []):
            with suppress(psutil.NoSuchProcess):
                connections = process.net_connections()
                found |= {entry.laddr.ip for entry in connections if entry.status == psutil.CONN_LISTEN}
    return found


# --------------------------------------------------------------------------------------------------- the same job


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        (Engine.DDP, 0),
        pytest.param(Engine.DEEPSPEED, 0, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 1, marks=pytest.mark.thorough),
        pytest.param(Engine.DEEPSPEED, 2, marks=pytest.mark.thorough),
    ],
)
def test_two_processes_learn_as_one(
    engine: Engine, stage: int, alone: Run, tiny: Path, tmp_path: Path
) -> None:
    run = prepared(tmp_path, tiny_order(tiny, engine, stage))
    addresses: set[str] = set()
    run.on_line = lambda line: addresses.update(listeners_of(run.paths))
    outcome = run.launch()
    assert addresses == {"127.0.0.1"}
    assert outcome.world_size == 2 and outcome.steps == 4
    assert run.losses() == pytest.approx(alone.losses(), rel=SAME_LOSS)
    assert [measured.rank for measured in run.measured()] == [0, 1]
    for measured in run.measured():
        assert measured.phase(Phase.OPTIMIZER_STEP) is not None
        whole = alone.measured()[0].resident_bytes
        share = measured.resident_bytes[Category.OPTIMIZER_STATE] / whole[Category.OPTIMIZER_STATE]
        # AdamW has two states; from stage 1 on DeepSpeed has a copy of the weights beside them, and half of all that
        assert share == pytest.approx(
            {Engine.DDP: 1.0, Engine.DEEPSPEED: (0.75 if stage else 1.0)}[engine], rel=0.01
        )


@pytest.mark.parametrize("engine", [Engine.DEEPSPEED, pytest.param(Engine.FSDP2, marks=pytest.mark.thorough)])
def test_sharded_processes_learn_save_and_resume_as_one(
    engine: Engine, alone: Run, tiny: Path, tmp_path: Path
) -> None:
    run = prepared(tmp_path, tiny_order(tiny, engine, 3, training={"save_steps": 2}))
    run.launch()
    assert run.losses() == pytest.approx(alone.losses(), rel=SAME_LOSS)
    ours, theirs = weights(run.paths.model), weights(alone.paths.model)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3
    parameters = [measured.resident_bytes[Category.PARAMETERS] for measured in run.measured()]
    whole = alone.measured()[0].resident_bytes[Category.PARAMETERS]
    assert all(part == pytest.approx(whole / 2, rel=0.02) for part in parameters)
    assert run.resume_after(2) == pytest.approx(alone.losses()[2:], rel=SAME_LOSS)


@pytest.mark.thorough
@pytest.mark.parametrize("engine", [Engine.DEEPSPEED, Engine.FSDP2])
def test_sharded_processes_listen_on_the_loopback_alone(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    """From the first line of the job to its last step."""
    run = prepared(tmp_path, tiny_order(tiny, engine, 3))
    addresses: set[str] = set()
    run.on_line = lambda line: addresses.update(listeners_of(run.paths))
    run.launch()
    assert addresses == {"127.0.0.1"}


@pytest.mark.thorough
def test_a_sharded_adapter_is_saved_as_anybody_loads_it(tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    order = tiny_order(
        tiny,
        Engine.DEEPSPEED,
        3,
        Method.LORA,
        activation_checkpointing=Checkpointing.FULL,
        offload_optimizer=True,
    )
    run = prepared(tmp_path, order)
    run.launch()
    base = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = PeftModel.from_pretrained(base, str(run.paths.model))
    trained = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(trained) == 7 * 6 and all(float(weight.detach().abs().max()) > 0 for weight in trained)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        (1, Optimizer.ADAMW_8BIT),
        (2, Optimizer.PAGED_ADAMW_8BIT),
        (3, Optimizer.ADAMW_8BIT),
        (3, Optimizer.PAGED_ADAMW_32BIT),
    ],
)
def test_flat_parts_are_updated_by_bitsandbytes(
    stage: int, optimizer: Optimizer, alone: Run, tiny: Path, tmp_path: Path
) -> None:
    """Eight bits of a state are as good as 32 for four steps."""
    order = tiny_order(tiny, Engine.DEEPSPEED, stage, optimizer=optimizer)
    run = prepared(
        tmp_path,
        replace(order, job=replace(order.job, training=replace(order.job.training, optimizer=optimizer))),
    )
    run.launch()
    assert run.losses() == pytest.approx(alone.losses(), rel=SAME_LOSS)


@pytest.mark.thorough
def test_quantised_parameters_learn_the_same_where_they_are_offloaded(tiny: Path, tmp_path: Path) -> None:
    losses = []
    for name, offloaded in (("kept", False), ("offloaded", True)):
        order = tiny_order(
            tiny, Engine.DEEPSPEED, 3, Method.QLORA, offload_optimizer=offloaded, offload_parameters=offloaded
        )
        (tmp_path / name).mkdir()
        run = prepared(tmp_path / name, order)
        run.launch()
        losses.append(run.losses())
    assert losses[1] == pytest.approx(losses[0], rel=SAME_LOSS) and losses[0][-1] < losses[0][0]


# ---------------------------------------------------------------------------------------------------------- endings


def test_an_interrupt_saves_on_both_ranks_after_the_same_step(tiny: Path, tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    order = tiny_order(tiny, Engine.DDP, method=Method.LORA, training={"max_steps": 2_000})
    run = prepared(tmp_path, order)
    run.on_line = lambda line: os.kill(os.getpid(), signal.SIGINT) if line.startswith("step 3/") else None
    try:
        with pytest.raises(Interrupted, match="a checkpoint was saved"):
            run.launch()
    finally:
        signal.signal(signal.SIGINT, previous)
    outcomes = [read_document(run.paths.outcome(rank), WorkerOutcome) for rank in (0, 1)]
    assert [outcome.status for outcome in outcomes] == [Status.INTERRUPTED] * 2
    assert outcomes[0].steps == outcomes[1].steps
    assert members_of(run.paths) == []
    assert (run.paths.checkpoints / f"checkpoint-{outcomes[0].steps}" / "trainer_state.json").exists()


def test_a_rank_that_is_killed_is_named_with_its_log(tiny: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path, tiny_order(tiny, Engine.DEEPSPEED, 2, training={"max_steps": 10_000}))
    killed_at: list[float] = []

    def kill(line: str) -> None:
        if line.startswith("step 2/"):
            killed_at.append(time.monotonic())
            os.kill(int(run.paths.pid(1).read_text()), signal.SIGKILL)

    run.on_line = kill
    with pytest.raises(LaunchError, match=r"rank 1 on host \S+ ended with signal SIGKILL") as caught:
        run.launch()
    assert time.monotonic() - killed_at[0] < 30
    assert "  | " in caught.value.message and caught.value.exit_code == 6
    assert members_of(run.paths) == []


@pytest.mark.thorough
def test_a_rank_that_the_kernel_kills_for_memory_ends_with_its_own_code(tiny: Path, tmp_path: Path) -> None:
    group = memory_group(f"launcher-test-{os.getpid()}", 32 << 20)
    run = prepared(tmp_path, tiny_order(tiny, Engine.DDP, training={"max_steps": 10_000}))
    try:

        def squeeze() -> None:
            """What the rank needs once it has begun counts, and there is no room for it."""
            while not (run.paths.pid(1).exists() and run.paths.pid(1).read_text()):
                time.sleep(0.05)
            (group / "cgroup.procs").write_text(run.paths.pid(1).read_text())

        threading.Thread(target=squeeze, daemon=True).start()
        with pytest.raises(WorkerOutOfMemory, match="rank 1 on host") as caught:
            run.launch()
        assert caught.value.exit_code == 4 and "for want of memory" in caught.value.hint
        assert members_of(run.paths) == []
    finally:
        group.rmdir()
