"""Which trace answers for a plan.

A key of the trace cache is made of all that a trace depends on, which takes milliseconds. Plans that differ in their
shape alone share all of it but the shape's regime, so keys are made once for each regime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.domain import Domain
from launcher.errors import UnsupportedByPlanner
from launcher.job import Checkpointing, Engine, JobSpec, Loss
from launcher.plan import Plan, varied
from launcher.planner.bounds import replicated_plan
from launcher.planner.depth import DepthPlan
from launcher.planner.group import Group, Split
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import domain_of, symbolic_shape
from launcher.planner.subject import alone, subject_of
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Subject, SubjectFacts, Tracer


@dataclass(frozen=True)
class Question:
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


class Questions:
    """The traces that the plans of one job ask for.

    Args:
        job: The job.
        tracer: Knows the facts of a job.
        cache: Keeps them.
    """

    def __init__(self, job: JobSpec, tracer: Tracer, cache: TraceCache) -> None:
        self._job = job
        self._tracer = tracer
        self._cache = cache
        self._known: dict[tuple[Plan, bool], Question] = {}
        self._facts: dict[str, SubjectFacts] = {}
        # plans stand here for all that have another shape
        self._subjects: dict[Plan, tuple[Subject, SubjectFacts]] = {}
        self._regimes: dict[tuple[Plan, int], list[Question]] = {}
        self._replicated: dict[Plan, Plan] = {}
        self._groups: dict[
            tuple[Plan, int, tuple[Split, ...]], tuple[tuple[Question, tuple[Split, ...]], ...]
        ] = {}

    def question(self, plan: Plan, *, exact: bool) -> Question:
        """What a plan asks for.

        Args:
            plan: The plan.
            exact: Whether for a trace at its true shape, instead of its regime.

        Raises:
            UnsupportedByPlanner: When the plan's length is too short for the job.
        """
        known = self._known.get((plan, exact))
        if known is None:
            known = self._known[plan, exact] = self._ask(plan, exact=exact)
        return known

    def by_question(self, group: Group) -> tuple[tuple[Question, tuple[Split, ...]], ...]:
        """What the plans of a group ask for, and which of them each answers for.

        Raises:
            UnsupportedByPlanner: When the group's length is too short for the job.
        """
        like, length = _without_shape(group.like), group.like.max_length
        known = self._groups.get((like, length, group.splits))
        if known is None:
            regimes = {steps: self._regimes.setdefault((like, steps), []) for steps in (1, 2)}
            found: dict[str, tuple[Question, list[Split]]] = {}
            for split in group.splits:
                holding = (q for q in regimes[min(split[1], 2)] if q.domain.contains(split[0], length))
                question = next(holding, None) or self._ask(group.plan(split), exact=False)
                found.setdefault(question.key, (question, []))[1].append(split)
            known = tuple((question, tuple(splits)) for question, splits in found.values())
            self._groups[like, length, group.splits] = known
        return known

    def facts(self, plan: Plan) -> SubjectFacts:
        """What is known of a plan without a trace."""
        return self._subject(_without_shape(plan))[1]

    def replicated(self, plan: Plan) -> Plan | None:
        """The same plan with nothing sharded; None where no plan of that kind was asked about."""
        known = self._replicated.get(replicated_plan(_without_shape(plan)))
        if known is None:
            return None
        shape = {
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "max_length": plan.max_length,
        }
        return varied(known, **shape)

    def _ask(self, plan: Plan, *, exact: bool) -> Question:
        like = _without_shape(plan)
        batch, length = plan.micro_batch_size, plan.max_length
        accumulation = min(plan.gradient_accumulation_steps, 2)
        regimes = self._regimes.setdefault((like, accumulation), [])
        if exact:
            return self._made(plan, like, accumulation, exact=True)
        for question in regimes:
            if question.domain.contains(batch, length):
                return question
        question = self._made(plan, like, accumulation, exact=False)
        regimes.append(question)
        if plan.engine in (Engine.DDP, Engine.NONE):
            self._replicated[replicated_plan(like)] = like
        return question

    def _made(self, plan: Plan, like: Plan, accumulation: int, *, exact: bool) -> Question:
        subject, facts = self._subject(like)
        batch, length = plan.micro_batch_size, plan.max_length
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
        key = self._cache.key(subject, what)
        return Question(subject, facts, domain, shape, accumulation, attempts, key)

    def _subject(self, like: Plan) -> tuple[Subject, SubjectFacts]:
        known = self._subjects.get(like)
        if known is None:
            subject = subject_of(self._job, like)
            known = self._subjects[like] = subject, self._facts_of(subject)
        return known

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


def _without_shape(plan: Plan) -> Plan:
    """What a trace depends on but for the shape."""
    return varied(plan, micro_batch_size=1, gradient_accumulation_steps=1, max_length=8)
