"""The story on one screen: what job and hardware can't both have, and on what the headroom rests."""

from __future__ import annotations

import pytest

from launcher.config import load_job
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind
from launcher.job import Method
from launcher.planner.interval import CONVENTION, RUNS_FOR_HEADROOM, Residual
from launcher.planning import resolve, with_headroom


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hardware=t4_16g"], "no bf16"),
        (["hardware=cpu", "training.precision=fp16_mixed"], "needs a GPU"),
        (
            ["hardware=t4_16g", "training.precision=fp32", "planner.pin.attention=flash_attention_2"],
            "t4_16g has no FlashAttention-2",
        ),
        (
            ["hardware=cpu", "training.precision=fp32", "planner.pin.activation_checkpointing=offload"],
            "no other memory",
        ),
        (
            ["hardware=a100_40g", "planner.pin.offload_optimizer=true", "training.optimizer=adamw_8bit"],
            "CPU Adam in the place of adamw_8bit",
        ),
        (
            ["hardware=a100_40g", "hardware.num_devices=2", "planner.pin.offload_device=nvme"],
            "is for optimizer states",
        ),
        (
            [
                "hardware=a100_40g",
                "hardware.num_devices=2",
                "planner.pin.engine=fsdp2",
                "planner.pin.offload_parameters=true",
            ],
            "was never compared with one",
        ),
        (
            ["hardware=a100_40g", "planner.pin.micro_batch_size=3"],
            "micro batch 3 x accumulation any can't make",
        ),
        (["hardware=a100_40g", "hardware.num_devices=3"], "can't be split over 3 devices"),
        (["hardware=a100_40g", "planner.pin.zero_stage=2"], "nothing that 1 device can do"),
        (
            [
                "hardware=a100_40g",
                "hardware.num_devices=2",
                "planner.pin.engine=deepspeed",
                "planner.pin.zero_stage=3",
                "planner.pin.activation_checkpointing=selective",
                "data.max_length=auto",
                "data.path=x",
            ],
            "need reentrant checkpointing",
        ),
        (["hardware=auto", "launch.cluster=slurm"], "hardware=auto is this machine"),
        (
            ["hardware=t4_16g", "action=plan", "report=html", "run_dir=nowhere"],
            "nowhere` is not a run directory",
        ),
        (
            ["hardware=cpu", "launch.partition=gpu"],
            "launch.partition=gpu says nothing to launch.cluster=local",
        ),
    ],
)
def test_contradictions_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(load_job(["recipe=llama_lora", *arguments]), ())


def test_contradictions_are_told_all_at_once() -> None:
    job = load_job(
        [
            "recipe=llama_lora",
            "hardware=cpu",
            "planner.pin.micro_batch_size=3",
            "planner.pin.attention=flash_attention_2",
        ]
    )
    with pytest.raises(
        ConfigError, match=r"FlashAttention-2.*can't make training.*\n\nhint: planner.*the product must be"
    ) as caught:
        resolve(job, ())
    assert caught.value.exit_code == 2


def test_a_job_without_contradictions_gets_the_devices_facts() -> None:
    job = resolve(load_job(["recipe=llama_lora", "hardware=a100_40g", "method=qlora"]), ())
    assert job.hardware.kind is DeviceKind.CUDA and job.hardware.memory_bytes > 39 * 2**30
    assert job.method.name is Method.QLORA


def test_headroom_says_on_what_it_rests() -> None:
    job = load_job(["recipe=llama_lora", "hardware=a100_40g"])
    settled, (note,) = with_headroom(job, ())
    assert settled.planner.headroom == CONVENTION and "convention" in note
    runs = [Residual(DeviceKind.CUDA, Method.LORA, "llama", 100, 103)] * RUNS_FOR_HEADROOM
    settled, (note,) = with_headroom(job, runs)
    assert settled.planner.headroom == pytest.approx(1 - 100 / 103) and "9 measured runs" in note
    elsewhere = [Residual(DeviceKind.CPU, Method.LORA, "llama", 100, 150)] * RUNS_FOR_HEADROOM
    assert with_headroom(job, elsewhere)[0].planner.headroom == CONVENTION
    pinned = load_job(["recipe=llama_lora", "hardware=a100_40g", "planner.headroom=0.2"])
    assert with_headroom(pinned, runs) == (pinned, ())
