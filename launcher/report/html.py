"""One HTML file about a plan: it needs no network and no server, and its numbers move with three sliders.

Everything that a reader without scripts needs is written out as text and tables here; page/ holds what moves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from launcher.job import Engine
from launcher.plan import Plan
from launcher.report import sections
from launcher.report.documents import plan_fields
from launcher.report.findings import Findings
from launcher.report.plot import data_url, draw_step, unit_of
from launcher.units import format_bytes
from launcher.whatif import CATEGORIES, Regime, Surface

FOLDER = "page"
SCRIPTS = ("skyline.js", "page.js")


def page(findings: Findings) -> str:
    """The page, whole."""
    what_if, job = findings.what_if, findings.job
    values: dict[str, str] = {
        "title": escape(findings.title),
        "subtitle": escape(" · ".join(filter(None, (job.model.path, job.hardware.product)))),
        "style": _source("page.css"),
        "lead": sections.lead(findings),
        "knobs": sections.knobs(findings.plan),
        "because": sections.paragraph(findings.choice.reason if findings.choice else ""),
        "notes": "".join(sections.paragraph(note, "note") for note in findings.notes),
        "last_split": str(len(what_if.splits) - 1),
        "last_card": str(len(what_if.cards) - 1),
        "shortest": str(what_if.lengths[0]),
        "longest": str(what_if.lengths[-1]),
        "length_step": str(what_if.length_step),
        "exact_note": escape(sections.exact_note(findings)),
        "capacity": format_bytes(findings.capacity_bytes),
        "map": sections.map_table(what_if, findings.capacity_bytes),
        "unit": unit_of(what_if)[1],
        "map_note": escape(sections.map_note(findings)),
        "bill": sections.bill_part(findings),
        "step_note": escape(sections.step_note(findings)),
        "step_picture": data_url(draw_step(findings)),
        "alternatives": sections.alternatives(findings),
        "about": escape(_about(findings)),
        "model": script_json(model(findings)),
        "plotly": inline_script(plotting_library()),
        "scripts": "\n".join(_source(name) for name in SCRIPTS),
    }
    return Template(_source("page.html")).substitute(values)


def script_json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII, so no line separators that scripts take for ends
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def inline_script(source: str) -> str:
    """A script that can stand in a page: `</script` and `<!--`, which occur in strings only, are taken apart."""
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", source, flags=re.IGNORECASE)


def plotting_library() -> str:
    """plotly.js, out of the installed Python package, which this project calls nothing else of."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def model(findings: Findings) -> dict[str, Any]:
    """What the page's scripts compute with."""
    what_if, bill = findings.what_if, findings.bill
    return {
        "plan": {"batch": findings.plan.micro_batch_size, "length": findings.plan.max_length},
        "pins": pins(findings.plan),
        "global_batch_size": findings.job.training.global_batch_size,
        "categories": [name.value for name in CATEGORIES],
        "splits": [
            {
                "batch": s.micro_batch_size,
                "steps": s.gradient_accumulation_steps,
                "global": s.global_batch_size,
            }
            for s in what_if.splits
        ],
        "lengths": what_if.lengths,
        "length_step": what_if.length_step,
        "cards": [{"name": card.name, "bytes": card.memory_bytes} for card in what_if.cards],
        "memory_bytes": findings.capacity_bytes,
        "unit": {"name": unit_of(what_if)[1], "bytes": unit_of(what_if)[0]},
        "bound": findings.estimate.peak_device_bytes,
        "headroom": what_if.headroom,
        "context_bytes": what_if.context_bytes,
        "host_memory_bytes": what_if.host_memory_bytes,
        "regimes": [_regime(regime) for regime in what_if.regimes],
        "gaps": [asdict(gap) for gap in what_if.gaps],
        "speeds": {
            f"{p.split.micro_batch_size}x{p.split.gradient_accumulation_steps}x{p.length}": p.tokens_per_second
            for p in what_if.points
            if p.tokens_per_second is not None
        },
        "step": {
            "predicted": bill.step.allocated_bytes,
            "phases": [phase.value for phase in bill.step.phases],
            "measured": None if findings.measured is None else findings.measured.allocated_bytes,
        },
    }


def pins(plan: Plan) -> list[str]:
    """The keys that hold a plan's other knobs."""
    names = ["method", "activation_checkpointing", "attention", "loss"]
    names += ["rank"] if plan.rank else []
    names += ["engine", "zero_stage"] if plan.engine is not Engine.NONE else []
    words = [f"planner.pin.{name}={plan_fields(plan)[name]}" for name in names]
    return words + (["planner.pin.overlap_exchange=false"] if plan.has_small_buckets else [])


def _regime(regime: Regime) -> dict[str, Any]:
    return {
        "bounds": asdict(regime.bounds),
        "traced_accumulation": regime.traced_accumulation,
        "device": _surface(regime.device),
        "host": None if regime.host is None else _surface(regime.host),
        "process_bytes": regime.process_bytes,
    }


def _surface(surface: Surface) -> dict[str, Any]:
    return {
        "exponents": surface.exponents,
        "waiting": surface.waiting,
        "phases": [{"phase": item.phase.value, "rows": item.rows} for item in surface.phases],
    }


def _source(name: str) -> str:
    return files("launcher.report").joinpath(FOLDER, name).read_text(encoding="utf-8")


def _about(findings: Findings) -> str:
    named: Mapping[str, str] = findings.versions
    versions = ", ".join(f"{name} {number}" for name, number in sorted(named.items()) if number != "absent")
    return (
        "Traced from the training step itself on tensors without data. Bytes are predictions; how far they were off on "
        f"measured runs stands in docs/accuracy.md and docs/gpu.md. Libraries: {versions}."
    )
