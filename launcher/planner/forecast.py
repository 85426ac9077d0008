"""Prices plans: finds or makes the skyline that answers for a plan, and reads the plan's memory off it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import product
from typing import Any

from launcher.domain import Domain
from launcher.hardware import DeviceKind
from launcher.job import Checkpointing, JobSpec
from launcher.memory import Category, MemoryEstimate
from launcher.plan import Plan, varied
from launcher.planner.bounds import (
    RECOMPUTED,
    computes_alike,
    differing_categories,
    gradient_bytes,
    host_floor_bytes,
    sharded_categories,
    static_floor_bytes,
)
from launcher.planner.communication import lacks_drive_rate, with_communication, with_drive, with_paging
from launcher.planner.depth import DepthMismatch, DepthPlan, assemble_first
from launcher.planner.estimate import WORKSPACES, context_bytes, read_estimate
from launcher.planner.group import Group, Split
from launcher.planner.many import Readings, alike_plans
from launcher.planner.questions import Question, Questions
from launcher.planner.reserve import with_reserved, with_workspaces
from launcher.planner.skyline import Profile, Skyline
from launcher.planner.space import losses
from launcher.planner.speed import SpeedModel
from launcher.planner.stream import Stream, with_waiting_inputs
from launcher.planner.stream_depth import check_peaks, extend_stream
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import SubjectFacts, Tracer
from launcher.rates import Rates
from launcher.step_time import StepTime


class Forecaster:
    """Prices the plans of one job on one kind of device.

    Args:
        job: The job.
        tracer: Makes traces.
        cache: Keeps them.
        budget_bytes: What a plan may take of the device; 0: all of it.
        rates: How fast the device works; None: nobody knows, and no step has a time.
    """

    def __init__(
        self,
        job: JobSpec,
        tracer: Tracer,
        cache: TraceCache,
        budget_bytes: int = 0,
        rates: Rates | None = None,
    ) -> None:
        self._job = job
        self._budget_bytes = budget_bytes or job.hardware.memory_bytes
        self._rates = None if lacks_drive_rate(job) else rates
        self._speeds: dict[tuple[str, Checkpointing, bool], SpeedModel] = {}
        self._tracer = tracer
        self._cache = cache
        self._asked = Questions(job, tracer, cache)
        self._absent: set[str] = set()
        self._read = Readings()
        self._estimates: dict[Plan, MemoryEstimate] = {}
        self._skylines: dict[str, Skyline] = {}
        self._streams: dict[str, Mapping[int, Stream]] = {}
        self._pending: dict[str, tuple[Future[Profile], ...]] = {}

    def prepare(self, plans: Iterable[Plan], *, exact: bool = False) -> None:
        """Starts the traces that these plans need, side by side, without waiting for them."""
        for plan in plans:
            question = self._question(plan, exact)
            if self._kept(question) is None and question.key not in self._pending:
                self._pending[question.key] = self._start(question, question.attempts[0].depths)

    def is_prepared(self, plan: Plan) -> bool:
        """Whether a plan's price needs no new trace."""
        question = self._question(plan, exact=False)
        return question.key in self._pending or self._kept(question) is not None

    def domain(self, plan: Plan) -> Domain:
        """The shapes for which the skyline of a plan answers; needs no trace.

        Raises:
            UnsupportedByPlanner: When the plan's length is too short for the job.
        """
        return self._question(plan, exact=False).domain

    def skyline(self, plan: Plan) -> Skyline:
        """The skyline that answers for a plan.

        Raises:
            UnsupportedByPlanner: When the tracer can't follow the plan.
        """
        question = self._question(plan, exact=False)
        return self._kept(question) or self._make(question)

    def supports_sdpa(self, plan: Plan) -> bool:
        """Whether the model's code has scaled-dot-product attention."""
        return self._asked.facts(plan).supports_sdpa

    def lower_bound_bytes(self, plan: Plan) -> int:
        """A device peak that the plan reaches at least, for what is known without a new trace; 0 when nothing is.

        With one micro batch per step nothing is accumulated; otherwise the step is that of two micro batches,
        whose second one has the whole gradients beside what it needs itself. Without them, and without the
        inputs that wait, it needs no more than the plan. Nor does another checkpointing, loss or implementation of the
        optimizer, without what that changes.
        """
        question = self._question(plan, exact=False)
        accumulating = varied(plan, gradient_accumulation_steps=max(2, plan.gradient_accumulation_steps))
        bounds = [static_floor_bytes(plan, question.facts) + context_bytes(self._job.hardware, plan)]
        for alike in (other for known in {plan, accumulating} for other in alike_plans(self._job, known)):
            if self.is_prepared(alike):
                bounds.append(self._bound_from(alike, plan, question.facts))
        if plan.zero_stage and computes_alike(self._job, plan):
            known = self._asked.replicated(plan)
            if known is not None:
                bounds.append(self._floor(known, sharded_categories(plan), only_steps=True))
        return max(bounds)

    def known_peaks_bytes(self, group: Group) -> list[int | None]:
        """Device peaks of the plans of a group; None for each whose price needs a new trace."""
        found: dict[Split, int] = {}
        for question, splits in self._asked.by_question(group):
            if question.key in self._pending or self._kept(question) is not None:
                found |= zip(splits, self._peaks(question, replace(group, splits=splits)), strict=True)
        return [found.get(split) for split in group.splits]

    def lower_bounds_bytes(self, group: Group) -> list[int]:
        """`lower_bound_bytes` of the plans of a group."""
        many = tuple(split for split in group.splits if split[1] > 1)
        if len(many) < 2 or group.like.zero_stage:  # a plan has the others' answers
            return [self.lower_bound_bytes(plan) for plan in group.plans()]
        first = group.plan(many[0])
        least = static_floor_bytes(first, self._asked.facts(first))
        least += context_bytes(self._job.hardware, first)
        found = dict.fromkeys(many, least)
        for like in alike_plans(self._job, group.like):
            without = differing_categories(like, group.like)
            only_steps = not set(without) <= set(RECOMPUTED)
            for question, splits in self._asked.by_question(Group(like, many)):
                if question.key in self._pending or self._kept(question) is not None:
                    part = Group(like, splits)
                    floors = self._floors(question, part, without, only_steps=only_steps) if without else []
                    pairs = zip(splits, floors or self._peaks(question, part), strict=True)
                    found |= {split: max(found[split], size) for split, size in pairs}
        others = [split for split in group.splits if split[1] == 1]
        found |= {split: self.lower_bound_bytes(group.plan(split)) for split in others}
        return [found[split] for split in group.splits]

    def _peaks(self, question: Question, group: Group) -> list[int]:
        """Device peaks of plans that one skyline answers for."""
        skyline = self._kept(question) or self._make(question)
        hardware = self._job.hardware
        # what is not in the skyline itself is read plan by plan (estimate.py)
        if hardware.kind is DeviceKind.CPU or group.like.uses_pages or not skyline.is_whole:
            return [self.estimate(plan).peak_device_bytes for plan in group.plans()]
        shapes = group.like.max_length, group.splits
        spaces = WORKSPACES * hardware.blas_workspace_bytes
        peaks = self._read.peaks_bytes(question.key, skyline, *shapes, workspaces_bytes=spaces)
        context = context_bytes(hardware, group.like)
        return [peak + context for peak in peaks]

    def _floors(
        self, question: Question, group: Group, without: Collection[Category], *, only_steps: bool
    ) -> list[int]:
        """The peaks of plans that one skyline answers for, had some categories nothing."""
        skyline = self._kept(question) or self._make(question)
        length, splits, context = group.like.max_length, group.splits, self._job.hardware.context_bytes
        if skyline.is_whole:
            key = question.key
            floors = self._read.peaks_bytes(key, skyline, length, splits, without, only_steps=only_steps)
        else:
            shapes = [(batch, length, accumulation) for batch, accumulation in splits]
            floors = [skyline.floor_bytes(*shape, without, only_steps=only_steps) for shape in shapes]
        return [floor + context for floor in floors]

    def host_floor_bytes(self, plan: Plan) -> int:
        """Host memory that a plan takes at least, for what is known without a trace; 0 when nothing is."""
        return host_floor_bytes(plan, self._question(plan, exact=False).facts)

    def _floor(self, known: Plan, without: Collection[Category], *, only_steps: bool) -> int:
        """The peak of a plan with a trace, had some categories nothing; 0 where there is no trace."""
        question = self._question(known, exact=False)
        if question.key in self._pending or self._kept(question) is None:
            return 0
        split = known.micro_batch_size, known.gradient_accumulation_steps
        return self._floors(question, Group(known, (split,)), without, only_steps=only_steps)[0]

    def _bound_from(self, known: Plan, plan: Plan, facts: SubjectFacts) -> int:
        """What a plan with a trace, which differs in one or more of four knobs, says of one without."""
        self.skyline(known)  # waits for one that is on its way
        without = differing_categories(known, plan)
        is_same_step = known.gradient_accumulation_steps == plan.gradient_accumulation_steps
        estimate = None
        if not (without and is_same_step):
            estimate = self._estimates.get(known) or self.estimate(known)
            self._estimates[known] = estimate
        if without:
            # what ZeRO 3 has gathered when a phase begins hangs on the step before; evaluation has a loss too, and a
            # resumed run has its states on the device
            only_steps = plan.zero_stage == 3 or not set(without) <= set(RECOMPUTED)
            bound = self._floor(known, without, only_steps=only_steps)
        elif estimate is not None:
            bound = estimate.peak_device_bytes
        if estimate is not None and not is_same_step:
            # under an engine the gradients that are held at the step are a part of those that were accumulated
            bound -= max(estimate.resident_bytes[Category.GRADIENTS], gradient_bytes(plan, facts))
            bound -= estimate.peak.by_category_bytes[Category.INPUTS]
        return bound

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        """Memory of a plan.

        Args:
            plan: The plan.
            exact: Whether to trace at the plan's true shape, instead of reading it off its regime's skyline.

        Raises:
            UnsupportedByPlanner: When the tracer can't follow the plan.
        """
        question = self._question(plan, exact)
        replays = exact and self._job.hardware.kind in (DeviceKind.CUDA, DeviceKind.ROCM)
        stream = self.stream(plan) if replays else None  # comes first: it may correct the skyline
        skyline = self._kept(question) or self._make(question)
        estimate = read_estimate(skyline, plan, self._job, question.facts.process_bytes)
        if stream is None:
            return estimate
        return with_reserved(estimate, stream, self._budget_bytes - estimate.context_bytes)

    @property
    def knows_speed(self) -> bool:
        """Whether steps have a time."""
        return self._rates is not None

    def step_time(self, plan: Plan, *, exact: bool = False) -> StepTime | None:
        """Time of a plan's optimizer step, from the trace that its memory comes from; None without rates.

        Raises:
            UnsupportedByPlanner: When the tracer can't follow the plan, or a rate is missing.
        """
        question = self._question(plan, exact)
        step = self._step_time(question, self._kept(question) or self._make(question), plan)
        return (
            with_paging(step, self._job.hardware, self.estimate(plan, exact=exact))
            if step and plan.uses_pages
            else step
        )

    def step_floor_seconds(self, plan: Plan, like: Plan | None = None) -> float:
        """A time that the plan's step can't go below, from traces that exist; 0 when none says anything.

        A plan that recomputes less runs a part of the same operations. And the first micro batch of a step, and its
        update, are the same whether others follow or not. So is all but the loss with another loss, and what each
        device computes of its batch whatever is sharded.

        Args:
            plan: The plan.
            like: Another plan, whose traces are read, and which computes the same; None: the plan itself.
        """
        floor = 0.0
        modes = list(Checkpointing)
        less = modes[: modes.index(plan.activation_checkpointing) + 1]
        micro_batches = {min(plan.gradient_accumulation_steps, 2), 2}
        for mode, accumulation, loss in product(less, micro_batches, losses(self._job)):
            changes: dict[str, Any] = {
                "activation_checkpointing": mode,
                "gradient_accumulation_steps": accumulation,
                "loss": loss,
            }
            alike = varied(like or plan, **changes)
            is_other = loss is not plan.loss
            step = self._step_known(alike, plan, without_loss=is_other)
            floor = max(floor, 0.0 if step is None else step.seconds)
            replicated = self._asked.replicated(alike) if plan.zero_stage else None
            if replicated is not None and computes_alike(self._job, plan):
                step = self._step_known(replicated, plan, without_loss=is_other)
                # what is sharded is updated in parts
                floor = max(floor, 0.0 if step is None else step.seconds - step.update_seconds)
        return floor

    def _step_known(self, known: Plan, plan: Plan, *, without_loss: bool) -> StepTime | None:
        """The time of a plan's step by the trace of another one; None where there is no trace."""
        question = self._question(known, exact=False)
        skyline = None if question.key in self._pending else self._kept(question)
        return (
            None if skyline is None else self._step_time(question, skyline, plan, without_loss=without_loss)
        )

    def _step_time(
        self, question: Question, skyline: Skyline, plan: Plan, *, without_loss: bool = False
    ) -> StepTime | None:
        if self._rates is None:
            return None
        # a floor takes the operations of a plan that recomputes less, each with the host's time for this plan's
        key = question.key, plan.activation_checkpointing, without_loss
        if key not in self._speeds:
            work = skyline.work.without_loss() if without_loss else skyline.work
            self._speeds[key] = SpeedModel(work, self._rates, plan.activation_checkpointing.value)
        batch, length = plan.micro_batch_size, plan.max_length
        step = self._speeds[key].step(batch, length, plan.gradient_accumulation_steps)
        held = skyline.resident_bytes(batch, length)[Category.PARAMETERS]
        gradients, weights = gradient_bytes(plan, question.facts), question.facts.weight_bytes
        step = with_communication(step, plan, self._job.hardware, held, gradients, weights)
        return with_drive(step, self._job.hardware, skyline.drive_bytes)

    def stream(self, plan: Plan) -> Stream:
        """Every allocation and release of a plan at its true shape.

        Made by the traces of the exact estimate. Of more than two micro batches per step only the waiting inputs
        of the others are in it.

        Raises:
            UnsupportedByPlanner: When the tracer can't follow the plan.
        """
        question = self._question(plan, exact=True)
        skyline, streams = self._kept(question), self._kept_streams(question)
        if skyline is None or streams is None:
            skyline = self._make(question)
            streams = self._streams[question.key]
        waiting = plan.gradient_accumulation_steps - question.accumulation
        whole = with_waiting_inputs(self._whole_stream(question, skyline, streams), waiting)
        return with_workspaces(whole, self._job.hardware.blas_workspace_bytes)

    def _whole_stream(self, question: Question, skyline: Skyline, streams: Mapping[int, Stream]) -> Stream:
        """The stream of the full depth; where it contradicts the skyline, both are made again from deeper traces."""
        num_layers = question.facts.num_layers
        attempts = list(question.attempts)
        while attempts[0].depths != tuple(streams):
            attempts.pop(0)
        while len(streams) > 1:
            (shallow, low), (deep, high) = streams.items()
            try:
                stream = extend_stream(low, high, (num_layers - shallow) // (deep - shallow), deep - shallow)
                shape = question.shape.batch, question.shape.length, question.accumulation
                check_peaks(stream, skyline.peaks(*shape))
                return stream
            except DepthMismatch as mismatch:
                logging.getLogger(__name__).info("tracing deeper: %s", mismatch)
                attempts.pop(0)
                # whichever of the two was wrong: the deeper traces are asked for both
                skyline, streams = self._trace(question, attempts)
        return streams[num_layers]

    def _keep_skyline(self, question: Question, skyline: Skyline) -> None:
        self._skylines[question.key] = skyline
        self._absent.discard(question.key)
        self._read.clear()
        self._estimates.clear()
        for mode, without_loss in product(Checkpointing, (False, True)):
            self._speeds.pop((question.key, mode, without_loss), None)
        self._cache.keep_skyline(question.key, skyline)

    def _kept(self, question: Question) -> Skyline | None:
        known = self._skylines.get(question.key)
        if known is None and question.key not in self._pending and question.key not in self._absent:
            known = self._cache.skyline(question.key)
            if known is None:
                self._absent.add(question.key)  # a search asks many times
            else:
                self._skylines[question.key] = known
        return known

    def _kept_streams(self, question: Question) -> Mapping[int, Stream] | None:
        return self._streams.get(question.key) or self._cache.streams(question.streams_key)

    def _make(self, question: Question) -> Skyline:
        """Waits for the traces of a question, or makes them, and keeps what they say."""
        return self._trace(question, question.attempts)[0]

    def _trace(
        self, question: Question, attempts: Iterable[DepthPlan]
    ) -> tuple[Skyline, Mapping[int, Stream]]:
        def traced(depths: Sequence[int]) -> list[Profile]:
            pending = self._pending.pop(question.key, None) or self._start(question, depths)
            return [future.result() for future in pending]

        skyline, profiles = assemble_first(question.domain, attempts, question.accumulation, traced)
        self._keep_skyline(question, skyline)
        streams = {depth: profile.stream for depth, profile in profiles.items() if profile.stream is not None}
        if streams:
            self._streams[question.key] = streams
            self._cache.keep_streams(question.streams_key, streams)
        return skyline, streams

    def _start(self, question: Question, depths: Sequence[int]) -> tuple[Future[Profile], ...]:
        return self._tracer.records(question.subject, question.shape, depths, question.accumulation)

    def _question(self, plan: Plan, exact: bool) -> Question:
        return self._asked.question(plan, exact=exact)
