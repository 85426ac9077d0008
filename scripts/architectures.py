"""Every causal language model of the installed transformers, small and random, through the tracer.

For each model type: the skyline of a trace with symbols, extended over depth, beside a trace of every layer at the
true shape. The two must agree; where the tracer can't follow a model, it must say so by UnsupportedByPlanner. No
weights are made and nothing is trained.

    python -m scripts.architectures                          all of them; prints a table
    python -m scripts.architectures llama4_text mamba2       these
    python -m scripts.architectures --write                  also writes docs/accuracy/<date>-architectures.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from launcher import workload
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.plan import Plan
from launcher.planner import trace
from launcher.planner.skyline import Skyline
from launcher.planner.tracer import Subject

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH = 3, 144
LIMIT_SECONDS = 240
SMALL: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 192,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "kv_lora_rank": 96,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "rotary_dim": 16,
    "state_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What makes a model small, by the names that its config has."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 32},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_chunk_size": 32},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512, "mamba_chunk_size": 32},
    "doge": {"num_experts": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 384, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
"""What some families need besides."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model type."""

    model_type: str
    verdict: str
    """`agrees`, `differs`, `refused` (UnsupportedByPlanner), `broken` (another exception), `config` or `late`."""
    detail: str = ""
    largest_error_percent: float | None = None
    """Of the peaks of all phases: the skyline's against that of every layer traced at the true shape."""
    seconds: float = 0.0


def architecture(model_type: str) -> dict[str, Any]:
    """A small model of a family."""
    own = CONFIG_MAPPING[model_type]()
    text = own.get_text_config()
    small = {name: value for name, value in SMALL.items() if name in text.to_dict()}
    small |= {key: SMALL[name] for name, key in text.attribute_map.items() if name in SMALL}
    if (
        "kv_lora_rank" in small
    ):  # latent attention: every head has keys of its own, and the rotated part is a head
        small |= {"num_key_value_heads": SMALL["num_attention_heads"], "head_dim": SMALL["qk_rope_head_dim"]}
    lists = {
        name: list(value)[: SMALL["num_hidden_layers"]]
        for name, value in text.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers and len(value) > 2
    }
    small |= lists | dict(OWN.get(model_type, {}))
    if text is not own:
        name = next(key for key, value in own.__dict__.items() if value is text)
        return {"model_type": model_type, name: {"model_type": text.model_type, **small}}
    return {"model_type": model_type, **small}


def subject(facts: Mapping[str, Any], method: Method, checkpointing: Checkpointing) -> trace.TraceSubject:
    """What is traced of a model."""
    job = JobSpec(
        model=ModelSpec(architecture=dict(facts)),
        data=DataSpec(packing=True),
        training=TrainingSpec(max_steps=2, report_to=()),
        hardware=HardwareSpec(kind=DeviceKind.CPU),
    )
    plan = Plan(
        method=method,
        rank=0 if method is Method.FULL else 96,
        max_length=LENGTH,
        micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        activation_checkpointing=checkpointing,
        attention=Attention.SDPA,
        loss=Loss.CHUNKED,
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision.FP32,
    )
    if not trace.facts(Subject(job, plan, job.hardware)).supports_sdpa:
        plan = Plan(**{**asdict(plan), "attention": Attention.EAGER})
    return trace.TraceSubject(job, plan, job.hardware, workload.model_config("", job.model))


def largest_error_percent(skyline: Skyline, whole: Skyline) -> float:
    """The largest error over the phases, signed."""
    pairs = zip(skyline.peaks(BATCH, LENGTH, 1), whole.peaks(BATCH, LENGTH, 1), strict=True)
    errors = [100.0 * (one.allocated_bytes / other.allocated_bytes - 1.0) for one, other in pairs]
    return max(errors, key=abs)


def examine(model_type: str) -> Outcome:
    """Traces one model type both ways, with adapters and whole."""
    began = time.perf_counter()
    errors: list[float] = []
    try:
        facts = architecture(model_type)
    except Exception as failure:  # a family that this script can't make small
        return Outcome(model_type, "config", f"{type(failure).__name__}: {failure}"[:300])
    try:
        for method, checkpointing in ((Method.LORA, Checkpointing.NONE), (Method.FULL, Checkpointing.FULL)):
            traced = subject(facts, method, checkpointing)
            skyline = trace.trace_regime(traced, BATCH, LENGTH, 1)
            whole = trace.trace_full_depth(traced, BATCH, LENGTH, 1)
            errors.append(largest_error_percent(skyline, whole))
    except UnsupportedByPlanner as refusal:
        return Outcome(model_type, "refused", str(refusal)[:500], None, time.perf_counter() - began)
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        detail = f"{type(failure).__name__}: {failure} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(model_type, "broken", detail[:500], None, time.perf_counter() - began)
    worst = max(errors, key=abs)
    verdict = "agrees" if abs(worst) < 0.01 else "differs"
    return Outcome(model_type, verdict, "", worst, time.perf_counter() - began)


def _examine_into(pipe: Any, model_type: str) -> None:
    torch.set_num_threads(1)
    pipe.send(examine(model_type))


def examine_apart(model_type: str) -> Outcome:
    """As `examine`, in a process of its own with a limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_examine_into, args=(theirs, model_type))
    child.start()
    outcome = Outcome(model_type, "late", f"more than {LIMIT_SECONDS} s")
    if ours.poll(LIMIT_SECONDS):
        try:
            outcome = ours.recv()
        except EOFError:
            outcome = Outcome(model_type, "broken", "the process died")
    child.kill()
    child.join()
    return outcome


def write_data(outcomes: Sequence[Outcome]) -> None:
    """Writes the dated data file."""
    today = datetime.date.today().isoformat()
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    data = {
        "date": today,
        "shape": {"batch": BATCH, "length": LENGTH},
        "versions": versions,
        "counts": dict(Counter(outcome.verdict for outcome in outcomes)),
        "results": [asdict(outcome) for outcome in outcomes],
    }
    target = ROOT / "docs" / "accuracy" / f"{today}-architectures.json"
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_types", nargs="*", help="default: all causal language models")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy/<date>-architectures.json")
    options = parser.parse_args()
    names = options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    outcomes: list[Outcome] = []
    for name in names:
        outcome = examine_apart(name)
        outcomes.append(outcome)
        error = outcome.largest_error_percent
        figure = "" if error is None else f"{error:+.4f} %"
        print(
            f"{name:<28}{outcome.verdict:<10}{figure:>12}{outcome.seconds:7.1f} s  {outcome.detail}",
            flush=True,
        )
    print(dict(Counter(outcome.verdict for outcome in outcomes)), file=sys.stderr)
    if options.write:
        write_data(outcomes)


if __name__ == "__main__":
    main()
