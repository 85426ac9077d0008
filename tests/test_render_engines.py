"""What is rendered for several devices is what was agreed on (tests/golden), and what accelerate and DeepSpeed read.

To accept new text: LAUNCHER_ACCEPT_GOLDEN=1 pytest tests/test_render_engines.py, then read the difference in git.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cluster import Node
from launcher.engine_config import ASYNCHRONOUS_IO, deepspeed_config, deepspeed_text
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine, JobSpec, Method, ModelSpec, OffloadDevice, Precision, TrainingSpec
from launcher.plan import Buckets, Plan
from launcher.run import render
from launcher.run_paths import RunPaths
from tests.test_render import CPU, CUDA, ONE, RUN, assert_golden

BUCKETS = Buckets(
    reduce_bucket_elements=50_000_000,
    allgather_bucket_elements=60_000_000,
    prefetch_bucket_elements=15_000_000,
    persistence_threshold_elements=100_000,
    max_live_elements=200_000_000,
    max_reuse_distance_elements=300_000_000,
)
MACHINE = replace(CUDA, num_devices=8, nvme_path="/local nvme", num_nodes=2)
SWAP_FOLDER = "/local nvme/swap-1"
JOB = JobSpec(
    hardware=MACHINE,
    model=ModelSpec(architecture={"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192}),
    training=TrainingSpec(global_batch_size=64),
)


def plan(engine: Engine, stage: int = 0, **changes: Any) -> Plan:
    """A plan for two machines with eight devices each, or what the changes say."""
    several = replace(
        ONE,
        engine=engine,
        zero_stage=stage,
        num_devices=8,
        num_nodes=2,
        buckets=BUCKETS,
        gradient_accumulation_steps=2,
    )
    return replace(several, **changes)


PLANS = {
    "ddp": plan(Engine.DDP, num_nodes=1),
    "zero1": plan(Engine.DEEPSPEED, 1, num_nodes=1),
    "zero2_offload": plan(Engine.DEEPSPEED, 2, offload_optimizer=True, num_nodes=1),
    "zero3": plan(Engine.DEEPSPEED, 3),
    "zero3_nvme": plan(
        Engine.DEEPSPEED,
        3,
        offload_optimizer=True,
        offload_parameters=True,
        offload_device=OffloadDevice.NVME,
        precision=Precision.FP16_MIXED,
    ),
    "fsdp2": plan(Engine.FSDP2, 3, num_nodes=1),
    "fsdp2_offload": plan(Engine.FSDP2, 3, offload_parameters=True, offload_optimizer=True, num_nodes=1),
    "fsdp2_within_node": plan(Engine.FSDP2, 3, shard_within_node=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_golden_configurations(name: str) -> None:
    assert_golden(f"accelerate_{name}.yaml", render.accelerate_config(MACHINE, PLANS[name], RUN))
    if PLANS[name].engine is Engine.DEEPSPEED:
        assert_golden(f"deepspeed_{name}.json", deepspeed_text(JOB, PLANS[name], SWAP_FOLDER))


def test_golden_commands_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "package_root", lambda: "/home/me/launcher")
    node = Node(1, "head.cluster", 29500)
    command = render.worker_command(RUN, PLANS["zero3"], node, "/usr/bin/python3")
    environment = render.worker_environment(MACHINE, {}, PLANS["zero3"])
    assert_golden("command_node1.sh", render.command_script(command, environment, "/home/me"))
    command = render.node_command(RUN, node, "/usr/bin/python3")
    assert_golden("command_node1_met.sh", render.command_script(command, render.import_path({}), "/home/me"))


def test_golden_command_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "package_root", lambda: "/home/me/launcher")
    command = render.worker_command(RUN, PLANS["fsdp2"], python="/usr/bin/python3")
    environment = render.worker_environment(MACHINE, {}, PLANS["fsdp2"])
    assert_golden("command_fsdp2.sh", render.command_script(command, environment, "/home/me"))


def launched(plan: Plan, folder: Path, node: Node | None = None) -> argparse.Namespace:
    """The arguments that `accelerate launch` makes of the rendered command and file."""
    from accelerate.commands import launch

    paths = RunPaths(folder)
    folder.mkdir(exist_ok=True)
    paths.accelerate_config.write_text(render.accelerate_config(MACHINE, plan, paths), encoding="utf-8")
    if plan.engine is Engine.DEEPSPEED:
        paths.deepspeed_config.write_text(deepspeed_text(JOB, plan, SWAP_FOLDER), encoding="utf-8")
    _, _, _, *rest = render.worker_command(paths, plan, node)
    arguments, read, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(rest))
    if plan.engine is Engine.DEEPSPEED:  # as `launch_command` does
        arguments.deepspeed_fields_from_accelerate_config = ",".join(read.deepspeed_config)
    found: argparse.Namespace = arguments
    return found


@pytest.mark.parametrize("name", PLANS)
def test_accelerates_own_parser_takes_every_file(name: str, tmp_path: Path) -> None:
    engine, nodes = PLANS[name].engine, PLANS[name].num_nodes
    node = Node(1, "10.0.0.1", 29511) if nodes > 1 else None
    arguments = launched(PLANS[name], tmp_path / "a 'run'", node)
    assert arguments.num_processes == 8 * nodes and arguments.num_machines == nodes
    assert arguments.use_deepspeed is (engine is Engine.DEEPSPEED)
    assert arguments.use_fsdp is (engine is Engine.FSDP2)
    assert arguments.multi_gpu is (engine is Engine.DDP)
    assert arguments.mixed_precision == "no" and not arguments.cpu
    assert arguments.tee == "3" and arguments.log_dir == str(tmp_path / "a 'run'" / "logs")
    assert arguments.main_process_port == (29511 if node else 0)
    if node is not None:
        assert (arguments.machine_rank, arguments.main_process_ip) == (1, "10.0.0.1")
        assert arguments.same_network
    assert arguments.rdzv_backend == ("static" if node else "loopback")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload", "fsdp2_within_node"])
def test_accelerates_fsdp_plugin_reads_what_was_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import CPUOffloadPolicy

    node = Node(1, "10.0.0.1", 29511) if PLANS[name].num_nodes > 1 else None
    arguments = launched(PLANS[name], tmp_path, node)
    for variable, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) is (name == "fsdp2_offload")
    assert "SHARDED" in str(plugin.state_dict_type) and plugin.cpu_ram_efficient_loading
    if name == "fsdp2_within_node":
        mesh = ParallelismConfig()
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)


DEEPSPEED_PLANS = {
    **{name: plan for name, plan in PLANS.items() if plan.engine is Engine.DEEPSPEED},
    "zero0": plan(Engine.DEEPSPEED, 0),
    "zero2": plan(Engine.DEEPSPEED, 2, precision=Precision.FP32),
    "zero2_small_buckets": plan(Engine.DEEPSPEED, 2, buckets=replace(BUCKETS, overlap_exchange=False)),
    "zero3_optimizer_offload": plan(Engine.DEEPSPEED, 3, offload_optimizer=True),
    "zero3_offload": plan(Engine.DEEPSPEED, 3, offload_optimizer=True, offload_parameters=True),
}
"""Those with goldens, and what else a search weighs."""


def devices_of(plan: Plan) -> tuple[str, str]:
    """Where DeepSpeed is to keep optimizer states and parameters."""
    states = plan.offload_device.value if plan.offload_optimizer else "none"
    return states, "cpu" if plan.offload_parameters else "none"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes this process rank 0 of so many, for what DeepSpeed asks while it reads: torch's own stand-in."""
    import deepspeed
    from deepspeed.comm import comm
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # what it compiles for a minute at its start, and nothing here uses (engines.py)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {})

    def join(size: int) -> None:
        distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    yield join
    comm.cdb = None
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", DEEPSPEED_PLANS)
def test_deepspeeds_own_reader_finds_what_was_planned(
    name: str, world: Callable[[int], None], tmp_path: Path
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan, file = DEEPSPEED_PLANS[name], tmp_path / "deepspeed.json"
    file.write_text(deepspeed_text(JOB, plan, SWAP_FOLDER), encoding="utf-8")
    assert "auto" not in file.read_text()
    world(plan.world_size)
    read = DeepSpeedConfig(str(file))
    assert read.world_size == plan.world_size
    assert read.train_batch_size == plan.global_batch_size
    assert read.train_micro_batch_size_per_gpu == plan.micro_batch_size
    assert read.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert read.gradient_clipping == JOB.training.max_grad_norm
    assert read.zero_optimization_stage == plan.zero_stage and read.zero_allow_untested_optimizer
    assert read.bfloat16_config.enabled is (plan.precision is Precision.BF16)
    assert read.float16_config.enabled is (plan.precision is Precision.FP16_MIXED)
    zero = read.zero_config
    found = tuple(getattr(part, "device", "none") for part in (zero.offload_optimizer, zero.offload_param))
    assert found == devices_of(plan)
    if plan.zero_stage > 0:
        assert zero.reduce_bucket_size == BUCKETS.reduce_bucket_elements
        assert plan.buckets is not None and zero.overlap_comm is plan.buckets.overlap_exchange
    if plan.zero_stage in (1, 2):
        assert zero.allgather_bucket_size == BUCKETS.allgather_bucket_elements
    if plan.zero_stage == 3:
        assert zero.prefetch_bucket_size == BUCKETS.prefetch_bucket_elements
        assert zero.param_persistence_threshold == BUCKETS.persistence_threshold_elements
        assert zero.max_live_parameters == BUCKETS.max_live_elements
        assert zero.max_reuse_distance == BUCKETS.max_reuse_distance_elements
        assert zero.sub_group_size == BUCKETS.sub_group_elements
        assert zero.gather_16bit_weights_on_model_save
    if plan.swaps:
        assert str(zero.offload_optimizer.nvme_path) == SWAP_FOLDER and zero.offload_optimizer.pin_memory
        assert read.aio_config["queue_depth"] == ASYNCHRONOUS_IO["queue_depth"]


def test_deepspeeds_own_reader_checks(world: Callable[[int], None]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(JOB, PLANS["zero3"])
    world(8)
    with pytest.raises(AssertionError, match="train_batch_size is not equal"):
        DeepSpeedConfig(config)  # the plan has 16 processes
    config["train_batch_size"] //= 2
    config["zero_optimization"]["reduce_buckett_size"] = 1
    with pytest.raises(ValueError, match="reduce_buckett_size"):
        DeepSpeedConfig(config)


@pytest.mark.parametrize("name", DEEPSPEED_PLANS)
def test_transformers_and_accelerate_read_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    plan, folder = DEEPSPEED_PLANS[name], tmp_path / "a 'run'"
    arguments = launched(plan, folder, Node(1, "10.0.0.1", 29511) if plan.num_nodes > 1 else None)
    read = HfDeepSpeedConfig(str(RunPaths(folder).deepspeed_config))
    unset_hf_deepspeed_config()
    assert read.get_value("train_batch_size") == plan.global_batch_size
    assert read.get_value("train_micro_batch_size_per_gpu") == plan.micro_batch_size
    assert read.get_value("gradient_accumulation_steps") == plan.gradient_accumulation_steps
    assert (read.is_zero2(), read.is_zero3()) == (plan.zero_stage == 2, plan.zero_stage == 3)
    assert read.is_offload() is (plan.uses_offload and plan.zero_stage > 1)
    if plan.zero_stage > 0:
        bucket = read.get_value("zero_optimization.reduce_bucket_size")
        assert bucket == BUCKETS.reduce_bucket_elements
    for variable, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == plan.micro_batch_size
    assert plugin.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert plugin.gradient_clipping == JOB.training.max_grad_norm
    assert plugin.zero_stage == plan.zero_stage and plugin.zero3_init_flag is (plan.zero_stage == 3)
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == devices_of(plan)
    assert plugin.offload_optimizer_nvme_path == (SWAP_FOLDER if plan.swaps else "none")
    assert plugin.zero3_save_16bit_model is (plan.zero_stage == 3)


def test_the_batch_is_the_jobs(tmp_path: Path) -> None:
    config = deepspeed_config(JOB, PLANS["zero3"])
    assert config["train_batch_size"] == 64 == JOB.training.global_batch_size
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 16 == 64


def test_nothing_is_pinned_or_compiled_on_a_cpu() -> None:
    offload = replace(PLANS["zero2_offload"], num_devices=2)
    config = deepspeed_config(replace(JOB, hardware=CPU), offload)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "0,1,2,3"), ("4,5,6,7,1", "4,5,6,7"), ("GPU-a, GPU-b,GPU-c,GPU-d", "GPU-a,GPU-b,GPU-c,GPU-d")],
)
def test_as_many_devices_are_in_sight_as_are_planned(visible: str | None, expected: str) -> None:
    inherited = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    four = plan(Engine.DDP, num_devices=4, num_nodes=1)
    assert render.worker_environment(CUDA, inherited, four)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize("engine", [Engine.DDP, Engine.DEEPSPEED, Engine.FSDP2])
