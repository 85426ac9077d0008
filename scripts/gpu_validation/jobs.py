"""The jobs of the validation, most informative first, and how each becomes a job and a plan of the launcher.

Imports nothing heavy: the parent process reads this list too. Sizes are for a card of 80 GB; a job whose predicted
peak does not fit the card at hand is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from launcher.hardware import HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Optimizer,
    Precision,
    StoredDtype,
    TrainingSpec,
)
from launcher.plan import Plan

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 3
"""Optimizer steps of each job: the optimizer's state is born in the first, the third shows nothing new."""
RANK = 16


@dataclass(frozen=True)
class ValidationJob:
    """One training job on random weights."""

    model: str
    """Name of a file in conf/model."""
    method: str
    checkpointing: str
    micro_batch_size: int
    length: int
    """Tokens per sequence."""
    accumulation: int = 1
    precision: str = "bf16"
    loss: str = "chunked"
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    packing: bool = True
    evaluation: bool = False
    save: bool = False
    num_layers: int | None = None
    """Decoder layers, where all of them take too long to build or do not fit; None: all."""
    allocator: str = "expandable"
    """`expandable` segments, as the launcher sets them, or `classic`."""
    cudnn_attention: bool = True
    """Whether torch may take cuDNN's attention kernels, which 2.11 and later prefer on Hopper and Blackwell."""
    stored: bool = False
    """Whether the weights are loaded from a file, the launcher's way, and not made on the device."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further keys of the method."""

    @property
    def name(self) -> str:
        """The job in words; what is usual goes without saying."""
        usual = (
            (self.loss, "chunked"),
            (self.optimizer, "adamw_torch_fused"),
            (self.attention, "sdpa"),
            (self.allocator, "expandable"),
        )
        unusual = [word for word, expected in usual if word != expected]
        unusual += [f"layers={self.num_layers}"] if self.num_layers is not None else []
        unusual += [] if self.cudnn_attention else ["no cudnn"]
        unusual += [f"{key}={value}" for key, value in self.options]
        flags = {
            "padded": not self.packing,
            "evaluation": self.evaluation,
            "save": self.save,
            "stored": self.stored,
        }
        unusual += [flag for flag, on in flags.items() if on]
        shape = f"{self.micro_batch_size}x{self.length}"
        shape += f"x{self.accumulation}" if self.accumulation > 1 else ""
        words = [
            self.model,
            self.method,
            f"checkpointing={self.checkpointing}",
            self.precision,
            *unusual,
            shape,
        ]
        return " ".join(words)


