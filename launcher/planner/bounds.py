"""What is known of an engine's memory before anything is traced."""

from __future__ import annotations

from launcher.job import Engine, Precision
from launcher.plan import Plan
from launcher.planner.tracer import SubjectFacts


def static_floor_bytes(plan: Plan, facts: SubjectFacts) -> int:
    """What an engine holds of weights and gradients at least at once, before anything is traced; 0 where nobody knows.

    Stages 1 and 2 hold all weights, stage 1 has all gradients when its backward pass ends, and DDP holds them in its
    buckets; while it accumulates, beside those of the step.
    """
    if plan.engine is Engine.NONE:
        return 0
    ranks = plan.num_devices if plan.shard_within_node else plan.world_size
    weights = 0 if plan.offload_parameters else facts.weight_bytes // (ranks if plan.zero_stage == 3 else 1)
    if plan.offload_optimizer:
        return weights  # gradients go to the host as they come
    gradients = gradient_bytes(plan, facts) // (ranks if plan.zero_stage >= 2 else 1)
    copies = 2 if plan.engine is Engine.DDP and plan.gradient_accumulation_steps > 1 else 1
    return weights + copies * gradients


def gradient_bytes(plan: Plan, facts: SubjectFacts) -> int:
    """All gradients, as they are exchanged: DeepSpeed turns whatever is trained to the precision of the model."""
    if plan.engine is Engine.DEEPSPEED and plan.precision is not Precision.FP32:
        return 2 * facts.trained_elements
    return facts.trained_bytes
