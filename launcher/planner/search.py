"""The search: the fastest plan that fits, and a reason for every other one.

Speed has no model yet, so the order of plans is two plain rules: a plan that recomputes nothing is faster than
one that does (recomputation repeats the forward pass, about a third of a step), and among those a larger micro
batch is faster. Knobs that change the result are not ranked by speed: the job's own order decides.

Prices cost traces, so three facts save some. Among plans that accumulate gradients, a larger micro batch needs
more. The one plan that accumulates nothing (the whole batch at once) is outside that order, since it never has
gradients beside the activations of another micro batch; the forecaster gives it a lower bound. And what is slower
than two plans that fit is priced only when that takes no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.errors import ConfigError
from launcher.hardware import DeviceKind
from launcher.job import Checkpointing, JobSpec, Objective
from launcher.memory import MemoryEstimate, Phase
from launcher.plan import Plan, PlanChoice, Rejection, nearest
from launcher.planner.arrangements import arrangements
from launcher.planner.forecast import Forecaster
from launcher.planner.space import batch_splits, headroom_bytes, semantic_plans
from launcher.units import format_bytes

MODES = (Checkpointing.NONE, Checkpointing.FULL)
"""Checkpointing modes that the search weighs, fastest first; others have to be pinned until speed has a model."""
NOT_PRICED = "; not priced"
"""Remark on a plan that may fit or not: it is slower in any case."""
_Priced = tuple[Plan, MemoryEstimate]


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
        pinned = job.planner.pin.activation_checkpointing
        self._modes = (pinned,) if pinned else MODES
        self._headroom = headroom_bytes(job)
        self._budget = job.hardware.memory_bytes - self._headroom
        self._by_memory = job.planner.objective is Objective.MEMORY
        self._rejected: list[Rejection] = []
        self._bounded: list[Plan] = []
        self._considered = 0

    def run(self) -> PlanChoice:
        semantics = list(semantic_plans(self._job))
        for position, semantic in enumerate(semantics):
            verified = self._best_arranged(semantic)
            if verified:
                plan, estimate = verified[0]
                left = len(semantics) - position - 1
                return self._choice(verified, self._reason(plan, estimate, position, left))
        self._settle_nearest()
        return self._choice([], self._why_none())

    def _best_arranged(self, semantic: Plan) -> list[_Priced]:
        """The best two plans over all arrangements of the devices.

        What is sharded less exchanges less, so a later arrangement is taken only where it recomputes less (or, when
        memory counts, needs less).
        """
        possible, refused = arrangements(self._job, semantic)
        for item, reason in refused.items():
            self._rejected.append(Rejection(item.applied_to(semantic, self._job), reason, 0, 0))
        best: list[_Priced] = []
        for number, item in enumerate(possible):
            arranged = item.applied_to(semantic, self._job)
            if best and not self._by_memory and best[0][0].activation_checkpointing is self._modes[0]:
                for later in possible[number:]:
                    text = f"{later.words()} exchanges no less than what fits with nothing recomputed{NOT_PRICED}"
                    self._rejected.append(Rejection(later.applied_to(semantic, self._job), text, 0, 0))
                break
            found = self._best_two(arranged)
            if best and found:
                found, best = (found, best) if self._is_better(found[0], best[0]) else (best, found)
                for plan, estimate in best:
                    text = self._why_worse((plan, estimate), found[0])
                    self._rejected.append(Rejection(plan, text, 0, estimate.peak_device_bytes))
            best = found or best
        return best

    def _is_better(self, one: _Priced, other: _Priced) -> bool:
        """Whether a plan of a later arrangement is better than one of an earlier one."""
        if self._by_memory:
            return one[1].peak_device_bytes < other[1].peak_device_bytes
        return self._modes.index(one[0].activation_checkpointing) < self._modes.index(
            other[0].activation_checkpointing
        )

    def _why_worse(self, one: _Priced, taken: _Priced) -> str:
        if self._by_memory:
            more = one[1].peak_device_bytes - taken[1].peak_device_bytes
            return f"fits, and needs {format_bytes(more)} more than the plan taken"
        if one[0].activation_checkpointing is taken[0].activation_checkpointing:
            return "fits, and exchanges more than the plan taken"
        return "fits, and recomputes activations, which the plan taken does not"

    def _best_two(self, semantic: Plan) -> list[_Priced]:
        """The best two plans of one combination that fit at their true shapes; every other one is rejected."""
        self._considered += len(self._modes) * len(self._splits)
        self._forecaster.prepare(self._probe(semantic, mode) for mode in self._modes)
        unseen = list(self._modes)
        fitting: list[Plan] = []
        verified: list[_Priced] = []
        while len(verified) < 2:
            while unseen and (self._by_memory or len(verified) + len(fitting) < 2):
                fitting += self._fitting_in(semantic, unseen.pop(0))
            if not fitting:
                return verified
            if self._by_memory:
                fitting.sort(key=lambda plan: self._forecaster.estimate(plan).peak_device_bytes)
            self._forecaster.prepare(fitting[: 2 - len(verified)], exact=True)
            plan = fitting.pop(0)
            estimate = self._forecaster.estimate(plan, exact=True)
            if estimate.peak_device_bytes > self._budget:
                self._reject_too_large(plan, estimate)
            elif self._short_on_host(estimate) > 0:
                self._reject_on_host(plan, estimate)
                # batches hardly count in host memory: what is left of this combination needs as much
                for rest in fitting:
                    self._reject_on_host(rest, estimate)
                fitting.clear()
            else:
                verified.append((plan, estimate))
        for plan in fitting:
            self._reject_worse(plan, verified[0])
        for mode in unseen:
            self._reject_unseen(semantic, mode, verified[0])
        return verified

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

    def _fitting_in(self, semantic: Plan, mode: Checkpointing) -> list[Plan]:
        """Plans of one checkpointing mode that fit, largest micro batch first; the rest is rejected.

        A plan that needs less than one that fits is not priced here; it is when it is verified.
        """
        fitting: list[Plan] = []
        failed: tuple[Plan, int] | None = None
        for plan in self._ordered([self._with(semantic, mode, split) for split in self._splits]):
            accumulates = plan.gradient_accumulation_steps > 1
            if accumulates and any(
                fit.gradient_accumulation_steps > 1 and plan.micro_batch_size < fit.micro_batch_size
                for fit in fitting
            ):
                fitting.append(plan)
                continue
            exceeds = failed is not None and plan.micro_batch_size > failed[0].micro_batch_size
            if failed and exceeds and accumulates and not self._forecaster.is_prepared(plan):
                self._reject_like(plan, *failed)
                continue
            bound = self._bound(plan, failed[0] if failed else None)
            if bound > self._budget:
                self._reject_by_bound(plan, bound)
                continue
            short = self._forecaster.estimate(plan).peak_device_bytes - self._budget
            if short <= 0:
                fitting.append(plan)
                continue
            self._reject_too_large(plan)
            if accumulates and (failed is None or plan.micro_batch_size < failed[0].micro_batch_size):
                failed = (plan, short)
        return sorted(fitting, key=lambda plan: -plan.micro_batch_size)

    def _ordered(self, plans: list[Plan]) -> list[Plan]:
        """Plans in the order in which pricing them needs the fewest traces: what is traced already comes first."""
        prepared = [plan for plan in plans if self._forecaster.is_prepared(plan)]
        rest = [plan for plan in plans if plan not in prepared]
        return sorted(prepared, key=lambda plan: -plan.micro_batch_size) + rest

    def _bound(self, plan: Plan, failed: Plan | None) -> int:
        """A peak that an unpriced plan without accumulation reaches at least; 0 when nothing is known.

        It is at least that of the smaller micro batch that failed, were that not accumulated either.
        """
        if self._forecaster.is_prepared(plan):
            return 0
        bound = self._forecaster.lower_bound_bytes(plan)
        if failed is not None and plan.gradient_accumulation_steps == 1:
            smaller = replace(plan, micro_batch_size=failed.micro_batch_size)
            bound = max(bound, self._forecaster.lower_bound_bytes(smaller))
        return bound

    def _settle_nearest(self) -> None:
        """Prices the plan nearest to fitting for as long as only a lower bound of it is known."""
        while True:
            found = nearest(self._rejected)
            if found is None or found.plan not in self._bounded:
                return
            self._bounded.remove(found.plan)
            self._rejected.remove(found)
            self._reject_too_large(found.plan)

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
        if peak.phase is Phase.EVALUATION and self._job.evaluation.keep_logits:
            reason += "; evaluation.keep_logits=true keeps those of all held-out examples"
        self._rejected.append(Rejection(plan, reason, short, known.peak_device_bytes))

    def _short_on_host(self, estimate: MemoryEstimate) -> int:
        """Bytes by which a plan exceeds the host memory; 0 where that is not known, or is the device's own."""
        hardware = self._job.hardware
        if estimate.host is None or not hardware.host_memory_bytes or hardware.kind is DeviceKind.CPU:
            return 0
        return max(0, estimate.host.peak_bytes - hardware.host_memory_bytes)

    def _reject_on_host(self, plan: Plan, estimate: MemoryEstimate) -> None:
        assert estimate.host is not None  # it was found too large
        short = self._short_on_host(estimate)
        parts = estimate.host.by_category_bytes
        largest = max(parts, key=lambda name: parts[name])
        reason = (
            f"needs {format_bytes(estimate.host.peak_bytes)} of host memory, {format_bytes(short)} more than there "
            f"is; {largest} take {format_bytes(parts[largest])}"
        )
        self._rejected.append(Rejection(plan, reason, short, estimate.peak_device_bytes))

    def _reject_like(self, plan: Plan, smaller: Plan, short: int) -> None:
        reason = (
            f"needs more than micro batch {smaller.micro_batch_size}, which is already {format_bytes(short)} "
            "over the budget"
        )
        self._rejected.append(Rejection(plan, reason, short, short + self._budget))

    def _reject_by_bound(self, plan: Plan, bound: int) -> None:
        short = bound - self._budget
        reason = f"needs at least {format_bytes(bound)}, {format_bytes(short)} over the budget"
        self._bounded.append(plan)
        self._rejected.append(Rejection(plan, reason, short, bound))

    def _reject_unseen(self, semantic: Plan, mode: Checkpointing, best: _Priced) -> None:
        """Rejects a whole mode that is slower than the two plans found."""
        for split in self._splits:
            plan = self._with(semantic, mode, split)
            bound = self._bound(plan, None)
            if bound > self._budget:
                self._reject_by_bound(plan, bound)
            else:
                self._reject_worse(plan, best, "" if self._is_cheap(plan) else NOT_PRICED)

    def _reject_worse(self, plan: Plan, best: _Priced, remark: str = "") -> None:
        """Rejects a plan that ranks below the two plans found."""
        known = self._forecaster.estimate(plan).peak_device_bytes if self._is_cheap(plan) else 0
        better, estimate = best
        if known > self._budget:
            self._reject_too_large(plan)
            return
        if self._by_memory:
            reason = (
                f"fits, and needs {format_bytes(known - estimate.peak_device_bytes)} more than the plan taken"
            )
        else:
            recomputes = plan.activation_checkpointing is not better.activation_checkpointing
            why = "recomputes activations" if recomputes else f"micro batch {plan.micro_batch_size}"
            reason = (
                f"slower than the plan taken: {why} while micro batch {better.micro_batch_size} fits{remark}"
            )
        self._rejected.append(Rejection(plan, reason, 0, known))

    def _is_cheap(self, plan: Plan) -> bool:
        return self._by_memory or self._forecaster.is_prepared(plan)

    def _choice(self, verified: Sequence[_Priced], reason: str) -> PlanChoice:
        best, second = (*verified, (None, None), (None, None))[:2]
        rejected = list(self._rejected)
        if second[0] is not None and second[1] is not None:
            worse = "needs more memory" if self._by_memory else "is slower by the planner's rules"
            text = f"the runner-up: fits, and {worse}"
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
        found = nearest(self._rejected)
        if found is None:
            reasons = dict.fromkeys(item.reason for item in self._rejected)
            raise ConfigError("; ".join(reasons), "another planner.pin.engine or planner.pin.zero_stage")
        plan = found.plan
        return (
            f"none of {self._considered} plans fits {format_bytes(self._budget)} "
            f"({format_bytes(self._job.hardware.memory_bytes)} less {format_bytes(self._headroom)} headroom); "
            f"the nearest is short by {format_bytes(found.short_by_bytes)}: {plan.method.value}, length "
            f"{plan.max_length}, micro batch {plan.micro_batch_size}, checkpointing "
            f"{plan.activation_checkpointing.value}"
        )

    def _reason(self, plan: Plan, estimate: MemoryEstimate, position: int, left: int) -> str:
        pin, free = self._job.planner.pin, self._budget - estimate.peak_device_bytes
        words = [
            "first choice of the job"
            if position == 0
            else f"choice {position + 1} of the job's ordered lists"
        ]
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