JOBS = (
    # the plainest jobs of each kind: what they get wrong, all get wrong
    ValidationJob("llama3_1_8b", "lora", "full", 2, 2048),
    ValidationJob("llama3_1_8b", "lora", "full", 2, 2048, cudnn_attention=False),
    ValidationJob("llama3_1_8b", "qlora", "full", 2, 2048),
    ValidationJob("llama3_2_1b", "full", "none", 2, 2048),
    ValidationJob("llama3_1_8b", "lora", "none", 1, 2048),
    ValidationJob("llama3_1_8b", "lora", "full", 2, 2048, allocator="classic"),
    ValidationJob("qwen2_5_7b", "lora", "full", 2, 2048, loss="plain"),
    ValidationJob("gemma3_1b", "full", "none", 4, 1024),
    ValidationJob("llama3_1_8b", "lora", "full", 4, 1024, packing=False, evaluation=True),
    ValidationJob("llama3_1_8b", "full", "full", 1, 2048, optimizer="adamw_8bit"),
    ValidationJob("qwen3_30b_a3b", "lora", "full", 1, 1024, num_layers=36),
    # every other knob once
    ValidationJob("llama3_1_8b", "lora", "none", 1, 2048, cudnn_attention=False),
    ValidationJob("llama3_1_8b", "qlora", "none", 2, 1024, packing=False, cudnn_attention=False),
    ValidationJob("llama3_1_8b", "lora", "full", 2, 2048, loss="liger"),
    ValidationJob("mistral_7b", "lora", "selective", 2, 2048),
    ValidationJob("llama3_1_8b", "lora", "none", 1, 2048, attention="eager"),
    ValidationJob("gpt_oss_20b", "lora", "full", 1, 1024, attention="eager"),
    ValidationJob("llama3_2_1b", "full", "full", 4, 2048, optimizer="adamw_torch"),
    ValidationJob("llama3_2_3b", "full", "full", 2, 2048, precision="bf16_mixed"),
    ValidationJob("llama3_2_1b", "full", "none", 2, 1024, precision="bf16_mixed"),
    ValidationJob("qwen2_5_32b", "qlora", "full", 1, 2048, num_layers=40),
    ValidationJob("llama3_2_1b", "lora", "full", 1, 32768),
    ValidationJob("llama3_2_1b", "full", "none", 4, 512, accumulation=4),
    ValidationJob("llama3_1_8b", "lora", "offload", 1, 8192),
    ValidationJob("llama3_2_1b", "full", "full", 4, 2048, optimizer="adafactor"),
    ValidationJob("llama3_2_1b", "lora", "full", 2, 1024, stored=True, save=True),
    ValidationJob("llama3_2_1b", "qlora", "full", 2, 1024, stored=True),
    ValidationJob("llama3_1_8b", "qlora", "none", 1, 2048, optimizer="paged_adamw_8bit"),
    ValidationJob("llama3_1_8b", "qlora", "full", 1, 2048, options=(("quantization", "int8"),)),
    ValidationJob("llama3_1_8b", "qlora", "full", 1, 2048, options=(("kbit_preparation", True),)),
    ValidationJob("llama3_1_8b", "lora", "full", 1, 2048, options=(("use_dora", True),)),
    ValidationJob("llama3_2_3b", "lora", "none", 2, 1024, options=(("dropout", 0.05),)),
    ValidationJob("llama3_2_1b", "full", "none", 1, 2048, precision="fp32"),
    ValidationJob("llama3_2_1b", "lora", "full", 2, 2048, precision="fp16_mixed"),
    # other architectures and sizes
    ValidationJob("qwen3_8b", "qlora", "none", 1, 2048, packing=False),
    ValidationJob("qwen2_5_14b", "lora", "full", 1, 4096),
    ValidationJob("gemma2_9b", "lora", "full", 1, 2048, attention="eager"),
    ValidationJob("phi4", "qlora", "full", 2, 4096),
    ValidationJob("qwen3_30b_a3b", "full", "none", 2, 512, num_layers=4),
    ValidationJob("mixtral_8x7b", "lora", "full", 1, 2048, num_layers=16),
    ValidationJob("gemma3_4b", "lora", "full", 2, 2048),
    ValidationJob("olmo2_7b", "lora", "full", 2, 4096),
    ValidationJob("gpt2_xl", "full", "none", 4, 1024, loss="plain"),
    # what is left
    ValidationJob("qwen3_4b", "full", "full", 2, 2048, accumulation=2),
    ValidationJob("llama3_1_8b", "lora", "full", 1, 16384),
    ValidationJob("llama3_2_1b", "full", "none", 2, 2048, allocator="classic"),
    ValidationJob("llama3_1_8b", "qlora", "full", 1, 8192, allocator="classic"),
    ValidationJob(
        "llama3_1_8b", "lora", "full", 1, 1024, options=(("modules_to_save", ("embed_tokens", "lm_head")),)
    ),
    ValidationJob("llama3_2_1b", "full", "full", 4, 1024, optimizer="sgd", evaluation=True, save=True),
    ValidationJob("llama3_2_1b", "lora", "full", 2, 2048, attention="flash_attention_2"),
    ValidationJob("qwen2_5_0_5b", "full", "selective", 8, 1024, packing=False, loss="plain"),
    ValidationJob("llama3_2_1b", "lora", "full", 4, 2048, precision="fp32", evaluation=True),
    ValidationJob("llama3_2_1b", "full", "full", 2, 2048, optimizer="galore_adamw"),
    # lengths that are no multiple of a kernel's tile, and batches of an odd number
    ValidationJob("llama3_1_8b", "lora", "full", 3, 1337, packing=False),
    ValidationJob("llama3_2_1b", "full", "none", 3, 1337, loss="plain"),
    ValidationJob("qwen3_0_6b", "full", "offload", 7, 1111),
    ValidationJob("llama3_2_1b", "lora", "none", 3, 1337, loss="liger"),
    ValidationJob("llama3_2_3b", "lora", "none", 1, 2001, attention="eager"),
    ValidationJob("olmo2_7b", "full", "full", 1, 1337, optimizer="adamw_8bit"),
    ValidationJob("gpt2_xl", "lora", "selective", 3, 1000, loss="plain"),
    ValidationJob("gemma3_1b", "lora", "none", 5, 777, packing=False, evaluation=True),
    ValidationJob("qwen2_5_0_5b", "full", "none", 5, 999, precision="fp16_mixed", optimizer="adamw_torch"),
    ValidationJob("qwen3_30b_a3b", "lora", "none", 2, 777, num_layers=8),
    ValidationJob("gpt_oss_20b", "lora", "none", 1, 1501, attention="eager", num_layers=8),
    ValidationJob(
        "qwen2_5_7b",
        "qlora",
        "full",
        3,
        901,
        packing=False,
        evaluation=True,
        options=(("kbit_preparation", True),),
    ),
    ValidationJob("mistral_7b", "lora", "none", 1, 1777, precision="fp16_mixed", num_layers=16),
    # what is left of methods and optimizers
    ValidationJob("llama3_1_8b", "qlora", "full", 1, 2048, options=(("quantization", "fp4"),)),
    ValidationJob("llama3_1_8b", "qlora", "none", 1, 1024, options=(("double_quantization", False),)),
    ValidationJob("llama3_2_3b", "full", "full", 2, 1024, optimizer="lion_8bit"),
    ValidationJob("llama3_2_3b", "full", "full", 2, 1024, optimizer="paged_adamw_32bit"),
    ValidationJob("llama3_2_1b", "full", "full", 2, 2048, optimizer="apollo_adamw"),
    ValidationJob("llama3_2_1b", "full", "full", 2, 1500, optimizer="adamw_torch", accumulation=3),
    ValidationJob(
        "smollm3_3b",
        "lora",
        "none",
        2,
        1024,
        options=(("target_modules", ("q_proj", "v_proj")), ("adapter_dtype", "base"), ("use_rslora", True)),
    ),
    ValidationJob("gemma2_9b", "qlora", "full", 1, 3000),
    ValidationJob("llama3_3_70b", "qlora", "full", 1, 1024, num_layers=40),
    ValidationJob("mixtral_8x7b", "qlora", "full", 1, 1024, num_layers=8),
    ValidationJob("phi4", "lora", "selective", 1, 2500),
)
CPU_JOBS = (
    ValidationJob(
        "smollm2_135m", "lora", "full", 2, 96, num_layers=2, evaluation=True, save=True, stored=True
    ),
    ValidationJob("smollm2_135m", "qlora", "none", 2, 96, num_layers=2, packing=False),
)
"""The plumbing, for a machine without a card."""


