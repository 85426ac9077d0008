"""Prices plans: finds or makes the skyline that answers for a plan, and reads the plan's memory off it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from launcher.domain import Domain
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind
from launcher.job import Checkpointing, Engine, JobSpec, Loss
from launcher.memory import Category, MemoryEstimate
from launcher.plan import Plan
from launcher.planner.bounds import (
    RECOMPUTED,
    computes_alike,
    differing_categories,
    differs_in_engine,
    gradient_bytes,
    host_floor_bytes,
    replicated_plan,
    sharded_categories,
    static_floor_bytes,
)
from launcher.planner.communication import lacks_drive_rate, with_communication, with_drive, with_paging
from launcher.planner.depth import DepthMismatch, DepthPlan, assemble_first
from launcher.planner.estimate import context_bytes, read_estimate
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import domain_of, symbolic_shape
from launcher.planner.reserve import with_reserved, with_workspaces
from launcher.planner.skyline import Profile, Skyline
from launcher.planner.space import attentions, losses, optimizers
from launcher.planner.speed import SpeedModel
from launcher.planner.stream import Stream, with_waiting_inputs
from launcher.planner.stream_depth import check_peaks, extend_stream
from launcher.planner.subject import alone, subject_of
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Subject, SubjectFacts, Tracer
from launcher.rates import Rates
from launcher.step_time import StepTime


@dataclass(frozen=True)
class _Question:
    """One skyline that is wanted."""

    subject: Subject
    facts: SubjectFacts
    domain: Domain
    shape: TracedShape
    accumulation: int
    attempts: tuple[DepthPlan, ...]
    """Depths to trace, and those to trace when they don't tell what repeats."""
    key: str

    @property
    def streams_key(self) -> str:
        """Under which the streams of the same traces are kept."""
        return f"{self.key}-streams"


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
        self._questions: dict[tuple[Plan, bool], _Question] = {}
        self._tracer = tracer
        self._cache = cache
        self._facts: dict[str, SubjectFacts] = {}
        self._skylines: dict[str, Skyline] = {}
        self._streams: dict[str, Mapping[int, Stream]] = {}
        # plans with nothing sharded that were asked for, by what they are without buckets
        self._replicated: dict[Plan, Plan] = {}
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
        return self._facts_of(subject_of(self._job, plan)).supports_sdpa

    def lower_bound_bytes(self, plan: Plan) -> int:
        """A device peak that the plan reaches at least, for what is known without a new trace; 0 when nothing is.

        With one micro batch per step nothing is accumulated; otherwise the step is that of two micro batches,
        whose second one has the whole gradients beside what it needs itself. Without them, and without the
        inputs that wait, it needs no more than the plan. Nor does another checkpointing, loss or implementation of the
        optimizer, without what that changes.
        """
        question = self._question(plan, exact=False)
        accumulating = replace(plan, gradient_accumulation_steps=max(2, plan.gradient_accumulation_steps))
        bounds = [static_floor_bytes(plan, question.facts) + context_bytes(self._job.hardware, plan)]
        kernels = {plan.optimizer, *optimizers(self._job)}
        options = {plan.attention, *attentions(self._job)}
        kinds = product(Checkpointing, {plan, accumulating}, options, losses(self._job), kernels)
        for mode, known, attention, loss, optimizer in kinds:
            alike = replace(known, activation_checkpointing=mode, loss=loss, optimizer=optimizer)
            alike = replace(alike, attention=attention)
            if self.is_prepared(alike):
                bounds.append(self._bound_from(alike, plan, question.facts))
        if plan.zero_stage and computes_alike(self._job, plan):
            like = replicated_plan(plan)
            same = [known for known, exact in self._questions if not exact and differs_in_engine(known, like)]
            bounds += [self._floor(known, sharded_categories(plan), only_steps=True) for known in same]
        return max(bounds)

    def host_floor_bytes(self, plan: Plan) -> int:
        """Host memory that a plan takes at least, for what is known without a trace; 0 when nothing is."""
        return host_floor_bytes(plan, self._question(plan, exact=False).facts)

    def _floor(self, known: Plan, without: Collection[Category], *, only_steps: bool) -> int:
        """The peak of a plan with a trace, had some categories nothing; 0 where there is no trace."""
        question = self._question(known, exact=False)
        skyline = None if question.key in self._pending else self._kept(question)
        if skyline is None:
            return 0
        shape = known.micro_batch_size, known.max_length, known.gradient_accumulation_steps
        return self._job.hardware.context_bytes + skyline.floor_bytes(*shape, without, only_steps=only_steps)

    def _bound_from(self, known: Plan, plan: Plan, facts: SubjectFacts) -> int:
        """What a plan with a trace, which differs in one or more of four knobs, says of one without."""
        estimate = self.estimate(known)
        bound = estimate.peak_device_bytes
        without = differing_categories(known, plan)
        if without:
            # what ZeRO 3 has gathered when a phase begins hangs on the step before; evaluation has a loss too, and a
            # resumed run has its states on the device
            only_steps = plan.zero_stage == 3 or not set(without) <= set(RECOMPUTED)
            bound = self._floor(known, without, only_steps=only_steps)
        if known.gradient_accumulation_steps != plan.gradient_accumulation_steps:
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
            alike = replace(like or plan, **changes)
            is_other = loss is not plan.loss
            step = self._step_known(alike, plan, without_loss=is_other)
            floor = max(floor, 0.0 if step is None else step.seconds)
            replicated = self._replicated.get(replicated_plan(alike)) if plan.zero_stage else None
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
        self, question: _Question, skyline: Skyline, plan: Plan, *, without_loss: bool = False
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

    def _whole_stream(self, question: _Question, skyline: Skyline, streams: Mapping[int, Stream]) -> Stream:
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

    def _keep_skyline(self, question: _Question, skyline: Skyline) -> None:
        self._skylines[question.key] = skyline
        for mode, without_loss in product(Checkpointing, (False, True)):
            self._speeds.pop((question.key, mode, without_loss), None)
        self._cache.keep_skyline(question.key, skyline)

    def _kept(self, question: _Question) -> Skyline | None:
        known = self._skylines.get(question.key)
        if known is None and question.key not in self._pending:
            known = self._cache.skyline(question.key)
            if known is not None:
                self._skylines[question.key] = known
        return known

    def _kept_streams(self, question: _Question) -> Mapping[int, Stream] | None:
        return self._streams.get(question.key) or self._cache.streams(question.streams_key)

    def _make(self, question: _Question) -> Skyline:
        """Waits for the traces of a question, or makes them, and keeps what they say."""
        return self._trace(question, question.attempts)[0]

    def _trace(
        self, question: _Question, attempts: Iterable[DepthPlan]
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

    def _start(self, question: _Question, depths: Sequence[int]) -> tuple[Future[Profile], ...]:
        return self._tracer.records(question.subject, question.shape, depths, question.accumulation)

    def _question(self, plan: Plan, exact: bool) -> _Question:
        known = self._questions.get((plan, exact))
        if known is None:
            known = self._questions[plan, exact] = self._ask(plan, exact)
            if plan.engine in (Engine.DDP, Engine.NONE) and not exact:
                self._replicated[replicated_plan(plan)] = plan
        return known

    def _ask(self, plan: Plan, exact: bool) -> _Question:
        subject = subject_of(self._job, plan)
        facts = self._facts_of(subject)
        batch, length = plan.micro_batch_size, plan.max_length
        accumulation = min(plan.gradient_accumulation_steps, 2)
        lines = facts.lines[plan.loss]
        if length < lines.shortest:
            raise UnsupportedByPlanner(
                f"data.max_length={length}: the images of an example take {lines.shortest - 1} tokens",
                f"data.max_length of {lines.shortest} or more, or fewer data.images_per_example",
            )
        domain = domain_of(batch, length, lines)
        shape = None if exact else symbolic_shape(domain, lines)
        if shape is None:
            domain = Domain(batch, batch, length, length, 1, None)
            shape = TracedShape(batch, length, batch_is_symbol=False, length_is_symbol=False)
        what: Mapping[str, Any] = {"shape": vars(shape), "domain": vars(domain), "accumulation": accumulation}
        attempts = tuple(facts.depths.attempts(facts.num_layers))
        return _Question(
            subject, facts, domain, shape, accumulation, attempts, self._cache.key(subject, what)
        )

    def _facts_of(self, subject: Subject) -> SubjectFacts:
        # neither checkpointing nor an engine moves a line, and each loss has its own; one answer serves every mode
        plain = replace(subject.plan, activation_checkpointing=Checkpointing.NONE, loss=Loss.PLAIN)
        subject = replace(subject, plan=alone(plain))
        key = self._cache.key(subject, {"facts": True})
        facts = self._facts.get(key) or self._cache.facts(key)
        if facts is None:
            facts = self._tracer.facts(subject).result()
            self._cache.keep_facts(key, facts)
        self._facts[key] = facts
        return facts
