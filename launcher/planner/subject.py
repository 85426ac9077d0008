"""What a trace depends on: job and plan without all that no trace sees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.hardware import HardwareSpec
from launcher.job import (
    DataSpec,
    Engine,
    EvaluationSpec,
    JobSpec,
    MethodSpec,
    ModelSpec,
    TrainingSpec,
)
from launcher.plan import Plan
from launcher.planner.tracer import Subject

NO_OFFLOAD: Mapping[str, Any] = {
    "offload_optimizer": False,
    "offload_parameters": False,
    "shard_within_node": False,
}


def alone(plan: Plan) -> Plan:
    """The plan on one device, without an engine."""
    return replace(
        plan, engine=Engine.NONE, num_devices=1, num_nodes=1, zero_stage=0, **NO_OFFLOAD, buckets=None
    )


def subject_of(job: JobSpec, plan: Plan) -> Subject:
    """Reduces job and plan to what a trace depends on; everything else takes its default."""
    defaults = MethodSpec()
    reduced = JobSpec(
        model=ModelSpec(
            architecture=job.model.architecture,
            **_own_code(job.model),
            task=job.model.task,
            num_labels=job.model.num_labels,
            freeze_vision=job.model.freeze_vision,
        ),
        method=replace(job.method, name=defaults.name, rank=defaults.rank, alpha=defaults.alpha),
        data=DataSpec(packing=job.data.packing, images_per_example=job.data.images_per_example),
        training=TrainingSpec(
            max_grad_norm=1.0 if job.training.max_grad_norm > 0 else 0.0,
            weight_decay=job.training.weight_decay,
            optimizer_rank=job.training.optimizer_rank,
            optimizer_target_modules=job.training.optimizer_target_modules,
            save_steps=None if job.training.save_steps is None else 1,
        ),
        evaluation=_reduced(job.evaluation),
        generation=job.generation,
        hardware=HardwareSpec(),
    )
    shapeless = replace(plan, micro_batch_size=1, gradient_accumulation_steps=1, max_length=8)
    facts = job.hardware
    hardware = HardwareSpec(
        kind=facts.kind,
        supports_flash_attention=facts.supports_flash_attention,
        compute_capability=facts.compute_capability if facts.prefers_cudnn_attention else "",
    )
    return Subject(reduced, shapeless, hardware)


def _own_code(model: ModelSpec) -> dict[str, Any]:
    """Where a model's own code is and which it is; nothing for models that transformers knows."""
    if not model.code_digest or not model.trust_remote_code:
        return {}
    return {
        "path": os.path.expanduser(model.path),
        "revision": model.revision,
        "trust_remote_code": True,
        "code_digest": model.code_digest,
    }


def _reduced(evaluation: EvaluationSpec) -> EvaluationSpec:
    kept = EvaluationSpec(enabled=evaluation.enabled, batch_size=evaluation.batch_size)
    if not evaluation.enabled or not evaluation.keep_logits:
        return kept
    return replace(
        kept,
        keep_logits=True,
        num_examples=evaluation.num_examples,
        accumulation_steps=evaluation.accumulation_steps,
    )