def by_name() -> dict[str, ValidationJob]:
    """Every job by its name."""
    return {job.name: job for job in (*JOBS, *CPU_JOBS)}


def settings(job: ValidationJob) -> dict[str, str]:
    """Environment variables that the job's process needs beyond those of the launcher's worker."""
    chosen = {} if job.cudnn_attention else {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    return chosen | (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:False"} if job.allocator == "classic" else {}
    )


def missing_package(job: ValidationJob) -> str | None:
    """A package that the job needs and that is not installed here."""
    needs_bitsandbytes = job.method == "qlora" or job.optimizer.endswith(("_8bit", "_32bit"))
    needed = ["bitsandbytes"] if needs_bitsandbytes else []
    needed += ["liger_kernel"] if job.loss == "liger" else []
    needed += ["flash_attn"] if job.attention == "flash_attention_2" else []
    return next((name for name in needed if find_spec(name) is None), None)


def architecture(job: ValidationJob) -> dict[str, Any]:
    """The facts of the job's model, at the job's depth."""
    text = (ROOT / "conf" / "model" / f"{job.model}.yaml").read_text(encoding="utf-8")
    facts: dict[str, Any] = yaml.safe_load(text)["architecture"]
    if job.num_layers is not None:
        decoder = facts.get("text_config", facts)
        decoder["num_hidden_layers"] = job.num_layers
        if "layer_types" in decoder:
            decoder["layer_types"] = decoder["layer_types"][: job.num_layers]
    return facts


def spec_of(job: ValidationJob, hardware: HardwareSpec) -> JobSpec:
    """The launcher's job."""
    precision = Precision(job.precision)
    return JobSpec(
        model=ModelSpec(
            architecture=architecture(job),
            stored_dtype=StoredDtype.BF16 if precision is Precision.BF16 else StoredDtype.FP32,
        ),
        method=TypeAdapter(MethodSpec).validate_python(dict(job.options)),
        data=DataSpec(packing=job.packing),
        training=TrainingSpec(max_steps=STEPS, save_steps=2 if job.save else None, report_to=()),
        evaluation=EvaluationSpec(enabled=job.evaluation, steps=2, num_examples=2 * job.micro_batch_size),
        hardware=hardware,
    )


def plan_of(job: ValidationJob) -> Plan:
    """The launcher's plan."""
    return Plan(
        method=Method(job.method),
        rank=0 if job.method == "full" else RANK,
        max_length=job.length,
        micro_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.accumulation,
        activation_checkpointing=Checkpointing(job.checkpointing),
        attention=Attention(job.attention),
        loss=Loss(job.loss),
        optimizer=Optimizer(job.optimizer),
        precision=Precision(job.precision),
    )


def hardware_facts(name: str) -> dict[str, Any]:
    """One entry of conf/hardware. Read here and not through launcher.config, which needs Hydra."""
    facts: dict[str, Any] = yaml.safe_load(
        (ROOT / "conf" / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")
    )
    return facts
