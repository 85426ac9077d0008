"""What the libraries say about a subject before anything is traced: its regimes, its depths, the sizes of its weights."""

from __future__ import annotations

from dataclasses import replace

from launcher import workload
from launcher.job import Attention, Method
from launcher.planner.depth import plan_depths
from launcher.planner.trace import TraceSubject, lines_by_loss, open_subject, shallow_model
from launcher.planner.tracer import Subject, SubjectFacts


def facts(subject: Subject) -> SubjectFacts:
    """What the libraries say about a subject before anything is traced."""
    opened = open_subject(subject)
    text = opened.config.get_text_config()
    model_class = workload.AUTO_CLASSES[subject.job.model.task]._model_mapping.get(type(opened.config), None)
    supports_sdpa = bool(getattr(model_class, "_supports_sdpa", True))
    if not supports_sdpa:  # its lines are asked for before the planner knows
        opened = replace(opened, plan=replace(opened.plan, attention=Attention.EAGER))
    depths = plan_depths(text)
    weights = [_weights(opened, depth) for depth in depths.depths]
    whole = [
        round(few + depths.steps * (more - few)) for few, more in zip(weights[0], weights[-1], strict=True)
    ]
    return SubjectFacts(lines_by_loss(opened), depths, text.num_hidden_layers, supports_sdpa, *whole)


def _weights(subject: TraceSubject, depth: int) -> tuple[int, int, int]:
    """Bytes of all weights of a model of so many layers (0: quantised ones), of the trained ones, and their number."""
    parameters = list(shallow_model(subject, depth).parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    held = 0 if subject.plan.method is Method.QLORA else sum(parameter.nbytes for parameter in parameters)
    return held, sum(item.nbytes for item in trained), sum(item.numel() for item in trained)
