"""Predicted peak memory against what others measured on their GPUs and published.

Every row of docs/accuracy/published.csv is either traced, as the job that it was, or listed with the reason
why not. A traced row is predicted twice: with the libraries as they are installed, and with the known
differences of the row's own code put back (scripts/published_differences.py). Beside it stands what published
estimators say.

    python scripts/published.py                    all rows; prints the tables
    python scripts/published.py --only FMSG-001    only these rows
    python scripts/published.py --write            also docs/published.md and its data in docs/accuracy
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.modeling import calculate_maximum_sizes
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from launcher import workload
from launcher.job import Attention
from launcher.memory import Category, MemoryEstimate, Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.estimate import read_estimate
from launcher.planner.skyline import Skyline
from launcher.planner.trace import TraceSubject, trace_regime
from scripts import published_estimators as estimators
from scripts.published_differences import Difference, bf16_weights_under_autocast, put_back
from scripts.published_page import Result, page, table
from scripts.published_rows import (
    ROOT,
    Expression,
    Quantity,
    Row,
    architectures,
    express,
    read_rows,
    reason_not_expressed,
)

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
PHASES = (Phase.TRAIN_STEP, Phase.OPTIMIZER_STEP)
"""Phases that every row's counter covers."""


@dataclass
class Traces:
    """Skylines of distinct jobs, each traced once: rows that differ in batch or length share one."""

    skylines: dict[str, list[Skyline]] = field(default_factory=dict)

    def estimate(self, expression: Expression, differences: frozenset[Difference]) -> MemoryEstimate:
        """The memory of a row's job, with some differences put back."""
        plan, job = expression.plan, expression.job
        key = f"{job} {_shapeless(plan)} {sorted(differences)} {plan.gradient_accumulation_steps > 1}"
        known = self.skylines.setdefault(key, [])
        batch, length = plan.micro_batch_size, plan.max_length
        skyline = next((one for one in known if one.domain.contains(batch, length)), None)
        if skyline is None:
            skyline = _trace(expression, differences)
            known.append(skyline)
        return read_estimate(skyline, plan, job)


def _shapeless(plan: Plan) -> Plan:
    return replace(plan, micro_batch_size=1, max_length=1, gradient_accumulation_steps=1)


def _trace(expression: Expression, differences: frozenset[Difference]) -> Skyline:
    job, plan = expression.job, expression.plan
    config = workload.model_config("", job.model)
    with ExitStack() as stack:
        if expression.autocast_over_bf16:
            stack.enter_context(bf16_weights_under_autocast())
        stack.enter_context(put_back(differences))
        return trace_regime(
            TraceSubject(job, plan, job.hardware, config),
            plan.micro_batch_size,
            plan.max_length,
            plan.gradient_accumulation_steps,
        )


def highest(estimate: MemoryEstimate) -> PhasePeak:
    """The highest moment of the phases that were measured."""
    return max(
        (peak for peak in estimate.phases if peak.phase in PHASES), key=lambda peak: peak.allocated_bytes
    )


def predicted_bytes(quantity: Quantity, estimate: MemoryEstimate) -> int:
    """What the planner says of the counter that a row reports.

    Allocated: live tensors, and the matrix library's workspaces, which come from the same allocator.
    Reserved: the same, a lower bound. Replaying the allocator for one shape says nothing of these rows,
    whose lengths vary; a row of one length would read `PhasePeak.reserved_bytes` here.
    """
    match quantity:
        case Quantity.ALLOCATED | Quantity.RESERVED:
            return highest(estimate).allocated_bytes


def mechanism(peak: PhasePeak) -> str:
    """What the highest moment is made of."""
    if peak.phase is Phase.OPTIMIZER_STEP:
        return "optimizer step"
    parts = peak.by_category_bytes
    in_head = parts[Category.LOGITS_AND_LOSS] > parts[Category.TEMPORARIES]
    return "logits and loss" if in_head else "one layer's backward pass"


