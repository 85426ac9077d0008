"""Prices plans: finds or makes the skyline that answers for a plan, and reads the plan's memory off it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Checkpointing,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Method,
    MethodSpec,
    ModelSpec,
    Precision,
    StoredDtype,
    TrainingSpec,
)
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.depth import DepthMismatch, assemble
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import domain_of, symbolic_shape
from launcher.planner.skyline import Domain, Profile, Skyline
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Subject, SubjectFacts, Tracer

WORKSPACES = 2
"""Matrix-library workspaces of a training process: one for the forward thread, one for autograd's."""


@dataclass(frozen=True)
class _Question:
    """One skyline that is wanted."""

    subject: Subject
    facts: SubjectFacts
    domain: Domain
    shape: TracedShape
    accumulation: int
    key: str


class Forecaster:
    """Prices the plans of one job on one kind of device.

    Args:
        job: The job.
        tracer: Makes traces.
        cache: Keeps them.
    """

    def __init__(self, job: JobSpec, tracer: Tracer, cache: TraceCache) -> None:
        self._job = job
        self._tracer = tracer
        self._cache = cache
        self._facts: dict[str, SubjectFacts] = {}
        self._skylines: dict[str, Skyline] = {}
        self._pending: dict[str, tuple[Future[Profile], ...]] = {}

    def prepare(self, plans: Iterable[Plan], *, exact: bool = False) -> None:
        """Starts the traces that these plans need, side by side, without waiting for them."""
        for plan in plans:
            question = self._question(plan, exact)
            if self._kept(question) is None and question.key not in self._pending:
                self._pending[question.key] = self._tracer.records(
                    question.subject, question.shape, question.facts.depths.depths, question.accumulation
                )

    def is_prepared(self, plan: Plan) -> bool:
        """Whether a plan's price needs no new trace."""
        question = self._question(plan, exact=False)
        return question.key in self._pending or self._kept(question) is not None

    def supports_sdpa(self, plan: Plan) -> bool:
        """Whether the model's code has scaled-dot-product attention."""
        return self._facts_of(subject_of(self._job, plan)).supports_sdpa

    def lower_bound_bytes(self, plan: Plan) -> int:
        """A device peak that the plan reaches at least, from traces that exist; 0 when none says anything.

        With one micro batch per step nothing is accumulated; otherwise the step is that of two micro batches,
        whose second one has the whole gradients beside what it needs itself. Without them, and without the
        inputs that wait, it needs no more than the plan.
        """
        accumulating = replace(plan, gradient_accumulation_steps=2)
        if plan.gradient_accumulation_steps != 1 or not self.is_prepared(accumulating):
            return 0
        known = self.estimate(accumulating)
        waiting = known.peak.by_category_bytes[Category.INPUTS]
        return known.peak_device_bytes - known.resident_bytes[Category.GRADIENTS] - waiting

    def estimate(self, plan: Plan, *, exact: bool = False) -> MemoryEstimate:
        """Memory of a plan.

        Args:
            plan: The plan.
            exact: Whether to trace at the plan's true shape, instead of reading it off its regime's skyline.

        Raises:
            UnsupportedByPlanner: When the tracer can't follow the plan.
        """
        question = self._question(plan, exact)
        skyline = self._kept(question)
        if skyline is None:
            self.prepare([plan], exact=exact)
            skyline = self._assemble(question)
            self._skylines[question.key] = skyline
            self._cache.keep_skyline(question.key, skyline)
        return read_estimate(skyline, plan, self._job)

    def _kept(self, question: _Question) -> Skyline | None:
        known = self._skylines.get(question.key)
        if known is None and question.key not in self._pending:
            known = self._cache.skyline(question.key)
            if known is not None:
                self._skylines[question.key] = known
        return known

    def _assemble(self, question: _Question) -> Skyline:
        profiles = [future.result() for future in self._pending.pop(question.key)]
        domain, steps = question.domain, question.facts.depths.steps
        try:
            return assemble(domain, profiles, steps, question.accumulation)
        except DepthMismatch as mismatch:
            logging.getLogger(__name__).info("tracing every layer: %s", mismatch)
            depth = (question.facts.num_layers,)
            (future,) = self._tracer.records(question.subject, question.shape, depth, question.accumulation)
            return assemble(domain, [future.result()], 0.0, question.accumulation)

    def _question(self, plan: Plan, exact: bool) -> _Question:
        subject = subject_of(self._job, plan)
        facts = self._facts_of(subject)
        batch, length = plan.micro_batch_size, plan.max_length
        accumulation = min(plan.gradient_accumulation_steps, 2)
        domain = domain_of(batch, length, facts.lines)
        shape = None if exact else symbolic_shape(domain, facts.lines)
        if shape is None:
            domain = Domain(batch, batch, length, length, 1, None)
            shape = TracedShape(batch, length, batch_is_symbol=False, length_is_symbol=False)
        what: Mapping[str, Any] = {"shape": vars(shape), "domain": vars(domain), "accumulation": accumulation}
        return _Question(subject, facts, domain, shape, accumulation, self._cache.key(subject, what))

    def _facts_of(self, subject: Subject) -> SubjectFacts:
        # checkpointing moves no line; one answer serves every mode
        subject = replace(subject, plan=replace(subject.plan, activation_checkpointing=Checkpointing.NONE))
        key = self._cache.key(subject, {"facts": True})
        facts = self._facts.get(key) or self._cache.facts(key)
        if facts is None:
            facts = self._tracer.facts(subject).result()
            self._cache.keep_facts(key, facts)
        self._facts[key] = facts
        return facts


