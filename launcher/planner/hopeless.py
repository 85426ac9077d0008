"""Rejects what can't fit, many plans at a time: those that differ in their micro batch alone have one answer.

Peaks and bounds of a group come from the forecaster at once. Among plans that accumulate, what exceeds the device with a
micro batch exceeds it with every larger one. Only what is left is looked at plan by plan (pricing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.hardware import DeviceKind
from launcher.job import JobSpec, Loss
from launcher.plan import Plan
from launcher.planner import reasons
from launcher.planner.arrangements import is_last_resort, with_ordinary_buckets
from launcher.planner.bounds import buckets_hold_bytes
from launcher.planner.forecast import Forecaster
from launcher.planner.group import Group, Split
from launcher.planner.host import short_on_host
from launcher.planner.objective import Price
from launcher.planner.options import Options
from launcher.planner.rejections import RejectionLog, Run
from launcher.planner.space import attentions, losses


@dataclass(frozen=True)
class Known:
    """What a search knows of its job beside the traces."""

    budget_bytes: int
    """What a plan may take of the device."""
    log: RejectionLog
    """What was rejected."""
    host_floors: Mapping[tuple[object, ...], int]
    """What plans take of host memory at least, bytes, by `on_host`."""
    refused_losses: Mapping[Loss, str]
    """Kernels of the loss that the model has not."""
    peaks: Mapping[Plan, int]
    """Device peaks of plans that were looked at one by one, or lower bounds of them, bytes."""


def on_host(plan: Plan) -> tuple[object, ...]:
    """What decides how much an engine holds in host memory, whatever is recomputed and however large a micro batch is."""
    job = plan.method, plan.rank, plan.optimizer, plan.gradient_accumulation_steps > 1
    return *job, plan.engine, plan.zero_stage, plan.offload_optimizer, plan.offload_parameters


def is_unexplored(job: JobSpec, plan: Plan) -> bool:
    """Whether which of its like is nearest to fitting is not worth traces: of other kernels, or as the last resort."""
    is_other = plan.loss is not losses(job)[0] or plan.attention is not attentions(job)[0]
    return is_other or is_last_resort(job, plan)


class Sieve:
    """Rejects the plans of a group for what is known without a new trace.

    Args:
        job: The job, resolved.
        forecaster: Prices its plans.
        known: What the search knows besides.
    """

    def __init__(self, job: JobSpec, forecaster: Forecaster, known: Known) -> None:
        self._job = job
        self._forecaster = forecaster
        self._known = known

    def opened(self, groups: Sequence[Group]) -> Options:
        """The plans of one arrangement that may fit; the others are rejected."""
        options = Options([])
        peaks = [self._forecaster.known_peaks_bytes(group) for group in groups]
        if self._needs_each(groups, peaks):
            options.unpriced = [plan for group in groups for plan in group.plans()]
            return options
        for group, many in zip(groups, peaks, strict=True):
            self._reject_too_large(group, many, options)
        for group, many in zip(groups, peaks, strict=True):
            pairs = list(zip(group.splits, many, strict=True))
            unknown = tuple(split for split, peak in pairs if peak is None)
            kept = self._without_hopeless(replace(group, splits=unknown), options)
            kept |= {split for split, peak in pairs if peak is not None and peak <= self._known.budget_bytes}
            options.unpriced += [group.plan(split) for split in group.splits if split in kept]
        return options

    def _needs_each(self, groups: Sequence[Group], peaks: Sequence[Sequence[int | None]]) -> bool:
        """Whether plans must be looked at one by one: what one of them takes of host memory others take too."""
        if any(group.like.loss in self._known.refused_losses for group in groups):
            return True
        waits = any(group.like.uses_offload or group.like.uses_pages for group in groups)
        return waits and any(peak is not None for many in peaks for peak in many)

    def _too_large(self, group: Group, peaks: Sequence[int | None]) -> list[tuple[Split, int]]:
        """Plans with a trace that the device doesn't hold, with their peaks."""
        budget = self._known.budget_bytes
        pairs = zip(group.splits, peaks, strict=True)
        return [(split, peak) for split, peak in pairs if peak is not None and peak > budget]

    def _reject_too_large(self, group: Group, peaks: Sequence[int | None], options: Options) -> None:
        large = self._too_large(group, peaks)
        if not large:
            return
        budget, keeps_logits = self._known.budget_bytes, self._job.evaluation.keep_logits
        estimate = self._forecaster.estimate

        def reason(plan: Plan, _: int) -> str:
            return reasons.too_large(estimate(plan), budget, keeps_logits=keeps_logits)

        on_host = self._shorts_on_host(group, [split for split, _ in large])
        held = [(split, peak) for split, peak in large if split not in on_host]
        if held:
            self._reject(group, held, reason, is_priced=True)
        if on_host:
            self._reject_on_host(group, [pair for pair in large if pair[0] in on_host], on_host)
        first = next((split for split, _ in large if split[1] > 1), None)
        if first is not None:  # it stands for all larger ones
            plan = group.plan(first)
            options.failed.append(Price(plan, estimate(plan), None))

    def _reject_on_host(
        self, group: Group, large: Sequence[tuple[Split, int]], shorts: Mapping[Split, int]
    ) -> None:
        """Writes down plans that the host doesn't hold either: a larger device would not help."""
        estimate, splits = self._forecaster.estimate, tuple(split for split, _ in large)

        def reason(plan: Plan, _: int) -> str:
            split = plan.micro_batch_size, plan.gradient_accumulation_steps
            return reasons.too_large_on_host(estimate(plan), shorts[split])

        lacking, peaks = tuple(shorts[split] for split in splits), tuple(peak for _, peak in large)
        run = Run(replace(group, splits=splits), lacking, peaks, reason, is_priced=True, is_host_short=True)
        self._known.log.extend(run)

    def _shorts_on_host(self, group: Group, splits: Sequence[Split]) -> dict[Split, int]:
        """Of plans that exceed the host memory, by how much; what they take there grows with the micro batch."""
        hardware = self._job.hardware
        if not hardware.host_memory_bytes or hardware.kind is DeviceKind.CPU:
            return {}
        found: dict[Split, int] = {}
        for split in reversed(splits):
            found[split] = short_on_host(self._forecaster.estimate(group.plan(split)), hardware)
            if not found[split] and split[1] > 1:
                break
        return {split: short for split, short in found.items() if short}

    def _without_hopeless(self, group: Group, options: Options) -> set[Split]:
        """The plans without a trace that may fit, for what is known of others."""
        if not group.splits:
            return set()
        accumulating = tuple(split for split in group.splits if split[1] > 1)
        kept = self._of_accumulating(replace(group, splits=accumulating), options) if accumulating else set()
        at_once = tuple(split for split in group.splits if split[1] == 1)
        return kept | (self._of_one_batch(replace(group, splits=at_once), options) if at_once else set())

    def _of_accumulating(self, group: Group, options: Options) -> set[Split]:
        if self._rejects_for_host(group):
            return set()
        failed = _smallest_failed(group.like, options)
        larger: list[Split] = []
        if failed is not None:
            larger = [split for split in group.splits if split[0] > failed.plan.micro_batch_size]
        others = group.splits[: len(group.splits) - len(larger)]
        kept: set[Split] = set()
        if others:
            least, high = [], 0
            for bound in self._lower_bounds(replace(group, splits=others)):
                high = max(high, bound)
                least.append(high if high > self._known.budget_bytes else bound)
            kept = self._rejects_for_bounds(group, list(zip(others, least, strict=True)), options)
        if larger and failed is not None:
            short = failed.estimate.peak_device_bytes - self._known.budget_bytes
            text = reasons.like_smaller(failed.plan, short)
            self._reject(
                group, [(split, short + self._known.budget_bytes) for split in larger], lambda *_: text
            )
        return kept

    def _of_one_batch(self, group: Group, options: Options) -> set[Split]:
        """Without accumulation a plan needs at least what the smaller micro batch that failed would need so."""
        if self._rejects_for_host(group):
            return set()
        (split,) = group.splits
        failed = _smallest_failed(group.like, options)
        mode = group.like.activation_checkpointing
        smaller = [
            like
            for like, _ in options.bounded
            if like.activation_checkpointing is mode and like.micro_batch_size < split[0]
        ]
        alike = failed.plan if failed is not None else next(iter(smaller), None)
        wanted = (split,) if alike is None else (split, (alike.micro_batch_size, 1))
        bound = max(self._lower_bounds(replace(group, splits=wanted)))
        return self._rejects_for_bounds(group, [(split, bound)], options)

    def _rejects_for_host(self, group: Group) -> bool:
        """Whether none fits the host, by what is the same for every micro batch."""
        there, plan = self._job.hardware.host_memory_bytes, group.plan(group.splits[0])
        needed = max(self._forecaster.host_floor_bytes(plan), self._known.host_floors.get(on_host(plan), 0))
        if not 0 < there < needed:
            return False
        text = reasons.by_host_bound(needed, there)
        shorts, none = (needed - there,) * len(group.splits), (0,) * len(group.splits)
        run = Run(group, shorts, none, lambda *_: text, is_host_short=True)
        self._known.log.extend(run)
        return True

    def _rejects_for_bounds(
        self, group: Group, bounds: Sequence[tuple[Split, int]], options: Options
    ) -> set[Split]:
        budget = self._known.budget_bytes
        hopeless = [(split, bound) for split, bound in bounds if bound > budget]
        if hopeless:
            unexplored = is_unexplored(self._job, group.like)
            self._reject(
                group,
                hopeless,
                lambda _, bound: reasons.by_bound(bound, budget),
                is_bound=True,
                is_unexplored=unexplored,
            )
            first, bound = hopeless[0]
            if first[1] > 1:  # it stands for all larger ones
                options.bounded.append((group.plan(first), bound))
        return {split for split, bound in bounds if bound <= budget}

    def _lower_bounds(self, group: Group) -> list[int]:
        """Peaks that plans reach at least, by what is known of them, and of the same plans with ordinary buckets."""
        bounds = self._forecaster.lower_bounds_bytes(group)
        ordinary = with_ordinary_buckets(group.like, self._job)
        if ordinary is None:
            return bounds
        group = replace(group, like=ordinary)
        known = self._forecaster.lower_bounds_bytes(group)
        peaks, log = self._known.peaks, self._known.log
        priced = [max(peaks.get(plan, 0), log.peak_bytes(plan)) for plan in group.plans()]
        held = buckets_hold_bytes(ordinary, self._job.model.architecture)
        return [max(a, max(b, c) - held) for a, b, c in zip(bounds, known, priced, strict=True)]

    def _reject(
        self,
        group: Group,
        peaks: Sequence[tuple[Split, int]],
        reason: Callable[[Plan, int], str],
        **flags: bool,
    ) -> None:
        """Writes down plans that exceed the device, with what they need, at least."""
        splits, sizes = zip(*peaks, strict=True)
        shorts = tuple(size - self._known.budget_bytes for size in sizes)
        self._known.log.extend(Run(replace(group, splits=splits), shorts, sizes, reason, **flags))


def _smallest_failed(plan: Plan, options: Options) -> Price | None:
    """With the same checkpointing, of what exceeds the device the smallest micro batch."""
    mode = plan.activation_checkpointing
    same = [price for price in options.failed if price.plan.activation_checkpointing is mode]
    return min(same, key=lambda price: price.plan.micro_batch_size, default=None)
