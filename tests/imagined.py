"""An imagined model whose memory and time follow a law, so that searches can be tried against brute force and by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from launcher.domain import Domain
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    Optimizer,
    PlannerSpec,
    TrainingSpec,
)
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.optimisation import implementations
from launcher.plan import Plan, varied
from launcher.planner.forecast import Forecaster
from launcher.planner.group import Group, Split
from launcher.step_time import StepTime

MODES = (Checkpointing.NONE, Checkpointing.SELECTIVE, Checkpointing.FULL, Checkpointing.OFFLOAD)


@dataclass(frozen=True)
class Law:
    """Memory of an imagined model, bytes."""

    parameters: int = 1_000_000
    per_rank: int = 4_000
    per_token_kept: int = 500
    per_token_recomputed: int = 90
    logits_per_token: int = 60
    tile: int = 256
    context: int = 20_000
    surplus: int = 0
    """What the true shape needs beyond what the regime's skyline says."""
    token_seconds: float = 1e-6
    batch_seconds: float = 1e-4
    """Time of a micro batch, however small."""
    cache_tokens: int = 10**9
    """Tokens per micro batch beyond which each takes half as long again, as on a CPU with a cache."""
    recompute: tuple[float, ...] = (0.0, 0.2, 0.3, 0.4)
    """What each mode adds to the time of a token."""
    chunked_loss: float = 0.0
    """What the loss adds to the time of a token when it works on tiles."""
    plain_loss: float = 0.0
    """What it adds when it works on all tokens at once, whose logits are all there then."""
    liger_loss: float = 0.0
    """What it adds with Liger's kernel."""
    flash_time: float = 1.0
    """The time of all but the loss with FlashAttention-2, of that with torch's kernel."""
    flash_bytes: float = 1.0
    """Its activations, of those with torch's kernel."""
    knows_speed: bool = True

    def price(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        """Both phases of a plan."""
        tokens = plan.micro_batch_size * plan.max_length
        trained = self.parameters if plan.method is Method.FULL else self.per_rank * plan.rank
        share = (1.0, 0.5, 0.0, -0.5)[MODES.index(plan.activation_checkpointing)]
        per_token = self.per_token_recomputed + round(
            share
            * (self.per_token_kept - self.per_token_recomputed if share > 0 else self.per_token_recomputed)
        )
        has_flash = plan.attention is Attention.FLASH_ATTENTION_2
        per_token = round(per_token * (self.flash_bytes if has_flash else 1.0))
        always = {
            Category.PARAMETERS: self.parameters,
            Category.OPTIMIZER_STATE: 0 if plan.uses_pages else 2 * trained,
            Category.INPUTS: 3 * tokens * plan.gradient_accumulation_steps,
        }
        step = always | {
            Category.GRADIENTS: trained if plan.gradient_accumulation_steps > 1 else 0,
            Category.ACTIVATIONS: tokens * per_token,
            Category.LOGITS_AND_LOSS: self.logits_per_token
            * (tokens if plan.loss is Loss.PLAIN else min(tokens, self.tile))
            // (1 + (plan.loss is Loss.LIGER)),
            Category.TEMPORARIES: self.surplus if exact else 0,
        }
        update = always | {Category.GRADIENTS: trained, Category.TEMPORARIES: trained // 2}
        return MemoryEstimate(
            phases=(
                PhasePeak(Phase.TRAIN_STEP, sum(step.values()), step),
                PhasePeak(Phase.OPTIMIZER_STEP, sum(update.values()), update),
            ),
            resident_bytes={Category.GRADIENTS: trained},
            context_bytes=self.context,
        )

    def peaks(self, group: Group) -> list[int]:
        """`price(plan).peak_device_bytes` of many plans."""
        step, update = self._phases(group)
        return [int(size) for size in np.maximum(sum(step.values()), sum(update.values())) + self.context]

    def floors(self, group: Group, like: Plan) -> list[int]:
        """What plans that differ from those of a group in a kernel or the optimizer need at least."""
        step, _ = self._phases(group)
        if group.like.attention is not like.attention:
            step[Category.ACTIVATIONS] = 0
        if group.like.loss is not like.loss:
            step[Category.LOGITS_AND_LOSS] = 0
        if group.like.optimizer is not like.optimizer:
            step[Category.OPTIMIZER_STATE] = 0
        sizes = sum(step.values()) + self.context + np.zeros(len(group.splits), dtype=np.int64)
        return [int(size) for size in sizes]

    def _phases(self, group: Group) -> tuple[dict[Category, Any], dict[Category, Any]]:
        """Both phases of many plans that all accumulate, or of one, on the skyline of their regime."""
        first = self.price(group.plan(group.splits[0]))
        micro = np.array([split[0] for split in group.splits], dtype=np.int64)
        step: dict[Category, Any] = dict(first.phases[0].by_category_bytes)
        update = dict(first.phases[1].by_category_bytes)
        tokens = int(micro[0]) * group.like.max_length
        many = micro * group.like.max_length
        step[Category.ACTIVATIONS] = many * (step[Category.ACTIVATIONS] // tokens)
        seen = many if group.like.loss is Loss.PLAIN else np.minimum(many, self.tile)
        step[Category.LOGITS_AND_LOSS] = self.logits_per_token * seen // (1 + (group.like.loss is Loss.LIGER))
        return step, update

    def step(self, plan: Plan, *, without_loss: bool = False) -> StepTime | None:
        """Time of a plan, or of all of it but the loss."""
        if not self.knows_speed:
            return None
        tokens = plan.micro_batch_size * plan.max_length
        more = 1 + self.recompute[MODES.index(plan.activation_checkpointing)]
        slower = 1.5 if tokens > self.cache_tokens else 1.0
        batch = (self.batch_seconds + tokens * self.token_seconds * slower) * more
        batch *= self.flash_time if plan.attention is Attention.FLASH_ATTENTION_2 else 1.0
        if not without_loss:
            shares = {
                Loss.PLAIN: self.plain_loss,
                Loss.CHUNKED: self.chunked_loss,
                Loss.LIGER: self.liger_loss,
            }
            batch += tokens * self.token_seconds * shares[plan.loss]
        update = 1e-9 * self.parameters
        return StepTime(
            batch,
            batch * 1.001,
            update,
            plan.gradient_accumulation_steps,
            plan.tokens_per_step,
            "",
            True,
        )

    def seconds(self, plan: Plan, *, without_loss: bool = False) -> float:
        step = self.step(plan, without_loss=without_loss)
        assert step is not None
        return step.seconds

    def peak(self, plan: Plan) -> int:
        """Device peak at the true shape."""
        return self.price(plan, exact=True).peak_device_bytes


class FakeForecaster(Forecaster):
    """Prices by a law; remembers which traces that would have taken."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.traced: list[tuple[object, ...]] = []
        self.traced_exactly: list[Plan] = []
        self.missing: tuple[Attention, ...] = ()
        self.parts: dict[tuple[int, tuple[Split, ...]], tuple[tuple[Split, ...], ...]] = {}

    def prepare(self, plans: Iterable[Plan], *, exact: bool = False) -> None:
        for plan in plans:
            if exact and plan not in self.traced_exactly:
                self.traced_exactly.append(plan)
            elif not exact and self._regime(plan) not in self.traced:
                self.traced.append(self._regime(plan))

    def is_prepared(self, plan: Plan) -> bool:
        return self._regime(plan) in self.traced

    def lower_bound_bytes(self, plan: Plan) -> int:
        bounds = [0]
        accumulating = varied(plan, gradient_accumulation_steps=2)
        if plan.gradient_accumulation_steps == 1 and self.is_prepared(accumulating):
            price = self.law.price(accumulating)
            bound = price.peak_device_bytes - price.resident_bytes[Category.GRADIENTS]
            bounds.append(bound - price.peak.by_category_bytes[Category.INPUTS])
        steps = {plan.gradient_accumulation_steps, max(2, plan.gradient_accumulation_steps)}
        at_once = self._answers_at_once()
        for attention, loss, optimizer, accumulation in product(
            Attention, Loss, implementations(plan.optimizer), steps
        ):
            if at_once and self._key(plan, attention, loss, optimizer, accumulation) not in self.traced:
                continue  # the same as below, sooner
            other = varied(plan, attention=attention, loss=loss, optimizer=optimizer)
            known = varied(other, gradient_accumulation_steps=accumulation)
            if other != plan and self.is_prepared(known):
                step = dict(self.law.price(known).phases[0].by_category_bytes)
                if attention is not plan.attention:
                    step[Category.ACTIVATIONS] = step[Category.TEMPORARIES] = 0
                if loss is not plan.loss:
                    step[Category.LOGITS_AND_LOSS] = 0
                if optimizer is not plan.optimizer:
                    step[Category.OPTIMIZER_STATE] = 0
                if known != other:
                    step[Category.GRADIENTS] = step[Category.INPUTS] = 0
                bounds.append(sum(step.values()) + self.law.context)
        assert max(bounds) <= self.law.price(plan).peak_device_bytes
        return max(bounds)

    def known_peaks_bytes(self, group: Group) -> list[int | None]:
        if not self._answers_at_once():
            known = ((plan, self.is_prepared(plan)) for plan in group.plans())
            return [self.law.price(plan).peak_device_bytes if is_known else None for plan, is_known in known]
        peaks: dict[Split, int] = {}
        for splits in self._parts(group):
            if self._regime(group.plan(splits[0])) in self.traced:
                peaks |= zip(splits, self.law.peaks(replace(group, splits=splits)), strict=True)
        return [peaks.get(split) for split in group.splits]

    def lower_bounds_bytes(self, group: Group) -> list[int]:
        if not self._answers_at_once():
            return [self.lower_bound_bytes(plan) for plan in group.plans()]
        like, bounds = group.like, dict.fromkeys(group.splits, 0)
        kernels = set(product(Attention, Loss, implementations(like.optimizer)))
        for splits in self._parts(group):
            if splits[0][1] == 1:
                bounds |= {split: self.lower_bound_bytes(group.plan(split)) for split in splits}
                continue
            first = group.plan(splits[0])
            for known in kernels - {(like.attention, like.loss, like.optimizer)}:
                if self._key(first, *known, 2) in self.traced:
                    attention, loss, optimizer = known
                    other = varied(like, attention=attention, loss=loss, optimizer=optimizer)
                    floors = self.law.floors(Group(other, splits), like)
                    bounds |= {s: max(bounds[s], size) for s, size in zip(splits, floors, strict=True)}
        return [bounds[split] for split in group.splits]

    def _answers_at_once(self) -> bool:
        """Whether a law is the plain one, whose figures for many micro batches are computed together."""
        return type(self.law) is Law and type(self)._regime is FakeForecaster._regime

    def _parts(self, group: Group) -> tuple[tuple[Split, ...], ...]:
        """The splits of a group, by what is one regime for every kernel."""
        key = group.like.max_length, group.splits
        if key not in self.parts:
            found: dict[tuple[bool, ...], list[Split]] = {}
            for split in group.splits:
                over = split[0] * group.like.max_length > self.law.tile
                found.setdefault((split[0] == 1, over, split[1] > 1), []).append(split)
            self.parts[key] = tuple(tuple(splits) for splits in found.values())
        return self.parts[key]

    def domain(self, plan: Plan) -> Domain:
        if plan.attention in self.missing:
            raise UnsupportedByPlanner(f"the model has no {plan.attention.value}", "another one")
        return Domain(1, None, 8, None, 1, None)

    def host_floor_bytes(self, plan: Plan) -> int:
        return 0

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        self.prepare([plan], exact=exact)
        return self.law.price(plan, exact=exact)

    @property
    def knows_speed(self) -> bool:
        return self.law.knows_speed

    def step_time(self, plan: Plan, *, exact: bool = False) -> StepTime | None:
        self.prepare([plan], exact=exact)
        return self.law.step(plan)

    def step_floor_seconds(self, plan: Plan, like: Plan | None = None) -> float:
        if not self.knows_speed:
            return 0.0
        own = self.law.recompute[MODES.index(plan.activation_checkpointing)]
        modes = [mode for mode, more in zip(MODES, self.law.recompute, strict=True) if more <= own]
        alike = [varied(plan, activation_checkpointing=mode) for mode in modes]
        other = 2 if plan.gradient_accumulation_steps == 1 else plan.gradient_accumulation_steps
        known = [
            self.law.seconds(item, without_loss=loss is not plan.loss)
            for item in alike
            for loss in Loss
            for steps in (item.gradient_accumulation_steps, other)
            if self.is_prepared(
                varied(item, loss=loss, buckets=(like or plan).buckets, gradient_accumulation_steps=steps)
            )
        ]
        return max(known, default=0.0)

    def _regime(self, plan: Plan) -> tuple[object, ...]:
        """What one trace answers for: every batch above 1 and every length on one side of the tile."""
        kernels = plan.attention, plan.loss, plan.optimizer
        return self._key(plan, *kernels, plan.gradient_accumulation_steps)

    def _key(
        self, plan: Plan, attention: Attention, loss: Loss, optimizer: Optimizer, accumulation: int
    ) -> tuple[object, ...]:
        """The regime of a plan with other kernels, optimizer or accumulation."""
        over = loss is not Loss.PLAIN and plan.micro_batch_size * plan.max_length > self.law.tile
        knobs = plan.method, plan.rank, plan.activation_checkpointing, loss, optimizer
        return *knobs, attention, plan.micro_batch_size == 1, over, accumulation > 1


def job_with(
    memory_bytes: int, planner: PlannerSpec | None = None, batch: int = 8, length: int = 64
) -> JobSpec:
    return JobSpec(
        method=MethodSpec(rank=16),
        data=DataSpec(max_length=length),
        training=TrainingSpec(global_batch_size=batch),
        hardware=HardwareSpec(name="imagined", kind=DeviceKind.CUDA, memory_bytes=memory_bytes),
        planner=planner or PlannerSpec(headroom=0.0),
    )
