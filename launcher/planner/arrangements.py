"""How several devices train together: the engines and stages that a search weighs, and the sizes of their buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.hardware import DeviceKind
from launcher.job import Engine, JobSpec, OffloadDevice
from launcher.plan import SMALL_BUCKETS, Buckets, Plan, offload_words

FUSED_ELEMENTS = 50_000_000
"""Trained elements up to which one bucket holds all gradients: 100 MB of bf16."""
PERSISTENT_ROWS = 10
"""Parameters up to so many rows of the hidden size (norms, biases) are held whole under ZeRO 3: gathering them costs
more time than they take room (DeepSpeed's default is 1e5 elements, about 24 rows of 4,096)."""

ONE_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's `sub_group_size`."""
BELOW_A_LAYER = 0.95
"""A group closes with the parameter that fills it: one a little smaller than a layer closes with each layer's last large
one, whatever small ones the config does not tell of."""
WIDTH, DEPTH = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")
"""How configs spell width and depth."""
NO_BUCKET = "sub_group_elements"
"""The one size that is no bucket's, and that a run which goes on has pinned: checkpoints of ZeRO 3 are saved by it."""


@dataclass(frozen=True)
class Arrangement:
    """What is sharded over the devices, and by which engine."""

    engine: Engine
    zero_stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    small_buckets: bool = False

    @property
    def offloads(self) -> bool:
        """Whether a part of the model lives in host memory."""
        return self.offload_optimizer or self.offload_parameters

    def applied_to(self, plan: Plan, job: JobSpec) -> Plan:
        """The plan, trained so on all devices of the job's hardware."""
        hardware = job.hardware
        arranged = replace(
            plan,
            engine=self.engine,
            zero_stage=self.zero_stage,
            num_devices=hardware.num_devices,
            num_nodes=hardware.num_nodes,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            offload_device=job.planner.pin.offload_device or OffloadDevice.CPU,
        )
        if self.engine is Engine.NONE:
            return arranged
        pin = job.planner.pin
        sized = small_buckets if self.small_buckets else default_buckets
        return replace(
            arranged,
            buckets=replace(
                sized(job.model.architecture, arranged, job.method.target_modules),
                **_pinned_sizes(job),
                overlap_exchange=not self.small_buckets,
            ),
            shard_within_node=bool(pin.shard_within_node),
        )

    def words(self) -> str:
        """What people call it."""
        if self.engine is Engine.DEEPSPEED:
            offloaded = offload_words(self.offload_optimizer, self.offload_parameters)
            return f"ZeRO stage {self.zero_stage}{offloaded}{SMALL_BUCKETS if self.small_buckets else ''}"
        return {Engine.NONE: "one device", Engine.DDP: "DDP", Engine.FSDP2: "FSDP2"}[self.engine]


def arrangement_of(plan: Plan) -> Arrangement:
    """The arrangement of a plan."""
    offloaded = plan.offload_optimizer, plan.offload_parameters
    return Arrangement(plan.engine, plan.zero_stage, *offloaded, plan.has_small_buckets)


def arrangement_words(plan: Plan) -> str:
    """What people call the arrangement of a plan."""
    return arrangement_of(plan).words()


def with_ordinary_buckets(plan: Plan, job: JobSpec) -> Plan | None:
    """The same plan with buckets of ordinary size; None where it has them."""
    if not plan.has_small_buckets:
        return None
    return replace(arrangement_of(plan), small_buckets=False).applied_to(plan, job)


ALONE = Arrangement(Engine.NONE, 0)
ON_DEVICE = (
    Arrangement(Engine.DEEPSPEED, 1),
    Arrangement(Engine.DEEPSPEED, 2),
    Arrangement(Engine.DEEPSPEED, 3),
)
ON_HOST = (
    Arrangement(Engine.DEEPSPEED, 2, offload_optimizer=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True),
    Arrangement(Engine.DEEPSPEED, 3, offload_optimizer=True, offload_parameters=True),
)
WAITING = (*ON_HOST, *(replace(item, small_buckets=True) for item in ON_HOST))
"""All that waits for host memory, with ordinary buckets first."""
TOGETHER = (
    Arrangement(Engine.DDP, 0),
    *ON_DEVICE,
    Arrangement(Engine.FSDP2, 3),
    *(replace(item, small_buckets=True) for item in ON_DEVICE if item.zero_stage > 1),
    *WAITING,
)
"""From nothing sharded to everything, then with small buckets, and then the same in host memory. With the same buckets
and as much offloaded each holds less than those before it (FSDP2 as much as ZeRO 3), and exchanges no less. ZeRO 1 has no
small buckets: it reduces all gradients at the end then, and few layers do not tell of all."""


def rounds(job: JobSpec) -> tuple[tuple[Arrangement, ...], ...]:
    """What the devices of a job may do, in rounds: a later one is for jobs of which nothing fits in those before it.

    A single device offloads only then, whatever the job's lists prefer: its update on the host takes many times the
    update on the device, and an engine that is loaded for it takes seconds. A CPU's host memory is the device's own:
    there it offloads only where that is pinned.
    """
    pin = job.planner.pin
    if job.hardware.world_size > 1:
        return (TOGETHER,)
    if pin.offload_optimizer or pin.offload_parameters:
        return (WAITING,)
    is_pinned = pin.engine is not None or pin.zero_stage is not None or pin.offload_optimizer is not None
    text = job.model.architecture.get("text_config") or job.model.architecture
    is_sized = all(any(name in text for name in names) for names in (WIDTH, DEPTH))
    if is_pinned or not is_sized or job.hardware.kind is DeviceKind.CPU:
        return ((ALONE,),)
    return (ALONE,), WAITING


def is_last_resort(job: JobSpec, plan: Plan) -> bool:
    """Whether a plan is weighed only because nothing fits without host memory, and nobody asked for it."""
    return plan.uses_offload and len(rounds(job)) > 1


def arrangements(
    job: JobSpec, semantic: Plan, candidates: Sequence[Arrangement] = ()
) -> tuple[tuple[Arrangement, ...], dict[Arrangement, str]]:
    """The arrangements that a job can choose from, simplest first; and those that can't carry it out, with the reason.

    FSDP2 shards what ZeRO 3 shards, and comes where ZeRO 3 can't, or where it is pinned.

    Args:
        job: The job.
        semantic: What is trained; of it the method counts.
        candidates: Those of one round; none: of the first one.

    Raises:
        ConfigError: When the pinned values leave nothing.
    """
    pin = job.planner.pin
    candidates = candidates or rounds(job)[0]
    wanted = (pin.offload_optimizer, pin.offload_parameters)
    if job.hardware.kind is DeviceKind.CPU:
        wanted = (bool(wanted[0] or wanted[1]), bool(wanted[1]))
    matching = [
        item
        for item in candidates
        if pin.engine in (None, item.engine)
        and pin.zero_stage in (None, item.zero_stage)
        and wanted[0] in (None, item.offload_optimizer)
        and wanted[1] in (None, item.offload_parameters)
        and _buckets_match(item, job)
    ]
    if pin.shard_within_node:
        matching = [item for item in matching if item.engine is Engine.FSDP2]
    if not matching:
        legal = ", ".join(
            f"{item.engine.value} with zero_stage {item.zero_stage}"
            f"{offload_words(item.offload_optimizer, item.offload_parameters)}"
            for item in (*candidates, *(WAITING if candidates == (ALONE,) else ()))
            if not item.small_buckets
        )
        asked = "".join(
            f", planner.pin.{name}={str(value).lower()}"
            for name in ("offload_optimizer", "offload_parameters", "overlap_exchange")
            if (value := getattr(pin, name)) is not None
        )
        raise ConfigError(
            f"planner.pin.engine={pin.engine.value if pin.engine else 'any'} with planner.pin.zero_stage="
            f"{'any' if pin.zero_stage is None else pin.zero_stage}"
            f"{asked}{' and planner.pin.shard_within_node=true' if pin.shard_within_node else ''} is nothing that "
            f"{job.hardware.world_size} devices can do",
            f"legal are {legal}; only fsdp2 shards within a node, and only deepspeed does without overlap_exchange",
        )
    refused: dict[Arrangement, str] = {}
    possible: list[Arrangement] = []
    for item in matching:
        limits = engine_limits(job, item.applied_to(semantic, job))
        if limits:
            refused.setdefault(replace(item, small_buckets=False), "; ".join(limits))
        elif item.engine is not Engine.FSDP2 or pin.engine is Engine.FSDP2 or not _has_stage_three(possible):
            possible.append(item)
    return tuple(possible), refused


def _buckets_match(item: Arrangement, job: JobSpec) -> bool:
    """Whether pins leave an arrangement its buckets: where a size is pinned, no small ones are weighed."""
    overlaps = job.planner.pin.overlap_exchange
    if overlaps is not None:
        return overlaps is not item.small_buckets
    return not item.small_buckets or _pinned_sizes(job).keys() <= {NO_BUCKET}


def _pinned_sizes(job: JobSpec) -> dict[str, int]:
    """Pinned sizes by name, in elements."""
    pin = job.planner.pin
    names = [field.name for field in fields(Buckets) if field.name != "overlap_exchange"]
    return {name: value for name in names if (value := getattr(pin, name)) is not None}


def _has_stage_three(items: list[Arrangement]) -> bool:
    return any(item.zero_stage == 3 for item in items)


def default_buckets(
    architecture: Mapping[str, Any], plan: Plan, targets: str | Sequence[str] = "all-linear"
) -> Buckets:
    """Bucket sizes of a plan: all that is trained, where that is little; else a layer's worth of it.

    DeepSpeed's default of 5e8 elements is 1 GB that is there whatever the model's size. Gradients come parameter by
    parameter, so a bucket as large as the largest one is sent as soon as that one is there, layer after layer alike;
    one that holds a layer's adapters, to the element, is sent with the first of the next layer.
    ZeRO 3 updates a layer at a time: with DeepSpeed's 1e9 elements a rank would hold 4 GB of gradients in fp32 in its
    optimizer's step.

    Args:
        architecture: The model's config.
        plan: The plan; its method and rank count.
        targets: Which layers have adapters, as PEFT takes it.

    Raises:
        UnsupportedByPlanner: When the config tells neither width nor depth under a known name.
    """
    layer = _layer_of(architecture)
    if plan.rank:
        trained = group = layer.adapted_elements(plan.rank, targets)
        reduced = FUSED_ELEMENTS if trained * layer.count <= FUSED_ELEMENTS else trained
    else:
        trained, group = layer.elements, int(BELOW_A_LAYER * layer.elements)
        reduced = layer.largest_elements
    reduced += reduced % 2  # DeepSpeed wants an even number
    one_group = trained * layer.count <= FUSED_ELEMENTS * plan.world_size
    return Buckets(
        reduce_bucket_elements=reduced,
        allgather_bucket_elements=reduced,
        prefetch_bucket_elements=layer.largest_elements,
        persistence_threshold_elements=PERSISTENT_ROWS * layer.hidden,
        max_live_elements=layer.elements,  # more would keep layers gathered that the next ones don't use
        # of a block of experts DeepSpeed counts none (a leaf; 0.19.8, partitioned_param_coordinator.py,
        # `__params_to_release`), and with a layer's elements would hold the attention of many layers
        max_reuse_distance_elements=layer.attention_elements if layer.num_experts > 1 else layer.elements,
        sub_group_elements=ONE_GROUP_ELEMENTS if one_group else group // plan.world_size,
    )


def small_buckets(
    architecture: Mapping[str, Any], plan: Plan, targets: str | Sequence[str] = "all-linear"
) -> Buckets:
    """Bucket sizes of a plan for which ordinary ones leave no room: nothing waits in them, neither to be sent nor used.

    With all weights trained a bucket holds norms and biases; each matrix is larger, and sent by itself as soon as its
    gradient is there, without a copy in a bucket (deepspeed 0.19.8: `extra_large_param_to_reduce` of stage_1_and_2.py,
    `__add_grad_to_ipg_bucket` of stage3.py). With adapters it holds those of a layer. Either way a layer is sent like
    the one before it, so that few layers tell of all. ZeRO 3 gathers a module's weights when it comes to them, and lets
    go of them when it is done: no prefetch, and no wait for the next use (partitioned_param_coordinator.py).

    Nothing is exchanged while a rank computes. A gradient that is sent from its own memory by a second stream would go
    back to torch's allocator only when that stream is done with it (`record_stream` in stage_1_and_2.py,
    `allreduce_and_copy_with_multiple_ranks`), and no trace tells when that is. Groups of ZeRO 3's update stay what they
    are: its checkpoints are saved by them.

    Args:
        architecture: The model's config.
        plan: The plan; its method and rank count.
        targets: Which layers have adapters, as PEFT takes it.

    Raises:
        UnsupportedByPlanner: When the config tells neither width nor depth under a known name.
    """
    ordinary, layer = default_buckets(architecture, plan, targets), _layer_of(architecture)
    small = PERSISTENT_ROWS * layer.hidden
    reduced = layer.adapted_elements(plan.rank, targets) if plan.rank else small
    reduced = min(ordinary.reduce_bucket_elements, reduced + reduced % 2)
    return replace(
        ordinary,
        reduce_bucket_elements=reduced,
        prefetch_bucket_elements=0,
        max_reuse_distance_elements=0,
        overlap_exchange=False,
    )


@dataclass(frozen=True)
class _Layer:
    """A decoder layer by the config, with a gated feed-forward part; of other layers a rough figure."""

    text: Mapping[str, Any]
    """The config of the language model."""

    @property
    def hidden(self) -> int:
        """The width.

        Raises:
            UnsupportedByPlanner: When the config has it under no known name.
        """
        return _fact(self.text, *WIDTH)

    @property
    def count(self) -> int:
        """How many there are.

        Raises:
            UnsupportedByPlanner: When the config has it under no known name.
        """
        return _fact(self.text, *DEPTH)

    @property
    def inner(self) -> int:
        """The width inside the feed-forward part."""
        return int(self.text.get("intermediate_size") or self.text.get("n_inner") or 4 * self.hidden)

    @property
    def num_experts(self) -> int:
        """1 where there are none."""
        return int(self.text.get("num_local_experts") or self.text.get("num_experts") or 1)

    @property
    def expert_inner(self) -> int:
        """The width inside an expert, or inside the only feed-forward part."""
        wanted = self.text.get("moe_intermediate_size") if self.num_experts > 1 else None
        return int(wanted or self.inner)

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the projections of attention."""
        heads = int(self.text.get("num_attention_heads") or self.text.get("n_head") or 1)
        head_size = int(self.text.get("head_dim") or self.hidden // heads)
        own = heads * head_size
        shared = int(self.text.get("num_key_value_heads") or heads) * head_size
        return {
            "q_proj": (self.hidden, own),
            "k_proj": (self.hidden, shared),
            "v_proj": (self.hidden, shared),
            "o_proj": (own, self.hidden),
        }

    @property
    def attention_elements(self) -> int:
        """Elements of attention."""
        return sum(map(math.prod, self.attention.values()))

    @property
    def elements(self) -> int:
        """Elements of the matrices."""
        return self.attention_elements + 3 * self.hidden * self.expert_inner * self.num_experts

    @property
    def largest_elements(self) -> int:
        """Elements of the largest parameter; of experts two matrices are one."""
        fused = 2 * self.hidden * self.expert_inner * self.num_experts if self.num_experts > 1 else 0
        return max(self.hidden * self.inner, fused)

    def adapted_elements(self, rank: int, targets: str | Sequence[str]) -> int:
        """Elements of the adapters; those of all linear layers if no name is known.

        Experts are left out: they are stacks of matrices, and PEFT gives those of some architectures adapters of its own
        making (twice the rank for two fused matrices). A bucket is then less than a layer's worth, and every layer is
        traced.
        """
        sides = self.attention
        if self.num_experts == 1:
            sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (self.hidden, self.inner))
        named = [] if isinstance(targets, str) else [side for name, side in sides.items() if name in targets]
        return rank * sum(map(sum, named or sides.values()))


def _layer_of(architecture: Mapping[str, Any]) -> _Layer:
    return _Layer(architecture.get("text_config") or architecture)


def _fact(text: Mapping[str, Any], *names: str) -> int:
    found = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    if found is None:
        raise UnsupportedByPlanner(
            f"the config of {text.get('model_type')} has none of {', '.join(names)}, which the buckets' sizes come from",
            "one device, where there are no buckets",
        )
    return int(found)
