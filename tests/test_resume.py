"""Runs go on: past a damaged checkpoint, and under another plan; what can't be is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launcher import cli
from launcher.checkpoints import last_checkpoint
from launcher.config import load_job
from launcher.documents import adapter, read_document, write_document
from launcher.errors import ConfigError, LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec
from launcher.memory import DiskEstimate
from launcher.optimisation import TrainingSpec
from launcher.plan import Buckets
from launcher.planner.arrangements import arrangements
from launcher.planner.buckets import default_buckets
from launcher.planner.space import batch_splits
from launcher.planning import resolve
from launcher.report.rehearsal import replan_text
from launcher.resume_limits import checkpoint_limits, checkpoint_pins, continued_pins, is_changeable, pins_of
from launcher.resume_plan import give_order, resumption
from launcher.run.disk import checkpoints_to_come, still_written_bytes
from launcher.run.endings import raise_for_outcome
from launcher.run.launch import launch_worker, prepare_run, rewrite_run
from launcher.run_paths import RunPaths
from launcher.run_record import Replan, WorkerOrder
from tests.test_end_to_end import document_of, launch
from tests.test_recovery import losses
from tests.tiny_job import BUCKETS, tiny_order, write_tiny_model

SAME_LOSS = 1e-3
SAME_WEIGHTS = 1e-5
"""Weights of a learning rate of 2e-4: sums over a batch in another order differ in their last digits."""
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run of four steps with a checkpoint after the second and the fourth."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = [
        f"model.path={tiny}",
        f"data.path={tiny / 'train.jsonl'}",
        "data.format=text",
        "data.max_length=192",
        "data.packing=true",
        "training.global_batch_size=4",
        "training.max_steps=4",
        "training.save_steps=2",
        "training.precision=fp32",
        "training.report_to=[]",
        "planner.pin.micro_batch_size=4",
        "planner.pin.gradient_accumulation_steps=1",
        "hardware=cpu",
        f"trace_cache={cache}",
        "launch.rehearse=false",
        f"run_dir={folder / 'run'}",
    ]
    result = launch(job, folder)
    assert result.returncode == 0, result.stderr
    return RunPaths(folder / "run")


@pytest.fixture
def copied(undisturbed: RunPaths, tmp_path: Path) -> RunPaths:
    """The same run in a directory of its own."""
    return RunPaths(Path(shutil.copytree(undisturbed.root, tmp_path / "run")))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------ going on


def test_a_damaged_checkpoint_is_passed_over(undisturbed: RunPaths, copied: RunPaths) -> None:
    weights = copied.checkpoints / "checkpoint-4" / ADAPTER
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    shutil.rmtree(copied.model)
    result = launch([f"resume={copied.root}"], copied.root)
    assert result.returncode == 0, result.stderr
    assert f"passing over checkpoint-4: {ADAPTER} does not match its digest" in result.stdout
    logged = [json.loads(line) for line in copied.metrics.read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == [1, 2, 3, 4, 3, 4], "it went on after step 2"
    assert (copied.model / ADAPTER).read_bytes() == (undisturbed.model / ADAPTER).read_bytes()
    assert (copied.checkpoints / "torn-checkpoint-4").is_dir()


@pytest.mark.thorough
def test_another_micro_batch_goes_on_with_the_same_batches(undisturbed: RunPaths, copied: RunPaths) -> None:
    shutil.rmtree(copied.checkpoints / "checkpoint-4")
    result = launch(
        [
            f"resume={copied.root}",
            "planner.pin.micro_batch_size=1",
            "launch.grace_seconds=60",
            "output=json",
        ],
        copied.root,
    )
    assert result.returncode == 0, result.stderr
    plan = document_of(result)["plan"]
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"]) == (1, 4)
    assert json.loads(copied.plan.read_text())["plan"] == plan
    assert losses(str(copied.root)) == pytest.approx(losses(str(undisturbed.root)), rel=SAME_LOSS)
    ours, theirs = load_file(copied.model / ADAPTER), load_file(undisturbed.model / ADAPTER)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < SAME_WEIGHTS
    (replan,) = json.loads(copied.replans.read_text())
    assert replan["by_user"] and replan["from_step"] == 2 and replan["phase"] is None
    assert replan["message"] == "planner.pin.micro_batch_size=1 launch.grace_seconds=60"
    assert replan["change"].startswith("micro_batch_size 4 -> 1, gradient_accumulation_steps 1 -> 4")
    assert replan["change"].endswith("launch.grace_seconds 120 -> 60")
    order = read_document(copied.worker, WorkerOrder)
    assert order.job.launch.grace_seconds == 60 and order.job.planner.pin.gradient_accumulation_steps is None


def trained(folder: Path, order: WorkerOrder) -> tuple[RunPaths, list[float]]:
    """A run that lost its last two of four steps, and the losses that it had."""
    paths = RunPaths(folder / "run")
    prepare_run(paths, order, {})
    raise_for_outcome(launch_worker(paths, order, lambda line: None), paths, order.plan.world_size)
    expected = losses(str(paths.root))
    shutil.rmtree(paths.checkpoints / "checkpoint-4")
    return paths, expected


@pytest.mark.thorough
def test_one_process_goes_on_where_two_were(tiny: Path, cache: Path, tmp_path: Path) -> None:
    order = tiny_order(tiny, Engine.DDP, training={"save_steps": 2})
    paths, expected = trained(tmp_path, replace(order, job=resolve(order.job, ())))
    result = launch(
        [f"resume={paths.root}", "hardware.num_devices=1", f"trace_cache={cache}", "output=json"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    document = document_of(result)
    assert document["plan"]["engine"] == "none" and document["outcome"]["world_size"] == 1
    assert document["plan"]["method"] == "full", "the plan's method, and no other"
    assert "2 processes, and 1 go on" in result.stderr
    assert losses(str(paths.root)) == pytest.approx(expected, rel=SAME_LOSS)
    (replan,) = json.loads(paths.replans.read_text())
    assert "engine ddp -> none, num_devices 2 -> 1" in replan["change"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("engine", "stage", "num_devices", "taken_stage", "taken_devices"),
    [
        (Engine.DEEPSPEED, 1, 2, 2, 2),
        (Engine.DEEPSPEED, 2, 2, 1, 2),
        (Engine.FSDP2, 3, 2, 3, 4),
        (Engine.FSDP2, 3, 4, 3, 2),
    ],
)
def test_what_is_said_to_read_a_checkpoint_reads_it(
    engine: Engine,
    stage: int,
    num_devices: int,
    taken_stage: int,
    taken_devices: int,
    tiny: Path,
    tmp_path: Path,
) -> None:
    order = tiny_order(tiny, engine, stage, num_devices=num_devices, training={"save_steps": 2})
    assert checkpoint_limits(order.plan, {"zero_stage": taken_stage}, taken_devices) == ()
    paths, expected = trained(tmp_path, order)
    taken = tiny_order(tiny, engine, taken_stage, num_devices=taken_devices, training={"save_steps": 2})
    rewrite_run(paths, taken, {})
    raise_for_outcome(launch_worker(paths, taken, lambda line: None), paths, taken_devices)
    assert losses(str(paths.root)) == pytest.approx(expected, rel=SAME_LOSS)


@pytest.mark.thorough
def test_deepspeed_does_not_read_what_another_number_of_processes_wrote(tiny: Path, tmp_path: Path) -> None:
    """When it does one day, `checkpoint_limits` refuses too much."""
    paths, _ = trained(tmp_path, tiny_order(tiny, Engine.DEEPSPEED, 2, training={"save_steps": 2}))
    taken = tiny_order(tiny, Engine.DEEPSPEED, 2, num_devices=4)
    rewrite_run(paths, taken, {})
    with pytest.raises(LaunchError, match="DP world size of 2 but the current world size is 4"):
        raise_for_outcome(launch_worker(paths, taken, lambda line: None), paths, 4)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.learning_rate=5"], "with `training.learning_rate`"),
        (["recipe=llama_lora", "method=full"], "with `recipe`, `method`"),
        (["hardware=a100_40g"], "with `hardware`"),
        (["hardware.memory_bytes=1"], "with `hardware.memory_bytes`"),
        (["planner.pin.max_length=64"], "with `planner.pin.max_length`"),
        (["planner={pin: {rank: 4, micro_batch_size: 1}}"], "with `planner.pin.rank`:"),
        (["run_dir=/elsewhere"], "with `run_dir`"),
        (["launch.rank=3"], "unknown key `launch.rank`"),
        (["action=plan"], "`action=run` alone"),
    ],
)
def test_other_keys_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(["resume=runs/x", *arguments])
    assert words in str(caught.value) and caught.value.exit_code == 2


def test_keys_that_make_no_other_model_are_not_refused() -> None:
    typed = ["planner.pin.zero_stage=2", "hardware.num_devices=2", "launch={grace_seconds: 9}", "action=run"]
    job = load_job(["resume=runs/x", *typed, "evaluation.batch_size=1", "output=json"])
    assert job.hardware.num_devices == 1 and job.planner.pin.zero_stage is None, (
        "they are the run's, not this job's"
    )
    assert is_changeable("launch.main_port") and not is_changeable("planner.pin.rank")
    assert load_job(["planner.pin.zero_stage=2", "resume="]).planner.pin.zero_stage == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.learning_rate=5"], "legal beside `resume`: planner.pin.*"),
        (["planner.pin.micro_batch_size=-1"], "greater than or equal to 1"),
        (["planner.pin.micro_batch_size=3"], "can't make training.global_batch_size=4"),
        (["hardware.num_devices=3"], "can't be split over 3 devices"),
        (["hardware.num_devices=2", "planner.pin.zero_stage=2"], "can't continue what one process wrote"),
        (["launch.partition=gpu"], "says nothing to launch.cluster=local"),
    ],
)
def test_what_is_refused_leaves_the_run_as_it_was(
    arguments: list[str], words: str, copied: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    copied.lock.unlink(missing_ok=True)
    before = files_of(copied.root)
    assert cli.run([f"resume={copied.root}", *arguments]) == 2
    assert words in capsys.readouterr().err
    after = files_of(copied.root)
    after.pop(copied.lock.name, None)
    assert after == before


@pytest.mark.parametrize(
    ("engine", "stage", "changes", "words", "hint"),
    [
        (
            Engine.DDP,
            0,
            {"planner.pin.zero_stage": 2},
            "planner.pin.zero_stage=2 can't continue what DDP wrote",
            "one device, or DDP",
        ),
        (
            Engine.DDP,
            0,
            {"planner.pin.engine": "fsdp2"},
            "on 2 devices only engine ddp reads it",
            "one device, or DDP",
        ),
        (
            Engine.DEEPSPEED,
            2,
            {"hardware.num_devices": 1},
            "1 processes can't continue what 2 wrote",
            "alike) on 2",
        ),
        (
            Engine.DEEPSPEED,
            3,
            {"planner.pin.zero_stage": 2},
            "only zero_stage 3 reads it",
            "ZeRO stage 3 on 2 devices",
        ),
        (Engine.DEEPSPEED, 2, {"planner.pin.offload_optimizer": True}, "only offload_optimizer false", ""),
        (
            Engine.FSDP2,
            3,
            {"hardware.num_devices": 1},
            "a single device has no engine that reads it",
            "from two on",
        ),
    ],
)
def test_what_no_engine_can_continue_is_named_with_what_can(
    engine: Engine, stage: int, changes: dict[str, Any], words: str, hint: str, tmp_path: Path
) -> None:
    order = tiny_order(tmp_path, engine, stage)
    with pytest.raises(ConfigError) as caught:
        resumption(order, changes, tmp_path / "checkpoint-2", ())
    assert words in caught.value.message and "checkpoint-2" in caught.value.message
    assert hint in caught.value.hint and caught.value.exit_code == 2


def test_checkpoints_fix_what_reads_them() -> None:
    ddp, zero = tiny_order(Path("/m"), Engine.DDP).plan, tiny_order(Path("/m"), Engine.DEEPSPEED, 1).plan
    assert checkpoint_pins(ddp, {}, 1)["engine"] is Engine.NONE
    assert checkpoint_pins(ddp, {}, 4)["engine"] is Engine.DDP
    assert checkpoint_pins(zero, {}, 2)["zero_stage"] == 1
    assert checkpoint_pins(zero, {"zero_stage": 2}, 2)["zero_stage"] == 2
    within = replace(tiny_order(Path("/m"), Engine.FSDP2, 3).plan, shard_within_node=True)
    assert checkpoint_limits(within, {}, 2) == () and len(checkpoint_limits(within, {}, 4)) == 1
    assert "shard_within_node=false" in checkpoint_limits(within, {"shard_within_node": False}, 2)[0]
    assert "sub_group_elements" in checkpoint_pins(tiny_order(Path("/m"), Engine.DEEPSPEED, 3).plan, {}, 2)


def test_earlier_pins_give_way_to_what_is_asked_for() -> None:
    job = load_job(["planner.pin.engine=ddp", "planner.pin.gradient_accumulation_steps=2", "action=plan"])
    pin = replace(job.planner.pin, micro_batch_size=4)
    kept = continued_pins(pin, {"micro_batch_size": 4}, {"engine": Engine.NONE, "zero_stage": 0})
    assert (kept.micro_batch_size, kept.gradient_accumulation_steps, kept.engine) == (4, None, None)
    assert continued_pins(pin, {"attention": "eager"}, {"engine": Engine.DDP}) == pin


@pytest.mark.parametrize(
    ("engine", "stage", "buckets"),
    [
        (Engine.NONE, 0, None),
        (Engine.DDP, 0, BUCKETS),
        (Engine.FSDP2, 3, BUCKETS),
        (Engine.DEEPSPEED, 2, BUCKETS),
        (Engine.DEEPSPEED, 3, replace(BUCKETS, overlap_exchange=False)),
    ],
)
def test_a_plan_with_all_its_knobs_pinned_is_the_only_one(
    engine: Engine, stage: int, buckets: Buckets | None
) -> None:
    """So another evaluation batch leaves the training's plan as it is."""
    num_devices = 1 if engine is Engine.NONE else 2
    order = tiny_order(Path("/m"), engine, stage, num_devices=num_devices, buckets=buckets)
    architecture = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = replace(order.job.model, architecture=architecture)
    job: JobSpec = replace(
        order.job, model=model, planner=replace(order.job.planner, pin=pins_of(order.plan))
    )
    assert batch_splits(job) == ((1, order.plan.gradient_accumulation_steps),)
    (only,), refused = arrangements(job, replace(order.plan, buckets=None))
    assert refused == {} and only.applied_to(order.plan, job) == order.plan
    assert order.plan.buckets is None or order.plan.buckets != default_buckets(architecture, order.plan)


