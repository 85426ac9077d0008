"""The search: the best plan that fits, and a reason for every other one.

Knobs that change the result are not ranked: the job's own order decides. Among the others `planner.objective` decides
(objective.py); a plan that recomputes activations is taken only where the same micro batch doesn't fit without, and one
that recomputes all of them also where that is faster than recomputing some.

Prices cost traces, so some facts save some. A plan that recomputes more takes more time, which gives it a time that it
can't go below from traces of plans that recompute less. Among plans that accumulate gradients, a larger micro batch
needs more memory. The one plan that accumulates nothing (the whole batch at once) is outside that order, since it never
has gradients beside the activations of another micro batch; the forecaster gives it a lower bound. Plans are priced
until what is left can't be the best one, or as good (pricing.py); the runner-up is the next best of those that were
priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError, UnsupportedByPlanner
from launcher.job import Checkpointing, JobSpec
from launcher.plan import Plan, PlanChoice, Rejection, varied
from launcher.planner import reasons
from launcher.planner.arrangements import WAITING, Arrangement, arrangement_of, arrangements, rounds
from launcher.planner.forecast import Forecaster
from launcher.planner.group import Group
from launcher.planner.objective import Price
from launcher.planner.options import Options, repeats
from launcher.planner.pins import OTHER_ENGINE
from launcher.planner.pricing import Pricing
from launcher.planner.refusal import Judge
from launcher.planner.space import (
    attentions,
    batch_splits,
    checkpointing_modes,
    headroom_bytes,
    losses,
    optimizers,
    semantic_plans,
)


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


@dataclass
class _Pass:
    """The arrangements of the devices with one loss and one implementation of the optimizer."""

    semantic: Plan
    """The combination of the other knobs, with both."""
    waiting: list[Arrangement]
    """Arrangements that were not weighed yet."""
    weighed: list[Options]
    """The plans of those that were."""


def _is_beyond(following: Arrangement, fitting: Arrangement) -> bool:
    """Whether what waits for host memory comes after something like it that fits with another loss."""
    return WAITING.index(following) > WAITING.index(fitting)


class _Search:
    """One search."""

    def __init__(self, job: JobSpec, forecaster: Forecaster, judge: Judge | None) -> None:
        self._job = job
        self._forecaster = forecaster
        self._splits = batch_splits(job)
        self._modes = checkpointing_modes(job)
        self._prices = Pricing(job, forecaster, judge)
        self._ranking = self._prices.ranking

    def run(self) -> PlanChoice:
        semantics = list(semantic_plans(self._job))
        rejected, budget_bytes = self._prices.rejected, self._prices.budget_bytes
        for candidates, (position, semantic) in product(rounds(self._job), enumerate(semantics)):
            best, second = self._best(semantic, candidates)
            if best is not None:
                left = len(semantics) - position - 1
                known = self._job, best, self._ranking, budget_bytes, position, left
                return self._choice(best, second, reasons.taken(*known, rejected.of_job(best.plan)))
        self._prices.settle_nearest()
        found = rejected.nearest()
        if found is None:
            why = dict.fromkeys(item.reason for item in rejected.written_out())
            raise ConfigError("; ".join(why), OTHER_ENGINE)
        capacity = self._job.hardware.memory_bytes
        headroom = headroom_bytes(self._job)
        return self._choice(None, None, reasons.none_fits(found, len(rejected), capacity, headroom))

    def _best(self, semantic: Plan, candidates: Sequence[Arrangement]) -> tuple[Price | None, Price | None]:
        """The best plan of a combination at its true shape in one round, and the next best one that was priced.

        The first loss stays unless a plan with another one is better beyond doubt: a trace with that is worth its time
        only where it may be. States are paged only where nothing fits without.
        """
        kinds = self._kinds(semantic)
        passes: list[_Pass] = []
        exact: Price | None = None
        while exact is None:
            taken: Price | None = None
            for index, kind in enumerate(kinds):
                if taken is not None and self._pages_in_vain(kind, taken.plan):
                    continue
                if index == len(passes):
                    passes.append(self._pass(kind, candidates))
                taken = self._best_arranged(passes[index], taken) or taken
            if taken is None:
                return None, None
            (options,) = (o for item in passes for o in item.weighed if any(p is taken for p in o.fitting))
            exact = self._prices.verified(taken, options)
        for item in passes:
            for later in item.waiting:
                plan = later.applied_to(item.semantic, self._job)
                self._prices.reject(plan, reasons.exchanges_more(later, exact.plan), 0, 0)
        for optimizer in {kind.optimizer for kind in kinds[len(passes) :]}:
            self._prices.reject(
                replace(exact.plan, optimizer=optimizer), reasons.pages_in_vain(optimizer), 0, 0
            )
        weighed = [options for item in passes for options in item.weighed]
        contenders = [price for options in weighed for price in self._prices.contenders(options)]
        others = [price for price in contenders if price is not taken]
        second = self._ranking.best(others) if others else None
        for options in weighed:
            self._reject_others(options, exact, (taken, second))
        return exact, second

    def _kinds(self, semantic: Plan) -> list[Plan]:
        """A combination with every implementation of the optimizer and every kernel of attention and loss.

        Attention that a model doesn't have is rejected here, before anything is asked of its plans.
        """
        kinds: list[Plan] = []
        for optimizer, attention in product(optimizers(self._job), attentions(self._job)):
            like = replace(semantic, optimizer=optimizer, attention=attention)
            try:
                self._forecaster.domain(like)
            except UnsupportedByPlanner as failure:
                if not kinds:
                    raise
                self._prices.reject(like, str(failure), 0, 0)
                continue
            kinds += [replace(like, loss=loss) for loss in losses(self._job)]
        return kinds

    def _pages_in_vain(self, kind: Plan, fitting: Plan) -> bool:
        """Whether plans would page their states where one fits that doesn't (unless memory counts)."""
        return not self._ranking.by_memory and kind.uses_pages and not fitting.uses_pages

    def _pass(self, semantic: Plan, candidates: Sequence[Arrangement]) -> _Pass:
        """All that the devices can be arranged to in one round, and rejects the rest."""
        possible, refused = arrangements(self._job, semantic, candidates)
        for item, reason in refused.items():
            self._prices.reject(item.applied_to(semantic, self._job), reason, 0, 0)
        return _Pass(semantic, list(possible), [])

    def _best_arranged(self, item: _Pass, rival: Price | None) -> Price | None:
        """The best plan over all arrangements of the devices, read off its regime's skyline; None where none will do.

        What is sharded less exchanges less, so the arrangements after one that recomputes nothing are left out where no
        larger micro batch can make up for that, and those that offload after any that fits (unless memory counts: each
        needs less than those before it). Small buckets are for what makes ordinary ones recompute, or doesn't fit them.

        Args:
            item: The arrangements with one loss.
            rival: The best plan with another loss or optimizer, which this one must be better than; None: there is none.
        """
        for options in item.weighed:  # a plan may have turned out not to fit at its true shape
            self._prices.settle(options, item.weighed, rival)
        while item.waiting and not (item.weighed and self._is_settled(item, rival)):
            options = self._options(item.waiting.pop(0).applied_to(item.semantic, self._job), item.weighed)
            self._prices.settle(options, item.weighed, rival)
            item.weighed.append(options)
        better = self._better(item, rival)
        return self._ranking.best(better) if better else None

    def _better(self, item: _Pass, rival: Price | None) -> list[Price]:
        """Plans that fit, may be taken, and are better than one with another loss or optimizer."""
        contenders = (price for options in item.weighed for price in self._prices.contenders(options))
        return [price for price in contenders if self._prices.betters(price, rival)]

    def _options(self, semantic: Plan, weighed: Sequence[Options]) -> Options:
        """All plans of one arrangement that may fit, and be better than the like of those that shard less."""
        groups = []
        for mode in self._modes:
            group = Group(self._with(semantic, mode, (1, 1)), self._splits)
            first = group.plan(self._splits[0])
            limits = engine_limits(self._job, first)
            if limits:  # once, and not for every micro batch
                self._prices.reject(first, "; ".join(limits), 0, 0)
            else:
                groups.append(group)
        if not self._ranking.by_memory and any(options.fitting for options in weighed):
            groups = [self._promising(group, weighed) for group in groups]
        return self._prices.sieve.opened(groups)

    def _promising(self, group: Group, weighed: Sequence[Options]) -> Group:
        """Without the plans whose like fits with less sharded; those are rejected."""
        left = []
        for split in group.splits:
            plan = group.plan(split)
            like = [
                price.plan for options in weighed for price in options.fitting if repeats(plan, price.plan)
            ]
            if like:
                self._prices.reject(plan, reasons.shards_in_vain(plan, like[0]), 0, 0)
            else:
                left.append(split)
        return replace(group, splits=tuple(left))

    def _is_settled(self, item: _Pass, rival: Price | None) -> bool:
        """Whether no arrangement that comes later can be better: the best one yet recomputes nothing, and is as fast.

        Host memory is for what doesn't fit without it: states that a CPU updates wait for it in every step.
        """
        better = self._better(item, rival)
        best = self._ranking.best(better) if better else rival
        if self._ranking.by_memory or best is None:
            return False
        following = item.waiting[0]
        if following.offloads and (better or not best.plan.uses_offload):
            return True
        if following.offloads and _is_beyond(following, arrangement_of(best.plan)):
            return True
        if best.plan.activation_checkpointing is not self._modes[0]:
            return False
        is_needless = following.small_buckets and not best.plan.has_small_buckets
        return is_needless or not self._may_be_faster(following.applied_to(item.semantic, self._job), best)

    def _may_be_faster(self, semantic: Plan, best: Price) -> bool:
        """Whether an arrangement that shards more may be faster than the best plan: with a larger micro batch, which it
        may fit, or with another loss.

        It exchanges no less than the best plan's arrangement, so it takes at least as long with the same micro batch.
        """
        for split in self._splits:
            kernels = {"loss": semantic.loss, "attention": semantic.attention}
            other = replace(best.plan, **kernels)  # type: ignore[arg-type]  # a field each
            if split[0] > best.plan.micro_batch_size or other != best.plan:
                like = self._with(other, self._modes[0], split)
                floor = self._ranking.floor(like, self._forecaster.step_floor_seconds(like), 0)
                larger = self._with(semantic, self._modes[0], split)
                if (
                    self._ranking.within(floor) < self._ranking.value(best)
                    and self._prices.lower_bound(larger) <= self._prices.budget_bytes
                ):
                    return True
        return False

    def _reject_others(self, options: Options, exact: Price, taken: tuple[Price | None, ...]) -> None:
        """Says of all plans of an arrangement but the best two why they were not taken."""
        for price in options.fitting:
            if not any(price is item for item in taken):
                self._prices.reject_worse(price, exact)
        for plan in options.unpriced:
            floor, is_out = self._prices.floor(plan, options), self._prices.is_out(plan, options)
            self._prices.reject(plan, reasons.unpriced(plan, floor, exact, self._ranking, is_out), 0, 0)

    def _with(self, semantic: Plan, mode: Checkpointing, split: tuple[int, int]) -> Plan:
        return varied(
            semantic,
            activation_checkpointing=mode,
            micro_batch_size=split[0],
            gradient_accumulation_steps=split[1],
        )

    def _choice(self, best: Price | None, second: Price | None, reason: str) -> PlanChoice:
        first = None
        if second is not None and best is not None:
            text = reasons.runner_up(second, best, self._ranking)
            seconds = None if second.step is None else second.step.seconds
            first = Rejection(second.plan, text, 0, second.estimate.peak_device_bytes, seconds)
        rejected = self._prices.rejected.ordered(first, has_plan=best is not None)
        return PlanChoice(
            plan=None if best is None else best.plan,
            reason=reason,
            estimate=None if best is None else best.estimate,
            runner_up=None if second is None else second.plan,
            runner_up_estimate=None if second is None else second.estimate,
            rejected=rejected,
            capacity_bytes=self._job.hardware.memory_bytes,
            headroom_bytes=headroom_bytes(self._job),
            num_considered=len(rejected) + (best is not None),
            step=None if best is None else best.step,
            runner_up_step=None if second is None else second.step,
        )
