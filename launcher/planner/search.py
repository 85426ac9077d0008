"""The search: the fastest plan that fits, and a reason for every other one.

Speed has no model yet, so the order of plans is two plain rules: a plan that recomputes nothing is faster than
one that does (recomputation repeats the forward pass, about a third of a step), and among those a larger micro
batch is faster. Knobs that change the result are not ranked by speed: the job's own order decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.errors import ConfigError
from launcher.job import Attention, Checkpointing, JobSpec, Loss, Method, Objective
from launcher.memory import MemoryEstimate
from launcher.plan import Plan, PlanChoice, Rejection
from launcher.planner.forecast import Forecaster
from launcher.units import format_bytes

AUTO_HEADROOM = 0.05
"""Share of the usable memory that `planner.headroom=auto` keeps free: a convention until residuals of past runs
give an interval."""


def semantic_plans(job: JobSpec) -> Iterator[Plan]:
    """One plan per acceptable combination of the knobs that change the result, best first.

    Method comes before length, and length before rank; free knobs have their first value.
    """
    pin, choices = job.planner.pin, job.planner.choices
    methods = (pin.method,) if pin.method else choices.method or (job.method.name,)
    lengths = (pin.max_length,) if pin.max_length else choices.max_length or (job.data.max_length,)
    ranks = (pin.rank,) if pin.rank else choices.rank or (job.method.rank,)
    for method in methods:
        for length in lengths:
            for rank in ranks if method is Method.LORA else (0,):
                yield Plan(
                    method=method,
                    rank=rank,
                    max_length=length,
                    micro_batch_size=1,
                    gradient_accumulation_steps=job.training.global_batch_size,
                    activation_checkpointing=pin.activation_checkpointing or Checkpointing.NONE,
                    attention=pin.attention or Attention.SDPA,
                    loss=pin.loss or Loss.CHUNKED,
                    optimizer=job.training.optimizer,
                    precision=job.training.precision,
                )


def batch_splits(job: JobSpec) -> tuple[tuple[int, int], ...]:
    """Every (micro batch, accumulation) whose product is the global batch, smallest micro batch first.

    Raises:
        ConfigError: When pinned values do not divide the global batch.
    """
    total, pin = job.training.global_batch_size, job.planner.pin
    splits = tuple(
        (micro, total // micro)
        for micro in range(1, total + 1)
        if total % micro == 0
        and pin.micro_batch_size in (None, micro)
        and pin.gradient_accumulation_steps in (None, total // micro)
    )
    if not splits:
        raise ConfigError(
            f"micro batch {pin.micro_batch_size or 'any'} x accumulation "
            f"{pin.gradient_accumulation_steps or 'any'} can't make training.global_batch_size={total}",
            f"the product must be {total}: set training.global_batch_size, or unpin one of the two",
        )
    return splits


def headroom_bytes(job: JobSpec) -> int:
    """Bytes of the device that a plan must leave free."""
    share = job.planner.headroom
    fraction = AUTO_HEADROOM if isinstance(share, str) else share
    return round(fraction * job.hardware.memory_bytes)


def search(job: JobSpec, forecaster: Forecaster) -> PlanChoice:
    """Finds the best plan of a job.

    The first combination of result-changing knobs for which any plan fits is taken. The chosen plan and its
    runner-up are traced again at their true shapes.

    Raises:
        ConfigError: When pinned values contradict each other.
        UnsupportedByPlanner: When the tracer can't follow the job.
    """
    return _Search(job, forecaster).run()


class _Search:
    """State of one search: what was priced, and what was rejected."""

    def __init__(self, job: JobSpec, forecaster: Forecaster) -> None:
        self._job = job
        self._forecaster = forecaster
        self._splits = batch_splits(job)
        self._headroom = headroom_bytes(job)
        self._budget = job.hardware.memory_bytes - self._headroom
        self._rejected: list[Rejection] = []
        self._considered = 0

    def run(self) -> PlanChoice:
        semantics = list(semantic_plans(self._job))
        for position, semantic in enumerate(semantics):
            fitting = self._fitting(semantic)
            verified = self._verify(fitting)
            if verified:
                plan, estimate = verified[0]
                left = len(semantics) - position - 1
                return self._choice(verified, self._reason(plan, estimate, position, left))
        return self._choice([], self._why_none())

    def _fitting(self, semantic: Plan) -> list[Plan]:
        """Plans of one combination that fit, best first."""
        pinned = self._job.planner.pin.activation_checkpointing
        modes = (pinned,) if pinned else tuple(Checkpointing)
        self._forecaster.prepare(self._probe(semantic, mode) for mode in modes)
        fitting: list[Plan] = []
        for mode in modes:
            fitting += self._fitting_in(semantic, mode, better=fitting)
        if self._job.planner.objective is Objective.MEMORY:
            fitting.sort(key=lambda plan: self._forecaster.estimate(plan).peak_device_bytes)
        return fitting

    def _probe(self, semantic: Plan, mode: Checkpointing) -> Plan:
        """The plan priced first: without recomputation the smallest batch, which large models already fail."""
        splits = self._splits
        index = 0 if mode is Checkpointing.NONE else min(1, len(splits) - 1)
        return self._with(semantic, mode, splits[index])

    def _with(self, semantic: Plan, mode: Checkpointing, split: tuple[int, int]) -> Plan:
        return replace(
            semantic,
            activation_checkpointing=mode,
            micro_batch_size=split[0],
            gradient_accumulation_steps=split[1],
        )

    def _fitting_in(self, semantic: Plan, mode: Checkpointing, better: Sequence[Plan]) -> list[Plan]:
        """Plans of one checkpointing mode that fit, largest micro batch first; the rest is rejected."""
        plans = [self._with(semantic, mode, split) for split in self._splits]
        self._considered += len(plans)
        if better and self._job.planner.objective is Objective.SPEED and len(better) > 1:
            for plan in plans:
                self._reject_slower(plan, better[0])
            return []
        fitting: list[Plan] = []
        failed: tuple[Plan, int] | None = None
        for plan in self._ordered(plans):
            if failed is not None and plan.micro_batch_size > failed[0].micro_batch_size:
                if not self._forecaster.is_prepared(plan):
                    self._reject_like(plan, *failed)
                    continue
            if fitting and plan.micro_batch_size < fitting[-1].micro_batch_size:
                fitting.append(plan)  # needs less than one that fits; priced when it is verified
                continue
            bound = self._forecaster.lower_bound_bytes(plan)
            if bound > self._budget:
                self._reject_by_bound(plan, bound)
                continue
            short = self._forecaster.estimate(plan).peak_device_bytes - self._budget
            if short <= 0:
                fitting.append(plan)
            else:
                self._reject_too_large(plan)
                if failed is None or plan.micro_batch_size < failed[0].micro_batch_size:
                    failed = (plan, short)
        return sorted(fitting, key=lambda plan: -plan.micro_batch_size)

    def _ordered(self, plans: list[Plan]) -> list[Plan]:
        """Plans in the order in which pricing them needs the fewest traces: what is traced already comes first."""
        prepared = [plan for plan in plans if self._forecaster.is_prepared(plan)]
        rest = [plan for plan in plans if plan not in prepared]
        return sorted(prepared, key=lambda plan: -plan.micro_batch_size) + rest

    def _verify(self, fitting: list[Plan]) -> list[tuple[Plan, MemoryEstimate]]:
        """The best two that still fit when traced at their true shapes; the others are rejected."""
        self._forecaster.prepare(fitting[:2], exact=True)
        verified: list[tuple[Plan, MemoryEstimate]] = []
        for plan in fitting:
            if len(verified) == 2:
                self._reject_slower(plan, verified[0][0])
                continue
            estimate = self._forecaster.estimate(plan, exact=True)
            if estimate.peak_device_bytes <= self._budget:
                verified.append((plan, estimate))
            else:
                self._reject_too_large(plan, estimate)
        return verified

    def _reject_too_large(self, plan: Plan, estimate: MemoryEstimate | None = None) -> None:
        known = estimate or self._forecaster.estimate(plan)
        short = known.peak_device_bytes - self._budget
        peak = known.peak
        largest = max(peak.by_category_bytes, key=lambda name: peak.by_category_bytes[name])
        reason = (
            f"{peak.phase.value} needs {format_bytes(known.peak_device_bytes)}, "
            f"{format_bytes(short)} over the budget; {largest.value} take "
            f"{format_bytes(peak.by_category_bytes[largest])}"
        )
        self._rejected.append(Rejection(plan, reason, short, known.peak_device_bytes))

    def _reject_like(self, plan: Plan, smaller: Plan, short: int) -> None:
        reason = (
            f"needs more than micro batch {smaller.micro_batch_size}, which is already {format_bytes(short)} "
            "over the budget"
        )
        self._rejected.append(Rejection(plan, reason, short, short + self._budget))

    def _reject_by_bound(self, plan: Plan, bound: int) -> None:
        short = bound - self._budget
        reason = f"needs at least {format_bytes(bound)}, {format_bytes(short)} over the budget"
        self._rejected.append(Rejection(plan, reason, short, bound))

    def _reject_slower(self, plan: Plan, better: Plan) -> None:
        recomputes = plan.activation_checkpointing is not better.activation_checkpointing
        why = "recomputes activations" if recomputes else f"micro batch {plan.micro_batch_size}"
        known = self._forecaster.estimate(plan).peak_device_bytes if self._forecaster.is_prepared(plan) else 0
        reason = f"slower than the plan taken: {why} while micro batch {better.micro_batch_size} fits"
        self._rejected.append(Rejection(plan, reason, 0, known))

    def _choice(self, verified: Sequence[tuple[Plan, MemoryEstimate]], reason: str) -> PlanChoice:
        best, second = (*verified, (None, None), (None, None))[:2]
        rejected = list(self._rejected)
        if second[0] is not None and second[1] is not None:
            text = "the runner-up: fits, and is slower by the planner's rules"
            rejected.append(Rejection(second[0], text, 0, second[1].peak_device_bytes))
        return PlanChoice(
            plan=best[0],
            reason=reason,
            estimate=best[1],
            runner_up=second[0],
            runner_up_estimate=second[1],
            rejected=tuple(sorted(rejected, key=lambda item: item.short_by_bytes)),
            capacity_bytes=self._job.hardware.memory_bytes,
            headroom_bytes=self._headroom,
            num_considered=self._considered,
        )

    def _why_none(self) -> str:
        nearest = min(self._rejected, key=lambda item: item.short_by_bytes)
        plan = nearest.plan
        return (
            f"none of {self._considered} plans fits {format_bytes(self._budget)} "
            f"({format_bytes(self._job.hardware.memory_bytes)} less {format_bytes(self._headroom)} headroom); "
            f"the nearest is short by {format_bytes(nearest.short_by_bytes)}: {plan.method.value}, length "
            f"{plan.max_length}, micro batch {plan.micro_batch_size}, checkpointing "
            f"{plan.activation_checkpointing.value}"
        )


    def _reason(self, plan: Plan, estimate: MemoryEstimate, position: int, left: int) -> str:
        pin, free = self._job.planner.pin, self._budget - estimate.peak_device_bytes
        words = ["first choice of the job" if position == 0 else f"choice {position + 1} of the job's ordered lists"]
        if self._job.planner.objective is Objective.MEMORY:
            words.append("it needs the least memory")
        else:
            if pin.activation_checkpointing:
                words.append("checkpointing is pinned")
            elif plan.activation_checkpointing is Checkpointing.NONE:
                words.append("nothing is recomputed")
            else:
                words.append("activations are recomputed because no plan fits that keeps them")
            pinned = pin.micro_batch_size or pin.gradient_accumulation_steps
            size = f"micro batch {plan.micro_batch_size}"
            words.append(f"{size} is pinned" if pinned else f"{size} is the largest that fits")
        words.append(f"{format_bytes(free)} remain above the headroom")
        if left:
            words.append(f"{left} less wanted combinations were not priced")
        return "; ".join(words)