def subject_of(job: JobSpec, plan: Plan) -> Subject:
    """Reduces job and plan to what a trace depends on; everything else takes its default."""
    defaults = MethodSpec()
    reduced = JobSpec(
        model=ModelSpec(architecture=job.model.architecture, trust_remote_code=job.model.trust_remote_code),
        method=replace(job.method, name=defaults.name, rank=defaults.rank, alpha=defaults.alpha),
        data=DataSpec(packing=job.data.packing),
        training=TrainingSpec(
            max_grad_norm=1.0 if job.training.max_grad_norm > 0 else 0.0,
            weight_decay=job.training.weight_decay,
        ),
        evaluation=EvaluationSpec(enabled=job.evaluation.enabled, batch_size=job.evaluation.batch_size),
        generation=job.generation,
        hardware=HardwareSpec(),
    )
    shapeless = replace(plan, micro_batch_size=1, gradient_accumulation_steps=1, max_length=8)
    hardware = HardwareSpec(
        kind=job.hardware.kind, supports_flash_attention=job.hardware.supports_flash_attention
    )
    return Subject(reduced, shapeless, hardware)


def read_estimate(skyline: Skyline, plan: Plan, job: JobSpec) -> MemoryEstimate:
    """Reads a plan's memory off a skyline."""
    batch, length = plan.micro_batch_size, plan.max_length
    resident = skyline.resident_bytes(batch, length)
    phases = tuple(
        _with_stored_copy(peak, resident, plan, job) if peak.phase is Phase.LOAD else peak
        for peak in skyline.peaks(batch, length, plan.gradient_accumulation_steps)
    )
    hardware = job.hardware
    context = hardware.context_bytes + WORKSPACES * hardware.blas_workspace_bytes
    return MemoryEstimate(phases, resident, context)


def _with_stored_copy(
    peak: PhasePeak, resident: Mapping[Category, int], plan: Plan, job: JobSpec
) -> PhasePeak:
    """The peak of loading when the file's dtype is not the dtype in which the weights are held.

    transformers reads every tensor and casts it (`core_model_loading._materialize_copy`, 5.17 to 5.23); the
    tensors that were read stay alive until the last one is in place. Adapters, as large as their gradients, come
    afterwards. On a GPU the cast happens in host memory, before the model moves to the device.
    """
    held_dtype = StoredDtype.BF16 if plan.precision is Precision.BF16 else StoredDtype.FP32
    same_dtype = job.model.stored_dtype is held_dtype
    if same_dtype or job.hardware.kind is not DeviceKind.CPU or plan.method is Method.QLORA:
        return peak  # quantised weights are read one by one
    held, stored = (4 if dtype is StoredDtype.FP32 else 2 for dtype in (held_dtype, job.model.stored_dtype))
    adapters = 0 if plan.method is Method.FULL else resident[Category.GRADIENTS]
    weights = resident[Category.PARAMETERS] - adapters
    copy = weights // held * stored
    if copy <= adapters:
        return peak
    amounts = {
        **peak.by_category_bytes,
        Category.PARAMETERS: weights,
        Category.TEMPORARIES: copy,
    }
    return PhasePeak(Phase.LOAD, sum(amounts.values()), amounts)
