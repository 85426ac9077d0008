"""Prices the plans of a search, as few as decide it: bounds from traces that exist show that the others can't win."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.job import Checkpointing, JobSpec, Loss
from launcher.memory import Category, MemoryEstimate
from launcher.plan import Plan, Rejection, varied
from launcher.planner import reasons
from launcher.planner.arrangements import is_last_resort, with_ordinary_buckets
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.forecast import Forecaster
from launcher.planner.hopeless import Known, Sieve, is_unexplored, on_host
from launcher.planner.host import short_on_host, short_on_nvme
from launcher.planner.objective import MODES, Price, Ranking
from launcher.planner.options import Options
from launcher.planner.refusal import Judge
from launcher.planner.rejections import RejectionLog
from launcher.planner.space import attentions, checkpointing_modes, headroom_bytes, losses, optimizers

ACCUMULATED = (Category.GRADIENTS, Category.TEMPORARIES)
"""What a plan that offloads holds on the host to accumulate gradients; of what pins it nobody knows its part."""


class Pricing:
    """What was priced and what was rejected, in one search.

    Args:
        job: The job, resolved.
        forecaster: Prices its plans.
        judge: Refuses plans that fit; None: none is refused.
    """

    def __init__(self, job: JobSpec, forecaster: Forecaster, judge: Judge | None) -> None:
        self._job = job
        self._forecaster = forecaster
        self._judge = judge
        self._first_mode = checkpointing_modes(job)[0]
        self.budget_bytes = job.hardware.memory_bytes - headroom_bytes(job)
        self.ranking = Ranking(job.planner.objective, forecaster.knows_speed)
        self.rejected = RejectionLog()
        self._bounded: set[Plan] = set()
        self._priced: set[Plan] = set()
        self._refused_losses: dict[Loss, str] = {}
        self._peaks: dict[Plan, int] = {}
        self._host_floors: dict[tuple[object, ...], int] = {}
        known = Known(self.budget_bytes, self.rejected, self._host_floors, self._refused_losses, self._peaks)
        self.sieve = Sieve(job, forecaster, known)

    def settle(self, options: Options, weighed: Sequence[Options], rival: Price | None = None) -> None:
        """Prices plans until no other one can be the best, or as good.

        Args:
            options: The plans.
            weighed: Those of other arrangements.
            rival: A plan with another loss or optimizer that fits; None: there is none.
        """
        while True:
            for plan in [plan for plan in options.unpriced if self._forecaster.is_prepared(plan)]:
                self._price(plan, options)
            self._drop_hopeless(options)
            known = [*weighed, options]
            values = [self.ranking.value(price) for item in known for price in self.contenders(item)]
            limit = self.ranking.within(min(values)) if values else math.inf
            promising = [
                plan
                for plan in options.unpriced
                if not self.is_out(plan, options)
                and (floor := self.floor(plan, options)) <= limit
                and self._betters(plan, floor, rival)
            ]
            if not promising:
                return
            first = self._tells_of_host(promising, options)
            self._price(first or min(promising, key=self._probing_order), options)

    def _price(self, plan: Plan, options: Options) -> None:
        options.unpriced.remove(plan)
        try:
            price = Price(plan, self._forecaster.estimate(plan), self._forecaster.step_time(plan))
        except UnsupportedByPlanner as failure:
            options.unpriced.append(plan)
            self._reject_mode(plan, options, failure)
            return
        except ConfigError as failure:  # a kernel that the model has not
            if self._is_first(plan):
                raise
            self._refused_losses[plan.loss] = failure.message
            self.reject(plan, failure.message, 0, 0)
            return
        self._peaks[plan] = price.estimate.peak_device_bytes
        self._priced.add(plan)
        if (plan.uses_offload or plan.uses_pages) and price.estimate.host is not None:
            host = price.estimate.host
            self._keep_host_floor(plan, host.lasting_bytes())
            if plan.gradient_accumulation_steps > 1:
                # one that accumulates nothing has no gradients there, nor what pins them
                at_once = replace(plan, gradient_accumulation_steps=1)
                self._keep_host_floor(at_once, host.lasting_bytes(ACCUMULATED))
        if self._fits(price):
            options.fitting.append(price)
        elif plan.gradient_accumulation_steps > 1 and price.estimate.peak_device_bytes > self.budget_bytes:
            options.failed.append(price)

    def _is_first(self, plan: Plan) -> bool:
        """Whether a plan has the kernels and the optimizer's implementation that are taken unless others are better."""
        firsts = attentions(self._job)[0], losses(self._job)[0], optimizers(self._job)[0]
        return (plan.attention, plan.loss, plan.optimizer) == firsts

    def _keep_host_floor(self, plan: Plan, num_bytes: int) -> None:
        self._host_floors[on_host(plan)] = max(num_bytes, self._host_floors.get(on_host(plan), 0))

    def _reject_mode(self, plan: Plan, options: Options, failure: UnsupportedByPlanner) -> None:
        """Rejects all plans of an arrangement with a checkpointing that the tracer can't follow.

        Raises:
            UnsupportedByPlanner: When that keeps all activations; then it is for none of the three knobs.
        """
        mode = plan.activation_checkpointing
        if mode is self._first_mode and self._is_first(plan) and not is_last_resort(self._job, plan):
            raise failure
        for item in (*(price.plan for price in options.fitting), *options.unpriced):
            if item.activation_checkpointing is mode:
                self.reject(item, str(failure), 0, 0)
        options.fitting = [
            price for price in options.fitting if price.plan.activation_checkpointing is not mode
        ]
        options.unpriced = [item for item in options.unpriced if item.activation_checkpointing is not mode]

    def _fits(self, price: Price) -> bool:
        """Whether a plan fits; it is rejected when it doesn't."""
        estimate = price.estimate
        short = short_on_host(estimate, self._job.hardware)
        if short > 0:  # a larger device would not help
            text = reasons.too_large_on_host(estimate, short)
            self.reject(price.plan, text, short, estimate.peak_device_bytes, is_host_short=True)
            return False
        short = short_on_nvme(estimate, self._job.hardware)
        if short > 0 and estimate.nvme is not None:
            text = reasons.too_large_on_nvme(estimate.nvme.file_bytes, short)
            self.reject(price.plan, text, short, estimate.peak_device_bytes, is_nvme_short=True)
            return False
        if estimate.peak_device_bytes > self.budget_bytes:
            self._reject_too_large(price.plan, estimate)
            return False
        refusal = None if self._judge is None else self._judge(price.plan, estimate)
        if refusal is not None:
            peak, short = estimate.peak_device_bytes, refusal.short_by_bytes
            self.rejected.append(Rejection(price.plan, refusal.reason, short, peak, is_refused=True))
            return False
        return True

    def verified(self, price: Price, options: Options) -> Price | None:
        """A plan at its true shape; None, and rejected, when it doesn't fit or can't be traced there."""
        plan = price.plan
        try:
            estimate = self._forecaster.estimate(plan, exact=True)
            exact = Price(plan, estimate, self._forecaster.step_time(plan, exact=True))
        except UnsupportedByPlanner as failure:
            self._reject_mode(plan, options, failure)
            return None
        if self._fits(exact):
            return exact
        options.fitting.remove(price)
        return None

    def _tells_of_host(self, promising: Sequence[Plan], options: Options) -> Plan | None:
        """The first plan to be priced of those that offload: it is likely to fit the device, and tells whether all that
        lies on the host does, which is the same whatever is recomputed."""
        full = [plan for plan in promising if plan.activation_checkpointing is Checkpointing.FULL]
        is_begun = options.fitting or options.failed
        if is_begun or not full or not full[0].uses_offload or on_host(full[0]) in self._host_floors:
            return None
        return min(full, key=lambda plan: (plan.gradient_accumulation_steps == 1, plan.micro_batch_size))

    def _probing_order(self, plan: Plan) -> tuple[int, bool, bool, int]:
        """Which of several promising plans is priced first: the one that tells most about the others.

        Of plans that keep all activations the smallest, which large models already fail; of the others one that
        accumulates more than one sequence, because its trace answers for all such, and gives times to all.
        """
        mode, micro = MODES.index(plan.activation_checkpointing), plan.micro_batch_size
        if self.ranking.by_memory:
            return -mode, False, False, micro
        return mode, plan.gradient_accumulation_steps == 1, mode > 0 and micro == 1, micro

    def betters(self, price: Price, rival: Price | None) -> bool:
        """Whether a plan is taken in place of one with another loss or optimizer: it is faster, or smaller, beyond doubt.

        Host memory is for what doesn't fit without it.
        """
        return self._betters(price.plan, self.ranking.value(price), rival)

    def _betters(self, plan: Plan, value: float, rival: Price | None) -> bool:
        if rival is None:
            return True
        if not self.ranking.by_memory and rival.plan.uses_offload is not plan.uses_offload:
            return rival.plan.uses_offload
        if not self.ranking.by_memory and rival.plan.uses_pages is not plan.uses_pages:
            return rival.plan.uses_pages
        return self.ranking.within(value) < self.ranking.value(rival)

    def contenders(self, options: Options) -> list[Price]:
        """Plans that fit and may be taken."""
        if self.ranking.by_memory:
            return options.fitting
        return [price for price in options.fitting if not options.is_dominated(price.plan)]

    def is_out(self, plan: Plan, options: Options) -> bool:
        """Whether a plan is not taken whatever its price."""
        return not self.ranking.by_memory and options.is_dominated(plan)

    def floor(self, plan: Plan, options: Options) -> float:
        """A value that an unpriced plan does not go below."""
        if not self.ranking.by_memory:
            # with ordinary buckets the same but for copies into them, which the exchange outweighs
            likes = {None, with_ordinary_buckets(plan, self._job)}
            seconds = max(self._forecaster.step_floor_seconds(plan, like) for like in likes)
            return self.ranking.floor(plan, seconds, 0)
        bound = self.lower_bound(plan)
        if plan.gradient_accumulation_steps > 1:
            smaller = [
                price.estimate.peak_device_bytes
                for price in (*options.fitting, *options.failed)
                if price.plan.activation_checkpointing is plan.activation_checkpointing
                and price.plan.gradient_accumulation_steps > 1
                and price.plan.micro_batch_size < plan.micro_batch_size
            ]
            bound = max([bound, *smaller])
        return self.ranking.floor(plan, 0.0, bound)

    def _drop_hopeless(self, options: Options) -> None:
        """Rejects what can't fit, for what is known of others."""
        for plan in list(options.unpriced):
            if plan.loss in self._refused_losses:
                options.unpriced.remove(plan)
                self.reject(plan, self._refused_losses[plan.loss], 0, 0)
                continue
            needed = max(self._forecaster.host_floor_bytes(plan), self._host_floors.get(on_host(plan), 0))
            if 0 < self._job.hardware.host_memory_bytes < needed:
                options.unpriced.remove(plan)
                text = reasons.by_host_bound(needed, self._job.hardware.host_memory_bytes)
                short = needed - self._job.hardware.host_memory_bytes
                self.reject(plan, text, short, 0, is_host_short=True)
                continue
            same = [
                price
                for price in options.failed
                if price.plan.activation_checkpointing is plan.activation_checkpointing
            ]
            failed = min(same, key=lambda price: price.plan.micro_batch_size, default=None)
            accumulates = plan.gradient_accumulation_steps > 1
            if failed is not None and accumulates and plan.micro_batch_size > failed.plan.micro_batch_size:
                options.unpriced.remove(plan)
                short = failed.estimate.peak_device_bytes - self.budget_bytes
                self.reject(plan, reasons.like_smaller(failed.plan, short), short, short + self.budget_bytes)
                continue
            smaller = [(like, least) for like, least in options.bounded if _is_larger(plan, like)]
            alike = failed.plan if failed is not None else next((like for like, _ in smaller), None)
            bound = self._bound(plan, alike)
            if accumulates:  # a smaller micro batch needs less
                bound = max([bound, *(least for _, least in smaller)])
            if bound > self.budget_bytes:
                options.unpriced.remove(plan)
                options.bounded += [(plan, bound)] if accumulates else []
                self._bounded.add(plan)
                text, short = reasons.by_bound(bound, self.budget_bytes), bound - self.budget_bytes
                self.reject(plan, text, short, bound, is_unexplored=is_unexplored(self._job, plan))

    def _bound(self, plan: Plan, failed: Plan | None) -> int:
        """A peak that an unpriced plan reaches at least; 0 when nothing is known.

        Without accumulation it is at least that of the smaller micro batch that failed, were that not accumulated either.
        """
        bound = self.lower_bound(plan)
        if failed is not None and plan.gradient_accumulation_steps == 1:
            smaller = varied(plan, micro_batch_size=failed.micro_batch_size)
            bound = max(bound, self.lower_bound(smaller))
        return bound

    def lower_bound(self, plan: Plan) -> int:
        """A peak that the plan reaches at least, by what is known of it, and of the same plan with ordinary buckets."""
        bound = self._forecaster.lower_bound_bytes(plan)
        ordinary = with_ordinary_buckets(plan, self._job)
        if ordinary is None:
            return bound
        priced = max(self._peaks.get(ordinary, 0), self.rejected.peak_bytes(ordinary))
        known = max(priced, self._forecaster.lower_bound_bytes(ordinary))
        return max(bound, known - buckets_hold_bytes(ordinary, self._job.model.architecture))

    def settle_nearest(self) -> None:
        """Prices the plan nearest to fitting for as long as only a lower bound of it is known.

        A plan that saves less of the activations is not nearer than the same one that saves more.
        """
        while True:
            found = self.rejected.nearest()
            if found is None or not self._is_bounded(found.plan):
                return
            saver = self._most_saving(found.plan)
            if self._is_priced(saver):
                self._bounded.discard(found.plan)
                self.rejected.set_unexplored(found.plan)
                continue
            self._bounded.discard(saver)
            self.rejected.remove(saver)
            self._fits(Price(saver, self._forecaster.estimate(saver), None))
            self._priced.add(saver)

    def _is_bounded(self, plan: Plan) -> bool:
        """Whether a plan exceeds the device by no more than a bound of it."""
        found = self.rejected.run_of(plan)
        return plan in self._bounded or (found is not None and found.is_bound)

    def _is_priced(self, plan: Plan) -> bool:
        found = self.rejected.run_of(plan)
        return plan in self._priced or (found is not None and found.is_priced)

    def _most_saving(self, plan: Plan) -> Plan:
        """The same plan with the checkpointing that saves most, of those that exceed the device."""
        alike = [varied(plan, activation_checkpointing=mode) for mode in reversed(MODES)]
        return next(like for like in alike if self._is_priced(like) or self._is_bounded(like))

    def reject(self, plan: Plan, reason: str, short_by_bytes: int, peak_bytes: int, **flags: bool) -> None:
        """Writes down why a plan is not taken."""
        self._peaks[plan] = max(peak_bytes, self._peaks.get(plan, 0))
        item = Rejection(plan, reason, short_by_bytes, peak_bytes, **flags)
        self.rejected.append(item)

    def reject_worse(self, price: Price, best: Price) -> None:
        """Writes down that a plan that fits is worse than the plan taken."""
        seconds = None if price.step is None else price.step.seconds
        text = reasons.worse(price, best, self.ranking)
        self.rejected.append(Rejection(price.plan, text, 0, price.estimate.peak_device_bytes, seconds))

    def _reject_too_large(self, plan: Plan, estimate: MemoryEstimate) -> None:
        peak = estimate.peak_device_bytes
        text = reasons.too_large(estimate, self.budget_bytes, keeps_logits=self._job.evaluation.keep_logits)
        self.reject(plan, text, peak - self.budget_bytes, peak)


def _is_larger(plan: Plan, like: Plan) -> bool:
    """Whether a plan has a larger micro batch than another one with the same checkpointing."""
    return (
        plan.activation_checkpointing is like.activation_checkpointing
        and plan.micro_batch_size > like.micro_batch_size
    )
