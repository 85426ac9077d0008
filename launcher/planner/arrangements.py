"""How several devices train together, or one with its host: the engines and stages that a search weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind
from launcher.job import Engine, JobSpec, OffloadDevice
from launcher.plan import SMALL_BUCKETS, Buckets, Plan, offload_words
from launcher.planner.buckets import DEPTH, WIDTH, default_buckets, small_buckets

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


def short_words(item: Arrangement) -> str:
    """The same for a narrow column, less the buckets."""
    offloaded = " + offload" if item.offloads else ""
    everything = " of all" if item.offload_parameters else ""
    stage = f"ZeRO {item.zero_stage}{offloaded}{everything}"
    return stage if item.engine is Engine.DEEPSPEED else item.words()


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
    offloads = pin.offload_optimizer or pin.offload_parameters
    if offloads or (pin.engine is Engine.DEEPSPEED and job.hardware.kind is not DeviceKind.CPU):
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
            f"{job.hardware.world_size} device{'s' if job.hardware.world_size > 1 else ''} can do",
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
