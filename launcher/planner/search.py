"""The search: the best plan that fits, and a reason for every other one.

Knobs that change the result are not ranked: the job's own order decides. Among the others `planner.objective` decides
(objective.py); a plan that recomputes activations is taken only where the same micro batch doesn't fit without, and one
that recomputes all of them also where that is faster than recomputing some.

Prices cost traces, so some facts save some. A plan that recomputes more takes more time, which gives it a time that it
can't go below from traces of plans that recompute less. Among plans that accumulate gradients, a larger micro batch
needs more memory. The one plan that accumulates nothing (the whole batch at once) is outside that order, since it never
has gradients beside the activations of another micro batch; the forecaster gives it a lower bound. Plans are priced
until what is left can't be the best one, or as good; the runner-up is the next best of those that were priced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.job import Checkpointing, JobSpec
from launcher.memory import MemoryEstimate
from launcher.plan import Plan, PlanChoice, Rejection, nearest
from launcher.planner import reasons
from launcher.planner.arrangements import Arrangement, arrangements, with_ordinary_buckets
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.forecast import Forecaster
from launcher.planner.host import short_on_host
from launcher.planner.objective import MODES, Price, Ranking
from launcher.planner.options import Options, repeats
from launcher.planner.pins import OTHER_ENGINE
from launcher.planner.refusal import Judge
from launcher.planner.space import batch_splits, checkpointing_modes, headroom_bytes, semantic_plans


def search(job: JobSpec, forecaster: Forecaster, judge: Judge | None = None) -> PlanChoice:
    """Finds the best plan of a job.

    The first combination of result-changing knobs for which any plan fits is taken. The chosen plan is traced again at
    its true shape.

    Args:
        job: The job, resolved.
        forecaster: Prices its plans.
        judge: Refuses plans that fit; None: none is refused.

    Raises:
        ConfigError: When pinned values contradict each other.
        UnsupportedByPlanner: When the tracer can't follow the job.
    """
    return _Search(job, forecaster, judge).run()


class _Search:
    """State of one search: what was priced, and what was rejected."""

    def __init__(self, job: JobSpec, forecaster: Forecaster, judge: Judge | None) -> None:
        self._judge = judge
        self._job = job
        self._forecaster = forecaster
        self._splits = batch_splits(job)
        self._modes = checkpointing_modes(job)
        self._headroom = headroom_bytes(job)
        self._budget = job.hardware.memory_bytes - self._headroom
        self._ranking = Ranking(job.planner.objective, forecaster.knows_speed)
        self._rejected: list[Rejection] = []
        self._bounded: list[Plan] = []
        self._peaks: dict[Plan, int] = {}

    def run(self) -> PlanChoice:
        semantics = list(semantic_plans(self._job))
        for position, semantic in enumerate(semantics):
            best, second = self._best_arranged(semantic)
            if best is not None:
                left = len(semantics) - position - 1
                known = self._job, best, self._ranking, self._budget, position, left
                reason = reasons.taken(*known, self._rejected)
                return self._choice(best, second, reason)
        self._settle_nearest()
        found = nearest(self._rejected)
        if found is None:
            why = dict.fromkeys(item.reason for item in self._rejected)
            raise ConfigError("; ".join(why), OTHER_ENGINE)
        capacity = self._job.hardware.memory_bytes
        return self._choice(
            None, None, reasons.none_fits(found, len(self._rejected), capacity, self._headroom)
        )

    def _best_arranged(self, semantic: Plan) -> tuple[Price | None, Price | None]:
        """The best plan over all arrangements of the devices, at its true shape, and the next best one that was priced.

        What is sharded less exchanges less, so the arrangements after one that recomputes nothing are left out where no
        larger micro batch can make up for that, and those that offload after any that fits (unless memory counts: each
        needs less than those before it). Small buckets are for what makes ordinary ones recompute, or doesn't fit them.
        """
        possible, refused = arrangements(self._job, semantic)
        for item, reason in refused.items():
            self._reject(item.applied_to(semantic, self._job), reason, 0, 0)
        waiting, weighed = list(possible), list[Options]()
        exact: Price | None = None
        while exact is None:
            while waiting and not self._is_settled(weighed, waiting[0], semantic):
                options = self._options(waiting.pop(0).applied_to(semantic, self._job), weighed)
                self._settle(options, weighed)
                weighed.append(options)
            known = {id(price): options for options in weighed for price in self._contenders(options)}
            if not known:
                return None, None
            best = self._best(weighed)
            exact = self._verified(best, known[id(best)])
            if exact is None:
                self._settle(known[id(best)], weighed)
        for later in waiting:
            self._reject(later.applied_to(semantic, self._job), reasons.exchanges_more(later), 0, 0)
        others = [p for options in weighed for p in self._contenders(options) if p is not best]
        second = self._ranking.best(others) if others else None
        for options in weighed:
            self._reject_others(options, exact, (best, second))
        return exact, second

    def _options(self, semantic: Plan, weighed: Sequence[Options]) -> Options:
        """All plans of one arrangement that can be better than the like of those that shard less."""
        plans = []
        for mode in self._modes:
            of_mode = [self._with(semantic, mode, split) for split in self._splits]
            limits = engine_limits(self._job, of_mode[0])
            if limits:  # once, and not for every micro batch
                self._reject(of_mode[0], "; ".join(limits), 0, 0)
            else:
                plans += of_mode
        if self._ranking.by_memory:
            return Options(plans)
        promising = []
        for plan in plans:
            like = [
                price.plan for options in weighed for price in options.fitting if repeats(plan, price.plan)
            ]
            if like:
                self._reject(plan, reasons.shards_in_vain(plan, like[0]), 0, 0)
            else:
                promising.append(plan)
        return Options(promising)

    def _best(self, weighed: Sequence[Options]) -> Price:
        return self._ranking.best([price for options in weighed for price in self._contenders(options)])

    def _is_settled(self, weighed: Sequence[Options], following: Arrangement, semantic: Plan) -> bool:
        """Whether no arrangement that comes later can be better: the best one yet recomputes nothing, and is as fast.

        Host memory is for what doesn't fit without it: states that a CPU updates wait for it in every step.
        """
        if self._ranking.by_memory or not any(self._contenders(options) for options in weighed):
            return False
        if following.offloads:
            return True
        best = self._best(weighed)
        if best.plan.activation_checkpointing is not self._modes[0]:
            return False
        is_needless = following.small_buckets and not best.plan.has_small_buckets
        return is_needless or not self._may_be_faster(following.applied_to(semantic, self._job), best)

    def _may_be_faster(self, semantic: Plan, best: Price) -> bool:
        """Whether an arrangement that shards more may fit a larger micro batch, which may be faster than the best plan.

        It exchanges no less than the best plan's arrangement, so it takes at least as long with the same micro batch.
        """
        for split in self._splits:
            if split[0] > best.plan.micro_batch_size:
                like = self._with(best.plan, self._modes[0], split)
                floor = self._ranking.floor(like, self._forecaster.step_floor_seconds(like), 0)
                larger = self._with(semantic, self._modes[0], split)
                if (
                    self._ranking.within(floor) < self._ranking.value(best)
                    and self._lower_bound(larger) <= self._budget
                ):
                    return True
        return False

    def _reject_others(self, options: Options, exact: Price, taken: tuple[Price | None, ...]) -> None:
        """Says of all plans of an arrangement but the best two why they were not taken."""
        for price in options.fitting:
            if not any(price is item for item in taken):
                self._reject_worse(price, exact)
        for plan in options.unpriced:
            floor, is_out = self._floor(plan, options), self._is_out(plan, options)
            self._reject(plan, reasons.unpriced(plan, floor, exact, self._ranking, is_out), 0, 0)

    def _settle(self, options: Options, weighed: Sequence[Options]) -> None:
        """Prices plans until no other one can be the best, or as good; `weighed` are those of other arrangements."""
        while True:
            for plan in [plan for plan in options.unpriced if self._forecaster.is_prepared(plan)]:
                self._price(plan, options)
            self._drop_hopeless(options)
            known = [*weighed, options]
            values = [self._ranking.value(price) for item in known for price in self._contenders(item)]
            limit = self._ranking.within(min(values)) if values else math.inf
            promising = [
                plan
                for plan in options.unpriced
                if not self._is_out(plan, options) and self._floor(plan, options) <= limit
            ]
            if not promising:
                return
            self._price(min(promising, key=self._probing_order), options)

    def _price(self, plan: Plan, options: Options) -> None:
        options.unpriced.remove(plan)
        try:
            price = Price(plan, self._forecaster.estimate(plan), self._forecaster.step_time(plan))
        except UnsupportedByPlanner as failure:
            options.unpriced.append(plan)
            self._reject_mode(plan, options, failure)
            return
        self._peaks[plan] = price.estimate.peak_device_bytes
        if self._fits(price):
            options.fitting.append(price)
        elif plan.gradient_accumulation_steps > 1 and price.estimate.peak_device_bytes > self._budget:
            options.failed.append(price)

    def _reject_mode(self, plan: Plan, options: Options, failure: UnsupportedByPlanner) -> None:
        """Rejects all plans of an arrangement with a checkpointing that the tracer can't follow.

        Raises:
            UnsupportedByPlanner: When that keeps all activations; then it is not for the checkpointing.
        """
        mode = plan.activation_checkpointing
        if mode is self._modes[0]:
            raise failure
        for item in (*(price.plan for price in options.fitting), *options.unpriced):
            if item.activation_checkpointing is mode:
                self._reject(item, str(failure), 0, 0)
        options.fitting = [
            price for price in options.fitting if price.plan.activation_checkpointing is not mode
        ]
        options.unpriced = [item for item in options.unpriced if item.activation_checkpointing is not mode]

    def _fits(self, price: Price) -> bool:
        """Whether a plan fits; it is rejected when it doesn't."""
        estimate = price.estimate
        if estimate.peak_device_bytes > self._budget:
            self._reject_too_large(price.plan, estimate)
            return False
        short = short_on_host(estimate, self._job.hardware)
        if short > 0:
            text = reasons.too_large_on_host(estimate, short)
            self._reject(price.plan, text, short, estimate.peak_device_bytes)
            return False
        refusal = None if self._judge is None else self._judge(price.plan, estimate)
        if refusal is not None:
            peak, short = estimate.peak_device_bytes, refusal.short_by_bytes
            self._rejected.append(Rejection(price.plan, refusal.reason, short, peak, is_refused=True))
            return False
        return True

    def _verified(self, price: Price, options: Options) -> Price | None:
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

    def _probing_order(self, plan: Plan) -> tuple[int, bool, bool, int]:
        """Which of several promising plans is priced first: the one that tells most about the others.

        Of plans that keep all activations the smallest, which large models already fail; of the others one that
        accumulates more than one sequence, because its trace answers for all such, and gives times to all.
        """
        mode, micro = MODES.index(plan.activation_checkpointing), plan.micro_batch_size
        if self._ranking.by_memory:
            return -mode, False, False, micro
        return mode, plan.gradient_accumulation_steps == 1, mode > 0 and micro == 1, micro

    def _contenders(self, options: Options) -> list[Price]:
        """Plans that fit and may be taken."""
        if self._ranking.by_memory:
            return options.fitting
        return [price for price in options.fitting if not options.is_dominated(price.plan)]

    def _is_out(self, plan: Plan, options: Options) -> bool:
        return not self._ranking.by_memory and options.is_dominated(plan)

    def _floor(self, plan: Plan, options: Options) -> float:
        """A value that an unpriced plan does not go below."""
        if not self._ranking.by_memory:
            # with ordinary buckets the same but for copies into them, which the exchange outweighs
            likes = {None, with_ordinary_buckets(plan, self._job)}
            seconds = max(self._forecaster.step_floor_seconds(plan, like) for like in likes)
            return self._ranking.floor(plan, seconds, 0)
        bound = self._lower_bound(plan)
        if plan.gradient_accumulation_steps > 1:
            smaller = [
                price.estimate.peak_device_bytes
                for price in (*options.fitting, *options.failed)
                if price.plan.activation_checkpointing is plan.activation_checkpointing
                and price.plan.gradient_accumulation_steps > 1
                and price.plan.micro_batch_size < plan.micro_batch_size
            ]
            bound = max([bound, *smaller])
        return self._ranking.floor(plan, 0.0, bound)

    def _drop_hopeless(self, options: Options) -> None:
        """Rejects what can't fit, for what is known of others."""
        for plan in list(options.unpriced):
            same = [
                price
                for price in options.failed
                if price.plan.activation_checkpointing is plan.activation_checkpointing
            ]
            failed = min(same, key=lambda price: price.plan.micro_batch_size, default=None)
            accumulates = plan.gradient_accumulation_steps > 1
            if failed is not None and accumulates and plan.micro_batch_size > failed.plan.micro_batch_size:
                options.unpriced.remove(plan)
                short = failed.estimate.peak_device_bytes - self._budget
                self._reject(plan, reasons.like_smaller(failed.plan, short), short, short + self._budget)
                continue
            bound = self._bound(plan, None if failed is None else failed.plan)
            if bound > self._budget:
                options.unpriced.remove(plan)
                self._bounded.append(plan)
                self._reject(plan, reasons.by_bound(bound, self._budget), bound - self._budget, bound)

    def _with(self, semantic: Plan, mode: Checkpointing, split: tuple[int, int]) -> Plan:
        return replace(
            semantic,
            activation_checkpointing=mode,
            micro_batch_size=split[0],
            gradient_accumulation_steps=split[1],
        )

    def _bound(self, plan: Plan, failed: Plan | None) -> int:
        """A peak that an unpriced plan reaches at least; 0 when nothing is known.

        Without accumulation it is at least that of the smaller micro batch that failed, were that not accumulated either.
        """
        bound = self._lower_bound(plan)
        if failed is not None and plan.gradient_accumulation_steps == 1:
            smaller = replace(plan, micro_batch_size=failed.micro_batch_size)
            bound = max(bound, self._lower_bound(smaller))
        return bound

    def _lower_bound(self, plan: Plan) -> int:
        """A peak that the plan reaches at least, by what is known of it, and of the same plan with ordinary buckets."""
        bound = self._forecaster.lower_bound_bytes(plan)
        ordinary = with_ordinary_buckets(plan, self._job)
        if ordinary is None:
            return bound
        known = max(self._peaks.get(ordinary, 0), self._forecaster.lower_bound_bytes(ordinary))
        return max(bound, known - buckets_hold_bytes(ordinary, self._job.model.architecture))

    def _settle_nearest(self) -> None:
        """Prices the plan nearest to fitting for as long as only a lower bound of it is known."""
        while True:
            found = nearest(self._rejected)
            if found is None or found.plan not in self._bounded:
                return
            self._bounded.remove(found.plan)
            self._rejected.remove(found)
            self._reject_too_large(found.plan, self._forecaster.estimate(found.plan))

    def _reject(self, plan: Plan, reason: str, short_by_bytes: int, peak_bytes: int) -> None:
        self._peaks[plan] = max(peak_bytes, self._peaks.get(plan, 0))
        self._rejected.append(Rejection(plan, reason, short_by_bytes, peak_bytes))

    def _reject_worse(self, price: Price, best: Price) -> None:
        seconds = None if price.step is None else price.step.seconds
        text = reasons.worse(price, best, self._ranking)
        self._rejected.append(Rejection(price.plan, text, 0, price.estimate.peak_device_bytes, seconds))

    def _reject_too_large(self, plan: Plan, estimate: MemoryEstimate) -> None:
        peak = estimate.peak_device_bytes
        text = reasons.too_large(estimate, self._budget, keeps_logits=self._job.evaluation.keep_logits)
        self._reject(plan, text, peak - self._budget, peak)

    def _choice(self, best: Price | None, second: Price | None, reason: str) -> PlanChoice:
        rejected = list(self._rejected)
        if best is not None and second is not None:
            text = reasons.runner_up(second, best, self._ranking)
            seconds = None if second.step is None else second.step.seconds
            rejected.append(Rejection(second.plan, text, 0, second.estimate.peak_device_bytes, seconds))
        return PlanChoice(
            plan=None if best is None else best.plan,
            reason=reason,
            estimate=None if best is None else best.estimate,
            runner_up=None if second is None else second.plan,
            runner_up_estimate=None if second is None else second.estimate,
            rejected=tuple(sorted(rejected, key=lambda item: item.short_by_bytes)),
            capacity_bytes=self._job.hardware.memory_bytes,
            headroom_bytes=self._headroom,
            num_considered=len(rejected) + (best is not None),
            step=None if best is None else best.step,
            runner_up_step=None if second is None else second.step,
        )
