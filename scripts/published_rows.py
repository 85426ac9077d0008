"""Rows of docs/accuracy/published.csv: which of them a job can express, and as which job.

The file holds facts that others published, each with its source. Confidence A: configuration and quantity are
fully known; B: with minor unknowns. `quantity` and `as_published` keep the source's words;
`measured_bytes` has the same in bytes, exact where the source gives bytes, else by the unit in `unit`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from launcher.hardware import HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.plan import Plan
from scripts.published_differences import Difference

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "accuracy" / "published.csv"
MODELS = ROOT / "docs" / "accuracy" / "published-models.yaml"
HARDWARE = {"A100-80GB": "a100_80g", "NVIDIA A100-SXM4-80GB": "a100_80g", "L40S-48GB": "l40s_48g"}
"""Device names of the sources and the files of conf/hardware that describe them."""
METHODS = {"full": Method.FULL, "lora": Method.LORA, "qlora": Method.QLORA, "dora": Method.LORA}
OWN_MODELLING_CODE = ("Qwen/Qwen-", "THUDM/", "baichuan-inc/")
"""Makers of 2023 models whose code came with the weights; transformers has no class for them."""


class Quantity(StrEnum):
    """What a row measured."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"


class Kernels(StrEnum):
    """Whose code computed the loss and the layers of a row."""

    LIBRARY = "library"
    FOAK = "foak"
    LIGER = "liger"


@dataclass(frozen=True)
class Row:
    """One published measurement; text fields in the source's words, numbers 0 where the source is silent."""

    id: str
    """Name of the row."""
    source: str
    """Where it was published."""
    confidence: str
    """A or B."""
    group: str
    """`finetune`, `pretrain` or `op-micro`."""
    gpu: str
    """Device."""
    num_gpus: int
    """Devices."""
    distribution: str
    """How they share the work."""
    model: str
    """Hub id."""
    method: str
    """Full, LoRA, QLoRA, another adapter."""
    lora_rank: int
    """LoRA rank."""
    lora_targets: str
    """Adapted modules, comma-separated."""
    lora_dropout: float
    """Dropout before the adapters."""
    precision: str
    """Dtypes of weights and computation."""
    micro_batch_size: int
    """Sequences per forward pass."""
    gradient_accumulation_steps: int
    """Forward passes per optimizer step."""
    length: int
    """Tokens per sequence, exact or a cap."""
    length_kind: str
    """Which of the two."""
    checkpointing: str
    """Activation checkpointing."""
    attention: str
    """Attention implementation."""
    kernels: str
    """Loss and layer kernels."""
    framework: str
    """Configuration name of the benchmark, where it has one."""
    quantity: str
    """Counter that was read."""
    measured_bytes: int
    """What it said."""
    library_versions: str
    """Versions it ran with."""

    @property
    def counter(self) -> Quantity | None:
        """The counter in our words; None for one that is not known."""
        for word in Quantity:
            if f"max_memory_{word.value}" in self.quantity:
                return word
        return None

    @property
    def kernel_family(self) -> Kernels:
        """Whose kernels ran."""
        if self.kernels.startswith("liger"):
            return Kernels.LIGER
        return Kernels.FOAK if self.kernels.startswith("foak") else Kernels.LIBRARY

    @property
    def shape(self) -> str:
        """Micro batch x length, and the accumulation when there is one."""
        shape = f"{self.micro_batch_size}x{self.length}"
        steps = self.gradient_accumulation_steps
        return f"{shape}x{steps}" if steps > 1 else shape


@dataclass(frozen=True)
class Expression:
    """A row as a job of the launcher."""

    job: JobSpec
    """The job."""
    plan: Plan
    """The plan, whole."""
    autocast_over_bf16: bool
    """Whether bf16 weights ran under bf16 autocast, which no `Precision` names."""
    differences: frozenset[Difference]
    """What the row's code did otherwise than today's libraries, as far as it is known."""