def test_a_run_that_is_given_another_order_keeps_its_history(tmp_path: Path) -> None:
    paths, shown = RunPaths(tmp_path / "run"), list[str]()
    before = tiny_order(tmp_path, Engine.DDP, num_nodes=2, num_devices=1)
    prepare_run(paths, before, {})
    assert paths.node_command(1).exists()
    paths.outcome(1).write_text("of an earlier run")
    after = tiny_order(tmp_path, Engine.NONE, num_devices=1)
    give_order(paths, before, after, {"hardware.num_nodes": 1}, {"plan": "new"}, shown.append)
    give_order(paths, after, after, {"planner.pin.engine": "none"}, {"plan": "new"}, shown.append)
    give_order(paths, after, before, {"hardware.num_nodes": 2}, {"plan": "old"}, shown.append)
    assert read_document(paths.worker, WorkerOrder) == before
    assert not paths.outcome(1).exists(), "what the second rank left does not count"
    assert paths.node_command(1).exists() and "nothing" in shown[1]
    first, second = json.loads(paths.replans.read_text())
    assert "num_nodes 2 -> 1" in first["change"] and "num_nodes 1 -> 2" in second["change"]


def test_the_history_says_who_changed_the_plan(copied: RunPaths) -> None:
    order = read_document(copied.worker, WorkerOrder)
    job = replace(order.job, evaluation=replace(order.job.evaluation, batch_size=2))
    give_order(copied, order, replace(order, job=job), {"evaluation.batch_size": 2}, {}, lambda line: None)
    history = adapter(list[Replan]).validate_json(copied.replans.read_bytes())
    words = "by the user: evaluation.batch_size None -> 2, from the checkpoint of step 4"
    assert words in " ".join(replan_text(history[-1]).split())


