"""Jobs of two ranks that share one card, most informative first, and how each becomes a job and a plan of the launcher.

Each rank is a node of its own, of one device (see `rank_run`). On a CPU the same jobs run small, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster, LaunchSpec
from launcher.engine_limits import engine_limits
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Checkpointing, JobSpec, Method, ModelSpec, Optimizer, Precision, StoredDtype
from launcher.plan import Plan
from launcher.planner.buckets import default_buckets
from scripts.accuracy_ranks import ARCHITECTURE, ARRANGEMENTS, RankJob, job_of, plan_of

NUM_RANKS = 2
ADDRESS = "127.0.0.1"
"""Where the ranks meet."""
CARD_ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""160 million parameters: small beside what moves them, large beside what a rank keeps for itself."""


@dataclass(frozen=True)
class Bench:
    """What all jobs on one kind of device have in common."""

    architecture: Mapping[str, Any]
    stored_dtype: StoredDtype
    micro_batch_size: int
    length: int
    """Tokens per sequence."""
    precision: Precision
    optimizer: Optimizer


ON_CARD = Bench(CARD_ARCHITECTURE, StoredDtype.BF16, 4, 1024, Precision.BF16, Optimizer.ADAMW_TORCH_FUSED)
ON_CPU = Bench(ARCHITECTURE, StoredDtype.FP32, 4, 192, Precision.FP32, Optimizer.ADAMW_TORCH)


@dataclass(frozen=True)
class _Choice:
    """What one job has of its own."""

    arrangement: str
    """One of `ARRANGEMENTS`."""
    method: Method
    checkpointing: Checkpointing
    accumulation: int = 1
    is_mixed: bool = False
    """Whether weights are in fp32, and bf16 in the passes."""
    offloads: bool = False
    """Whether the optimizer is in host memory."""

    @property
    def name(self) -> str:
        """The job in words; the precision where it is not the bench's."""
        offload = "-offload" if self.offloads else ""
        mixed = "-bf16_mixed" if self.is_mixed else ""
        return f"{self.arrangement}{offload}-{self.method.value}-{self.checkpointing.value}-x{self.accumulation}{mixed}"


CHOICES = (
    _Choice("ddp", Method.LORA, Checkpointing.FULL),
    _Choice("zero3", Method.FULL, Checkpointing.NONE),
    _Choice("fsdp2", Method.FULL, Checkpointing.NONE),
    _Choice("zero2", Method.FULL, Checkpointing.FULL, accumulation=2),
    _Choice("ddp", Method.FULL, Checkpointing.NONE, accumulation=2),
    _Choice("zero3", Method.LORA, Checkpointing.FULL),
    _Choice("zero1", Method.FULL, Checkpointing.NONE),
    _Choice("fsdp2", Method.LORA, Checkpointing.FULL),
    _Choice("zero2", Method.LORA, Checkpointing.NONE),
    _Choice("zero3", Method.QLORA, Checkpointing.FULL),
    _Choice("ddp", Method.QLORA, Checkpointing.FULL),
    _Choice("fsdp2", Method.FULL, Checkpointing.FULL),
    _Choice("zero3", Method.FULL, Checkpointing.NONE, is_mixed=True),
    _Choice("fsdp2", Method.FULL, Checkpointing.NONE, is_mixed=True),
    # last: DeepSpeed compiles its CPU Adam first
    _Choice("zero2", Method.FULL, Checkpointing.NONE, offloads=True),
)


def bench_of(hardware: HardwareSpec) -> Bench:
    """What jobs on a device have in common."""
    return ON_CPU if hardware.kind is DeviceKind.CPU else ON_CARD


def rank_jobs(hardware: HardwareSpec) -> tuple[RankJob, ...]:
    """The jobs for a device, without those that an engine can't carry out; a CPU's have one precision."""
    bench = bench_of(hardware)
    entries = [
        RankJob(choice.name, _plan_of(choice, bench))
        for choice in CHOICES
        if not (choice.is_mixed and bench is ON_CPU)
    ]
    return tuple(
        entry for entry in entries if not engine_limits(spec_of(entry.plan, hardware, Path()), entry.plan)
    )


def _plan_of(choice: _Choice, bench: Bench) -> Plan:
    shape = bench.micro_batch_size, bench.length, choice.accumulation
    plan = replace(
        plan_of(*ARRANGEMENTS[choice.arrangement], choice.method, choice.checkpointing, *shape),
        num_devices=1,
        num_nodes=NUM_RANKS,
        offload_optimizer=choice.offloads,
        optimizer=bench.optimizer,
        precision=Precision.BF16_MIXED if choice.is_mixed else bench.precision,
    )
    return replace(plan, buckets=default_buckets(bench.architecture, plan))


def spec_of(plan: Plan, hardware: HardwareSpec, model: Path, port: int = 0) -> JobSpec:
    """The job of a plan.

    Args:
        plan: The plan.
        hardware: The device.
        model: Folder of weights, tokenizer and text; a prediction does not read it.
        port: Where the ranks meet.
    """
    bench = bench_of(hardware)
    return replace(
        job_of(plan, model),
        model=ModelSpec(
            path=str(model), architecture=dict(bench.architecture), stored_dtype=bench.stored_dtype
        ),
        hardware=replace(hardware, num_devices=plan.num_devices, num_nodes=plan.num_nodes),
        launch=LaunchSpec(cluster=Cluster.MANUAL, main_address=ADDRESS, main_port=port, rehearse=False),
    )