def read_rows(path: Path = ROWS) -> list[Row]:
    """Reads the file, in its order."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [_row(record) for record in csv.DictReader(stream)]


def _row(record: dict[str, str]) -> Row:
    words = {name: record[name] for name, field in Row.__annotations__.items() if field == "str"}
    counts = {name: int(record[name] or 0) for name, field in Row.__annotations__.items() if field == "int"}
    return Row(lora_dropout=float(record["lora_dropout"] or 0), **words, **counts)  # type: ignore[arg-type]


def reason_not_expressed(row: Row) -> str:
    """Why no job of the launcher is this row; empty when one is."""
    reasons = (
        (row.group == "op-micro", "one operator alone, no training step"),
        (row.num_gpus > 1, "more than one device: what sharding changes is not predicted yet"),
        (row.method == "gptq-lora", "GPTQ weights: not a method of the launcher"),
        (row.method not in METHODS, "an adapter that is not a method of the launcher"),
        (row.model.startswith(OWN_MODELLING_CODE), "modelling code that came with the weights"),
        (not row.length, "batch and length were not published"),
        (row.counter is None, "another trainer, whose source leaves open what the counter was"),
        (row.model not in architectures(), "the model's dimensions were not confirmed"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def express(row: Row) -> Expression:
    """The job and plan of a row that can be expressed; see `reason_not_expressed`."""
    autocast = "autocast" in row.precision and "no autocast" not in row.precision
    method, own_kernels = METHODS[row.method], row.kernel_family
    job = JobSpec(
        model=ModelSpec(id=row.model, architecture=architectures()[row.model]),
        method=_method(row),
        data=DataSpec(packing=not row.length_kind.startswith("cap;")),
        training=TrainingSpec(report_to=()),
        hardware=_hardware(row.gpu),
    )
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else row.lora_rank,
        max_length=row.length,
        micro_batch_size=row.micro_batch_size,
        gradient_accumulation_steps=row.gradient_accumulation_steps,
        activation_checkpointing=Checkpointing.NONE if row.checkpointing == "none" else Checkpointing.FULL,
        attention=Attention.SDPA if "SDPA" in row.attention else Attention.FLASH_ATTENTION_2,
        loss=Loss.CHUNKED if own_kernels is Kernels.LIGER else Loss.PLAIN,
        optimizer=Optimizer.ADAMW_TORCH,
        precision=Precision.BF16_MIXED if autocast else Precision.BF16,
    )
    return Expression(job, plan, autocast, _differences(row))


def _method(row: Row) -> MethodSpec:
    plain = MethodSpec(
        dropout=row.lora_dropout,
        use_dora=row.method == "dora",
        kbit_preparation=row.framework == "baseline-peft-bnb",
    )
    if not row.lora_targets or row.lora_targets == "all-linear":
        return plain
    if row.lora_targets.startswith("DEFAULT (attention qkv"):
        return replace(plain, target_modules=("q_proj", "k_proj", "v_proj"))
    return replace(plain, target_modules=tuple(row.lora_targets.split(",")))


def _differences(row: Row) -> frozenset[Difference]:
    """What is known of the code behind the rows of the fms-acceleration benchmark; nothing of the others'."""
    if not row.id.startswith("FMS"):
        return frozenset()
    found = {Difference.REENTRANT_CHECKPOINTING}
    kernels = row.kernel_family
    if kernels is Kernels.LIBRARY:
        found.add(Difference.SHIFTED_LOGITS)
    else:
        found |= {Difference.FUSED_NORM, Difference.FUSED_ROTARY}
        if kernels is Kernels.FOAK:
            found.add(Difference.IN_PLACE_CROSS_ENTROPY)
        if row.method == "qlora":
            found.add(Difference.FUSED_LORA)
    if row.model.startswith("mistralai/"):
        found.add(Difference.REPEATED_KEYS)
    if row.method == "qlora":
        found.add(Difference.FP32_ADAPTERS)
    if row.framework == "baseline-peft-bnb":
        found.add(Difference.BF16_EMBEDDINGS)
    return frozenset(found)


def architectures() -> dict[str, dict[str, Any]]:
    """Architecture of every model that is known, by hub id."""
    facts = yaml.safe_load(MODELS.read_text(encoding="utf-8"))
    models = {name: entry["architecture"] for name, entry in facts["others"].items()}
    for name, file in facts["catalogue"].items():
        entry = (ROOT / "conf" / "model" / f"{file}.yaml").read_text(encoding="utf-8")
        models[name] = yaml.safe_load(entry)["architecture"]
    return models


def _hardware(gpu: str) -> HardwareSpec:
    """The catalogue's facts of a device."""
    facts = yaml.safe_load((ROOT / "conf" / "hardware" / f"{HARDWARE[gpu]}.yaml").read_text(encoding="utf-8"))
    hardware: HardwareSpec = TypeAdapter(HardwareSpec).validate_python(facts)
    return hardware