# ----------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    ("save_steps", "limit", "max_steps", "there", "expected"),
    [
        (None, None, 10, [], 0),
        (5, None, 20, [], 4),
        (5, None, 20, [5, 7], 3),  # an interrupt saved the second
        (5, None, 20, [5, 10, 15, 20], 0),
        (5, None, 22, [20], 1),
        (5, 1, 20, [15], 1),
        (5, 3, 100, [5], 3),
        (5, 1, 20, [5, 10], 1),  # the first goes when the third is complete
        (5, None, None, [5], 1),
        (5, 2, None, [], 3),
    ],
)
def test_checkpoints_to_come(
    save_steps: int | None, limit: int | None, max_steps: int | None, there: list[int], expected: int
) -> None:
    training = TrainingSpec(save_steps=save_steps, save_total_limit=limit, max_steps=max_steps)
    assert checkpoints_to_come(training, there) == expected


def test_what_lies_there_needs_no_more_room(copied: RunPaths) -> None:
    order = read_document(copied.worker, WorkerOrder)
    disk = order.predicted.disk
    assert disk is not None and disk.checkpoint_bytes > 0
    training = order.job.training
    assert still_written_bytes(copied, training, disk) == 0
    shutil.rmtree(copied.checkpoints / "checkpoint-4")
    assert still_written_bytes(copied, training, disk) == disk.checkpoint_bytes
    shutil.rmtree(copied.model)
    assert still_written_bytes(copied, training, disk) == disk.checkpoint_bytes + disk.model_bytes
    assert still_written_bytes(copied, training, None) == 0


@pytest.mark.parametrize("change", [[], ["launch.grace_seconds=9"]])
def test_a_full_disk_is_told_before_the_run_goes_on(
    change: list[str], copied: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    order = read_document(copied.worker, WorkerOrder)
    predicted = replace(order.predicted, disk=DiskEstimate(0, 0, 10**18, 0))
    write_document(copied.worker, replace(order, predicted=predicted))
    before = copied.worker.read_bytes()
    assert cli.run([f"resume={copied.root}", *change]) == 6
    assert "for checkpoints and models" in capsys.readouterr().err
    assert copied.worker.read_bytes() == before and last_checkpoint(copied.checkpoints) is not None


def test_hardware_that_is_not_here_is_told_before_anything_is_written(tmp_path: Path) -> None:
    order = tiny_order(tmp_path, Engine.DDP)
    write_tiny_model(tmp_path)
    gpu = HardwareSpec(
        name="l4_24g", kind=DeviceKind.CUDA, product="L4", memory_bytes=24 << 30, num_devices=2
    )
    order = replace(order, job=replace(order.job, hardware=gpu))
    with pytest.raises(LaunchError, match="no L4"):
        resumption(order, {"hardware.num_devices": 1}, None, ())