def model_size(config: PretrainedConfig) -> estimators.ModelSize:
    """The sizes of a model, counted on its empty modules."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with init_empty_weights():
        backbone = AutoModel.from_config(config, dtype=torch.float32)
    backbone_bytes, _ = calculate_maximum_sizes(backbone)
    text = config.get_text_config()
    return estimators.ModelSize(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        largest_layer_parameters=max(
            sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()
        ),
        backbone_fp32_bytes=int(backbone_bytes),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
    )


def trainable_parameters(expression: Expression) -> int:
    """Trained weights of a job, counted on its empty modules."""
    unprepared = replace(expression.job.method, kbit_preparation=False)  # asks for quantised weights
    job = replace(expression.job, method=unprepared)
    plan = replace(expression.plan, attention=Attention.SDPA)  # needs no kernels that may be missing
    with torch.device("meta"):
        model = workload.build_model(workload.model_config("", job.model), plan, "", job)
        adapted = workload.attach_adapters(model, job, plan)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def others(expression: Expression, size: estimators.ModelSize) -> dict[str, int]:
    """What published estimators say of a job, bytes."""
    plan, trained = expression.plan, trainable_parameters(expression)
    return {
        "accelerate_float16": estimators.accelerate_bytes(size, "float16"),
        "accelerate_float32": estimators.accelerate_bytes(size, "float32"),
        "deepspeed_zero2": estimators.deepspeed_zero2_bytes(size),
        "deepspeed_zero3": estimators.deepspeed_zero3_bytes(size),
        "rule_of_thumb": estimators.rule_of_thumb_bytes(size, plan, trained),
        "transformer_math": estimators.transformer_math_bytes(size, plan, trained),
    }


def predict(row: Row, traces: Traces) -> Result:
    """Traces one row that can be expressed, as it is and with its differences put back."""
    expression, quantity = express(row), row.counter
    assert quantity is not None  # else the row has a reason
    estimate = traces.estimate(expression, frozenset())
    with_differences = traces.estimate(expression, expression.differences)
    config = workload.model_config("", expression.job.model)
    peak = highest(estimate)
    return {
        "id": row.id,
        "reason": "",
        "source": row.source,
        "confidence": row.confidence,
        "library_versions": row.library_versions,
        "model": row.model,
        "method": row.method,
        "shape": row.shape,
        "length_is_exact": not row.length_kind.startswith("cap"),
        "kernels": row.kernel_family.value,
        "quantity": quantity.value,
        "measured_bytes": row.measured_bytes,
        "predicted_bytes": predicted_bytes(quantity, estimate),
        "phase": peak.phase.value,
        "mechanism": mechanism(peak),
        "by_category_bytes": {part.value: size for part, size in peak.by_category_bytes.items() if size},
        "differences": sorted(expression.differences),
        "predicted_as_run_bytes": predicted_bytes(quantity, with_differences),
        "autocast_over_bf16": expression.autocast_over_bf16,
        "others_bytes": others(expression, model_size(config)),
    }


def run(rows: Sequence[Row]) -> list[Result]:
    """Predicts what can be expressed; gives the reason for what can't."""
    traces = Traces()
    results: list[Result] = []
    for row in rows:
        reason = reason_not_expressed(row)
        if reason:
            results.append({"id": row.id, "source": row.source, "reason": reason})
            continue
        results.append(predict(row, traces))
        print(f"{row.id} {len(traces.skylines)} jobs traced", file=sys.stderr, flush=True)
    return results


def write_report(results: list[Result]) -> None:
    """Writes the dated data file and the page generated from it."""
    data: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
        "rows": results,
    }
    target = ROOT / "docs" / "accuracy" / f"{data['date']}-published.json"
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "published.md").write_text(page(data, target.name), encoding="utf-8")
    write_evidence(results)


def write_evidence(results: Sequence[Result]) -> None:
    """Writes the residuals that the planner's intervals on CUDA rest on (launcher/planner/interval.py).

    Only rows that ran the libraries' own kernels, and their predictions with today's libraries: putting back what
    was different then was done after the misses were known.
    """
    models = architectures()
    kept = [
        {
            "device_kind": "cuda",
            "method": row["method"],
            "model_type": models[row["model"]]["model_type"],
            "predicted_bytes": row["predicted_bytes"],
            "measured_bytes": row["measured_bytes"],
        }
        for row in results
        if row.get("predicted_bytes") and row["quantity"] == "allocated" and row["kernels"] == "library"
    ]
    file = ROOT / "launcher" / "planner" / "evidence" / "cuda.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", help="the rows of these names")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy and docs/published.md")
    options = parser.parse_args()
    results = run([row for row in read_rows() if options.only is None or row.id in options.only])
    print(table(results, Quantity.ALLOCATED.value))
    print(table(results, Quantity.RESERVED.value))
    if options.write:
        write_report(results)


if __name__ == "__main__":
    main()