def test_only_deepspeed_is_not_told_to_use_the_cpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's shell says."""
    monkeypatch.setattr(render, "usable_cores", lambda: 7)
    inherited = {"ACCELERATE_USE_CPU": str(engine is Engine.DEEPSPEED).lower()}
    two = plan(engine, 3 if engine is Engine.FSDP2 else 0, num_devices=2, num_nodes=1)
    environment = render.worker_environment(CPU, inherited, two)
    assert environment["ACCELERATE_USE_CPU"] == str(engine is not Engine.DEEPSPEED).lower()
    assert (
        render.worker_environment(CUDA, {"ACCELERATE_USE_CPU": "true"}, two)["ACCELERATE_USE_CPU"] == "false"
    )
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] == "[rank ${rank}] "


def test_quantised_weights_are_read_by_every_rank() -> None:
    quantised = replace(PLANS["fsdp2"], method=Method.QLORA)
    config = yaml.safe_load(render.accelerate_config(MACHINE, quantised, RUN))
    assert config["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False


def test_small_buckets_do_not_overlap() -> None:
    waiting = replace(PLANS["zero1"], buckets=replace(BUCKETS, overlap_exchange=False))
    assert deepspeed_config(JOB, waiting)["zero_optimization"]["overlap_comm"] is False


def test_a_plan_for_several_devices_has_buckets() -> None:
    with pytest.raises(ValueError, match="without bucket sizes"):
        deepspeed_config(JOB, replace(PLANS["zero3"], buckets=None))


def test_one_device_of_another_kind_has_no_engine() -> None:
    rocm = HardwareSpec(name="mi300x_192g", kind=DeviceKind.ROCM)
    environment = render.worker_environment(rocm, {}, ONE)
    assert "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE" not in environment
