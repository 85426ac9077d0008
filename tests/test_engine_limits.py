"""What an engine can't do is refused with its reason; what was seen to run is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    AdapterDtype,
    Checkpointing,
    Engine,
    Method,
    MethodSpec,
    OffloadDevice,
    Optimizer,
    Quantization,
)
from launcher.optimisation import LOW_RANK_OPTIMIZERS, Precision
from launcher.planner.arrangements import ON_HOST
from launcher.run.launch import prepare_run
from launcher.run_paths import RunPaths
from tests.tiny_job import tiny_order

CUDA = HardwareSpec(name="l4_24g", kind=DeviceKind.CUDA, num_devices=2)


@pytest.mark.parametrize(
    ("engine", "stage", "changes", "words"),
    [
        (Engine.DDP, 0, {"offload_optimizer": True}, "ddp has no offload"),
        (Engine.DEEPSPEED, 2, {"offload_parameters": True}, "stage 3 only, not 2"),
        (Engine.DEEPSPEED, 0, {"offload_optimizer": True}, "from ZeRO stage 2 on, not at stage 0"),
        (Engine.DEEPSPEED, 1, {"offload_optimizer": True}, "from ZeRO stage 2 on, not at stage 1"),
        (Engine.FSDP2, 3, {"offload_parameters": True}, "together, or none"),
        (Engine.FSDP2, 3, {"offload_parameters": True, "offload_optimizer": True}, "needs an accelerator"),
        (Engine.DEEPSPEED, 3, {"offload_optimizer": True, "offload_device": OffloadDevice.NVME}, "nvme_path"),
        (
            Engine.DEEPSPEED,
            3,
            {"method": Method.LORA, "rank": 8, "activation_checkpointing": Checkpointing.SELECTIVE},
            "can't be selective",
        ),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(
    engine: Engine, stage: int, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    order = tiny_order(tmp_path, engine, stage)
    order = replace(order, plan=replace(order.plan, **changes))
    with pytest.raises(ConfigError, match=words):
        prepare_run(RunPaths(tmp_path / "run"), order, {})
    assert not (tmp_path / "run").exists()


def test_int8_weights_are_not_sharded(tmp_path: Path) -> None:
    order = tiny_order(tmp_path, Engine.FSDP2, 3, Method.QLORA)
    assert engine_limits(order.job, order.plan) == ()
    int8 = replace(order.job, method=MethodSpec(name=Method.QLORA, quantization=Quantization.INT8))
    (reason,) = engine_limits(int8, order.plan)
    assert "int8" in reason
    assert engine_limits(int8, tiny_order(tmp_path, Engine.DEEPSPEED, 2, Method.QLORA).plan) == ()


def test_optimizers_that_an_engine_has_no_update_for(tmp_path: Path) -> None:
    """tests/test_engines.py runs those of bitsandbytes under ZeRO."""
    refused = {
        engine: {
            optimizer
            for optimizer in Optimizer
            if engine_limits(order.job, replace(order.plan, optimizer=optimizer))
        }
        for engine, order in (
            (engine, tiny_order(tmp_path, engine, stage))
            for engine, stage in ((Engine.DDP, 0), (Engine.DEEPSPEED, 1), (Engine.FSDP2, 3))
        )
    }
    bitsandbytes = {name for name in Optimizer if name.value.endswith(("_8bit", "_32bit"))}
    assert len(bitsandbytes) == 7
    assert refused[Engine.DDP] == set()
    assert refused[Engine.DEEPSPEED] == set(LOW_RANK_OPTIMIZERS)
    assert refused[Engine.FSDP2] == {*bitsandbytes, Optimizer.ADAFACTOR}


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_a_search_offers_no_engine_refuses(nodes: int, tmp_path: Path) -> None:
    """And the other way round: every stage that may offload is offered."""
    order = tiny_order(tmp_path, Engine.DEEPSPEED, 3, num_nodes=nodes)
    job, offered = replace(order.job, hardware=replace(CUDA, num_nodes=nodes)), set()
    for stage in range(4):
        for parameters in (False, True):
            offloading = replace(
                order.plan, zero_stage=stage, offload_optimizer=True, offload_parameters=parameters
            )
            if not engine_limits(job, offloading):
                offered.add((stage, parameters))
    assert offered == {(item.zero_stage, item.offload_parameters) for item in ON_HOST}


def test_adapters_are_merged_without_an_engine_only(tmp_path: Path) -> None:
    merging = MethodSpec(name=Method.LORA, merge=True)
    for engine, stage in ((Engine.DDP, 0), (Engine.DEEPSPEED, 1), (Engine.FSDP2, 3)):
        order = tiny_order(tmp_path, engine, stage, Method.LORA)
        (reason,) = engine_limits(replace(order.job, method=merging), order.plan)
        assert "merged" in reason
    alone = tiny_order(tmp_path, Engine.NONE, 0, Method.LORA, num_devices=1)
    assert engine_limits(replace(alone.job, method=merging), alone.plan) == ()


def test_autocast_over_bf16_is_for_the_adapters_of_fsdp_alone(tmp_path: Path) -> None:
    """accelerate widens what is trained to fp32, which adapters are; ranks in docs/ranks.md ran so."""
    for method, is_possible in ((Method.LORA, True), (Method.FULL, False)):
        order = tiny_order(tmp_path, Engine.FSDP2, 3, method)
        plan = replace(order.plan, precision=Precision.BF16_AUTOCAST)
        assert (engine_limits(order.job, plan) == ()) is is_possible
        narrow = replace(order.job, method=replace(order.job.method, adapter_dtype=AdapterDtype.BASE))
        assert "bf16_mixed" in engine_limits(narrow, plan)[0]


def test_fsdp_offloads_where_there_is_an_accelerator(tmp_path: Path) -> None:
    order = tiny_order(tmp_path, Engine.FSDP2, 3)
    plan = replace(order.plan, offload_parameters=True, offload_optimizer=True)
    assert engine_limits(replace(order.job, hardware=CUDA), plan) == ()
