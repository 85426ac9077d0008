"""What is known of an engine's memory before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.job import AdapterDtype, Engine, JobSpec, Method, Precision
from launcher.memory import Category
from launcher.plan import Plan
from launcher.planner.subject import NO_OFFLOAD
from launcher.planner.tracer import SubjectFacts

RECOMPUTED = (Category.ACTIVATIONS, Category.TEMPORARIES)
"""What checkpointing makes less, or another kernel of attention."""
SHARDED = (Category.OPTIMIZER_STATE, Category.GRADIENTS)
"""What stages 1 and 2 make less."""


def sharded_categories(plan: Plan) -> tuple[Category, ...]:
    """What an arrangement makes less, beside the same plan with nothing sharded."""
    shards = plan.zero_stage == 3 and (plan.world_size > 1 or plan.offload_parameters)
    return (*SHARDED, Category.PARAMETERS) if shards else SHARDED


def differing_categories(known: Plan, plan: Plan) -> tuple[Category, ...]:
    """What may be more in one plan than in another one that differs in checkpointing, kernels or optimizer alone."""
    found: tuple[Category, ...] = ()
    if known.activation_checkpointing is not plan.activation_checkpointing:
        found += RECOMPUTED
    if known.attention is not plan.attention:
        found += RECOMPUTED
    if known.loss is not plan.loss:
        found += (Category.LOGITS_AND_LOSS,)
    if known.optimizer is not plan.optimizer:  # states are in host memory, or not
        found += (Category.OPTIMIZER_STATE,)
    return found


def computes_alike(job: JobSpec, plan: Plan) -> bool:
    """Whether all engines compute in the same dtypes: DeepSpeed turns fp32 adapters and autocast weights to 16 bits."""
    if plan.precision is Precision.FP32:
        return True
    adapts_in_fp32 = plan.method is Method.LORA and job.method.adapter_dtype is AdapterDtype.FP32
    return plan.precision is Precision.BF16 and not adapts_in_fp32


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


def buckets_hold_bytes(plan: Plan, architecture: Mapping[str, Any]) -> int:
    """What the buckets of a plan under DeepSpeed hold at most at once, bytes: more than that small ones can't save.

    Read off deepspeed 0.19.8, runtime/zero. Of gradients stages 1 and 2 have two buckets (`setup_buckets`), and the copy
    of one that is reduced (`allreduce_bucket`). Stage 3 has one bucket, its copy (`reduce_scatter_coalesced`), and what
    that leaves to a rank. Weights are fetched ahead only while fewer than `max_live_parameters` are gathered, so one
    weight beyond it at most, and they wait for another use within `max_reuse_distance`, and the module that reaches
    beyond it (partitioned_param_coordinator.py).

    Args:
        plan: The plan, with its buckets.
        architecture: The model's config.
    """
    buckets = plan.buckets
    if buckets is None or plan.engine is not Engine.DEEPSPEED:
        return 0
    width = 4 if plan.precision is Precision.FP32 else 2
    if plan.zero_stage < 3:
        return 3 * width * buckets.reduce_bucket_elements
    text = architecture.get("text_config") or architecture
    embedding = int(text.get("vocab_size") or 0) * int(text.get("hidden_size") or text.get("n_embd") or 0)
    # the experts of a layer are one module: a layer has no larger one
    beyond = 2 * max(embedding, buckets.max_live_elements)
    gathered = buckets.max_live_elements + buckets.max_reuse_distance_elements + beyond
    return width * (3 * buckets.reduce_bucket_elements + gathered)


def gradient_bytes(plan: Plan, facts: SubjectFacts) -> int:
    """All gradients, as they are exchanged: DeepSpeed turns whatever is trained to the precision of the model."""
    if plan.engine is Engine.DEEPSPEED and plan.precision is not Precision.FP32:
        return 2 * facts.trained_elements
    return facts.trained_bytes


def host_floor_bytes(plan: Plan, facts: SubjectFacts) -> int:
    """What a rank holds in host memory at least, before anything is traced; 0 where nobody knows.

    DeepSpeed's CPU Adam has a copy of the trained weights and two states in fp32 there, but where they are on NVMe.
    """
    if plan.engine is not Engine.DEEPSPEED or not plan.offload_optimizer:
        return 0
    states = 0 if plan.swaps else 3 * 4 * facts.trained_elements
    return (states + (facts.weight_bytes if plan.offload_parameters else 0)) // plan.world_size


def replicated_plan(plan: Plan) -> Plan:
    """The same job with nothing sharded, whatever its buckets: under DDP, or on one device without an engine."""
    engine = Engine.NONE if plan.world_size == 1 else Engine.DDP
    return replace(plan, engine=engine, zero_stage=0, buckets=None, **NO_OFFLOAD)
