"""Plans of a small job for several devices, that tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.job import (
    Checkpointing,
    Engine,
    Method,
)
from launcher.plan import Plan
from launcher.planner.buckets import small_buckets
from launcher.planner.forecast import Forecaster
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from scripts.accuracy_ranks import (
    ARCHITECTURE,
    job_of,
    plan_of,
)

LAYERWISE: dict[str, Any] = {"reduce_bucket_elements": 73_984, "sub_group_elements": 73_984 // 2}
"""A layer's adapters: 16 x (2 x (256 + 256) + 2 x (256 + 128) + 3 x (256 + 688)), and a rank's half of them."""


def full(engine: Engine, stage: int, num_devices: int = 2) -> Plan:
    """All weights trained, a sequence a micro batch."""
    return plan_of(engine, stage, Method.FULL, Checkpointing.NONE, 1, 384, 2, num_devices=num_devices)


def small(plan: Plan) -> Plan:
    """The plan with small buckets."""
    return replace(plan, buckets=small_buckets(ARCHITECTURE, plan))


def open_forecaster(tracer: Tracer) -> Forecaster:
    """Predicts for the small job of `scripts.accuracy_ranks`, with nothing kept."""
    return Forecaster(job_of(full(Engine.DEEPSPEED, 1), Path("nowhere")), tracer, TraceCache(None))
