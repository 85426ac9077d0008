"""What `launch resume=<run dir>` may change of a run, and what the run's checkpoints allow.

A checkpoint is what its engine wrote. Read off the libraries and tried (accelerate 1.15, transformers 5.24, deepspeed
0.19.8, torch 2.13); docs/design.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from launcher.job import Engine, PinSpec
from launcher.plan import Plan, offload_words

STEERING: Final = ("action", "output", "resume", "trace_cache")
"""Keys that say what `launch` does and prints, and nothing of the job."""
SEMANTIC: Final = ("method", "rank", "max_length")
"""Pins that would make another model of the run."""
PINS: Final = tuple(field.name for field in fields(PinSpec) if field.name not in SEMANTIC)
LAYOUT: Final = ("hardware.num_devices", "hardware.num_nodes")
EVALUATION: Final = "evaluation.batch_size"
CHANGEABLE: Final = (
    f"planner.pin.* (but {', '.join(SEMANTIC)}), {', '.join(LAYOUT)}, {EVALUATION} and launch.*, and "
    f"{', '.join(name for name in STEERING if name != 'resume')}"
)
"""What is legal beside `resume`, in words."""
REPLICATED: Final = (Engine.NONE, Engine.DDP)
"""Engines whose processes each hold the whole model and its states: one file of either, written by rank 0."""

ALIKE_STAGES: Final = (1, 2)
"""ZeRO stages whose files DeepSpeed writes and reads with one class (runtime/zero/stage_1_and_2.py)."""


def is_changeable(key: str) -> bool:
    """Whether a run may go on with another value of a key."""
    group, _, name = key.rpartition(".")
    return (group == "planner.pin" and name in PINS) or key in (*LAYOUT, EVALUATION) or group == "launch"


def asks_for_plan(changes: Mapping[str, Any]) -> bool:
    """Whether changes ask for another plan of the training."""
    return any(key in LAYOUT or key.startswith("planner.pin.") for key in changes)


def resume_mistake(run_dir: str, keys: Iterable[str]) -> str:
    """What a command line with `resume=` may not say; empty when there is nothing.

    Args:
        run_dir: The run that is continued.
        keys: Dotted keys of the command line.
    """
    refused = [key for key in keys if key not in STEERING and not is_changeable(key)]
    if not refused:
        return ""
    return (
        f"`resume={run_dir}` with {', '.join(f'`{key}`' for key in refused)}: a run goes on with its own model, data and "
        f"optimisation; legal beside `resume`: {CHANGEABLE}"
    )


def checkpoint_pins(plan: Plan, asked: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Knobs that a plan must have to read the checkpoints of another, by name of the pin.

    Args:
        plan: What wrote the checkpoints.
        asked: Pins of the command line, by name.
        world_size: Processes that are to read them.
    """
    if plan.engine in REPLICATED:
        engine = Engine.NONE if world_size == 1 else Engine.DDP
        unsharded = {"zero_stage": 0, "offload_optimizer": False, "offload_parameters": False}
        return {"optimizer": plan.optimizer, "engine": engine, **unsharded}
    # torch reads which kernel to use from the states, and bitsandbytes reads paged ones onto the device
    names = ["optimizer", "engine", "zero_stage", "offload_optimizer", "offload_parameters", "offload_device"]
    pins = {name: getattr(plan, name) for name in names}
    if plan.engine is Engine.FSDP2:
        pins["shard_within_node"] = plan.shard_within_node
    if plan.engine is Engine.DEEPSPEED and {plan.zero_stage, asked.get("zero_stage")} == set(ALIKE_STAGES):
        pins["zero_stage"] = asked["zero_stage"]
    if plan.engine is Engine.DEEPSPEED and plan.zero_stage == 3 and plan.buckets is not None:
        pins["sub_group_elements"] = plan.buckets.sub_group_elements  # states are saved group by group
    return pins


def checkpoint_limits(plan: Plan, asked: Mapping[str, Any], world_size: int) -> tuple[str, ...]:
    """Why a plan that is asked for could not read the checkpoints of another; empty when it could.

    Args:
        plan: What wrote the checkpoints.
        asked: Pins of the command line, by name.
        world_size: Processes that are to read them.
    """
    wrote, found = _writer(plan), []
    if plan.engine is Engine.DEEPSPEED and world_size != plan.world_size:
        found.append(
            f"{world_size} processes can't continue what {plan.world_size} wrote with {wrote}: each reads the part of "
            "the states that it wrote"
        )
    elif plan.engine is Engine.FSDP2 and world_size == 1:
        found.append(
            f"one process can't continue what {wrote} wrote: a single device has no engine that reads it"
        )
    elif plan.shard_within_node and world_size != plan.world_size:
        found.append(f"{world_size} processes were never tried with what FSDP2 wrote sharded within nodes")
    for name, needed in checkpoint_pins(plan, asked, world_size).items():
        value = asked.get(name)
        if value is not None and value != needed:
            found.append(
                f"planner.pin.{name}={_word(value)} can't continue what {wrote} wrote: on {world_size} "
                f"device{'s' if world_size > 1 else ''} only {name} {_word(needed)} reads it"
            )
    return tuple(found)


def readable_words(plan: Plan) -> str:
    """What can continue the checkpoints of a plan, for a hint."""
    if plan.engine in REPLICATED:
        return "one device, or DDP on any number of them"
    if plan.engine is Engine.FSDP2 and plan.shard_within_node:
        return f"FSDP2 within nodes on {plan.world_size} devices"
    if plan.engine is Engine.FSDP2:
        return "FSDP2 on any number of devices from two on"
    stages = " (1 and 2 alike)" if plan.zero_stage in ALIKE_STAGES else ""
    return f"{_writer(plan)}{stages} on {plan.world_size} devices; micro batch, checkpointing and buckets may change"


def continued_pins(recorded: PinSpec, asked: Mapping[str, Any], required: Mapping[str, Any]) -> PinSpec:
    """The pins of a run that goes on: what is asked for now, and what was pinned before where that still can be.

    The global batch is micro batch x accumulation x devices: asked for one of the first two, the other gives way.

    Args:
        recorded: The run's pins, those that are asked for among them.
        asked: Pins of the command line, by name.
        required: What the checkpoints need, by name.
    """
    dropped = [
        name
        for name, needed in required.items()
        if name not in asked and getattr(recorded, name) not in (None, needed)
    ]
    batch = ("micro_batch_size", "gradient_accumulation_steps")
    if sum(asked.get(name) is not None for name in batch) == 1:
        dropped += [name for name in batch if name not in asked]
    return replace(recorded, **dict.fromkeys(dropped))


def pins_of(plan: Plan) -> PinSpec:
    """Every knob of a plan, pinned."""
    buckets = {} if plan.buckets is None else vars(plan.buckets)
    knobs: dict[str, Any] = {name: buckets.get(name, getattr(plan, name, None)) for name in PINS}
    return PinSpec(**{**knobs, "shard_within_node": plan.shard_within_node or None})


def _writer(plan: Plan) -> str:
    names = {Engine.NONE: "one process", Engine.DDP: "DDP", Engine.FSDP2: "FSDP2"}
    offload = offload_words(plan.offload_optimizer, plan.offload_parameters, swaps=plan.swaps)
    return names.get(plan.engine) or f"DeepSpeed's ZeRO stage {plan.zero_stage}{offload}"


def _word(value: object) -> str:
    return str(getattr(value, "value", value)).lower()
