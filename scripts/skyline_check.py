"""Skylines against fresh traces at random shapes, and extended depth against full depth.

A skyline is traced once per regime, at a prime shape and at two small depths; here it is asked for shapes
that it never saw, and each answer is compared with a trace of exactly that shape. Nothing is trained: what is
tested is the arithmetic that turns few traces into many answers; the traces themselves are tested by
scripts/accuracy.py.

    python scripts/skyline_check.py                    all architectures; prints the table
    python scripts/skyline_check.py --write            also docs/accuracy/<date>-skyline.json, docs/skyline.md
    python scripts/skyline_check.py --only llama gpt2 --shapes 8
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher import workload
from launcher.domain import Domain
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import (
    Attention,
    Checkpointing,
    DataSpec,
    EvaluationSpec,
    JobSpec,
    Loss,
    Method,
    ModelSpec,
    Optimizer,
    Precision,
    TrainingSpec,
)
from launcher.memory import Phase, PhasePeak
from launcher.plan import Plan
from launcher.planner.depth import plan_depths
from launcher.planner.regimes import domain_of
from launcher.planner.skyline import Skyline
from launcher.planner.trace import TraceSubject, regime_lines, trace_full_depth, trace_regime, trace_shape

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
LONGEST, SHORTEST = 16384, 128
TOKENS_MAX = 8 * 16384
"""Most tokens of a shape: the largest shape of the acceptance range."""
CORNERS = ((2, 128), (8, 16384))
"""The ends of the acceptance range, in turn the first shape of every setting."""

WIDTHS = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 40,
    "vocab_size": 34000,
    "max_position_embeddings": 32768,
}
"""A third of the width of a small model. The vocabulary is above one tile of the chunked loss (32768)."""
ALTERNATING = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 8, "tie_word_embeddings": False, **WIDTHS},
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 8, "tie_word_embeddings": True, **WIDTHS},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 10,
        "sliding_window": 1024,
        "layer_types": ALTERNATING * 5,
        **WIDTHS,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 14,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 3 + ["sliding_attention"] * 2,
        **WIDTHS,
    },
    "mistral": {"model_type": "mistral", "num_hidden_layers": 8, "sliding_window": 1000, **WIDTHS},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 208,
        "tie_word_embeddings": False,
        **WIDTHS,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_hidden_layers": 6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **WIDTHS,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 8,
        "n_embd": 320,
        "n_head": 8,
        "n_positions": 32768,
        "vocab_size": 34000,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ALTERNATING * 4,
        **WIDTHS,
    },
}
"""By the transformers name of the architecture."""
EAGER_ONLY = ("gemma2", "gpt_oss")
"""Architectures for which transformers has no sdpa: soft-capped scores, attention sinks."""


@dataclass(frozen=True)
class Setting:
    """Everything of a job, besides the architecture, that changes what a step allocates."""

    kind: str
    method: str
    checkpointing: str
    loss: str
    packing: bool
    precision: str = "bf16"
    evaluation: bool = False


SETTINGS = (
    Setting("cuda", "lora", "full", "chunked", packing=True),
    Setting("cuda", "full", "none", "plain", packing=False),
    Setting("cpu", "lora", "none", "chunked", packing=False, precision="fp32"),
    Setting("cpu", "full", "full", "plain", packing=True, evaluation=True),
    Setting("cuda", "full", "none", "chunked", packing=True, precision="bf16_mixed"),
)
"""Every value of every option at least once, in turn over the shapes of an architecture."""


@dataclass
class Case:
    """One shape, compared."""

    architecture: str
    setting: Setting
    batch: int
    length: int
    accumulation: int
    symbolic: bool = True
    """False: no symbol fits into the regime, so the skyline is a trace of this very shape."""
    skyline_bytes: dict[str, int] = field(default_factory=dict)
    traced_bytes: dict[str, int] = field(default_factory=dict)
    full_depth_bytes: dict[str, int] = field(default_factory=dict)

    def error_percent(self, phase: str = "") -> float:
        """Signed error of the skyline against the trace of the shape; of the highest peak without a phase."""
        return _percent(self.skyline_bytes, self.traced_bytes, phase)

    def depth_error_percent(self) -> float | None:
        """Signed error of extended against full depth at the same shape; None where it was not compared."""
        return _percent(self.traced_bytes, self.full_depth_bytes, "") if self.full_depth_bytes else None


def _percent(answer: dict[str, int], truth: dict[str, int], phase: str) -> float:
    got = answer[phase] if phase else max(answer.values())
    want = truth[phase] if phase else max(truth.values())
    return 100.0 * (got - want) / want


def build_subject(architecture: str, setting: Setting) -> TraceSubject:
    """The subject of a trace; batch, length and accumulation of its plan are placeholders."""
    job = JobSpec(
        model=ModelSpec(architecture=ARCHITECTURES[architecture]),
        data=DataSpec(packing=setting.packing),
        training=TrainingSpec(max_steps=2, report_to=()),
        evaluation=EvaluationSpec(enabled=setting.evaluation),
    )
    method = Method(setting.method)
    plan = Plan(
        method=method,
        rank=24 if method is Method.LORA else 0,
        max_length=512,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        activation_checkpointing=Checkpointing(setting.checkpointing),
        attention=Attention.EAGER if architecture in EAGER_ONLY else Attention.SDPA,
        loss=Loss(setting.loss),
        optimizer=Optimizer.ADAMW_TORCH_FUSED,
        precision=Precision(setting.precision),
    )
    kind = DeviceKind(setting.kind)
    hardware = HardwareSpec(kind=kind, supports_flash_attention=kind is DeviceKind.CUDA)
    return TraceSubject(job, plan, hardware, workload.model_config("", job.model))


def random_shapes(subject: TraceSubject, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Random (batch, length) within the acceptance range, each regime in turn."""
    lines = regime_lines(subject)
    drawn = [_random_shape(rng) for _ in range(2000)]
    by_regime: dict[Domain, list[tuple[int, int]]] = {}
    for batch, length in drawn:
        by_regime.setdefault(domain_of(batch, length, lines), []).append((batch, length))
    queues = sorted(by_regime.values(), key=lambda shapes: shapes[0])
    rng.shuffle(queues)
    shapes = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return shapes[:count]


def _random_shape(rng: random.Random) -> tuple[int, int]:
    length = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
    batch = rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32))
    return min(batch, max(1, TOKENS_MAX // length)), length


def compare(architecture: str, count: int, seed: int) -> Iterator[Case]:
    """Compares `count` shapes of one architecture, spread over the settings."""
    rng = random.Random(f"{architecture} {seed}")
    for index, setting in enumerate(SETTINGS):
        share = len(range(index, count, len(SETTINGS)))
        subject = build_subject(architecture, setting)
        skylines: dict[tuple[Domain, int], Skyline] = {}
        corner = CORNERS[index % len(CORNERS)]
        shapes = (corner, *random_shapes(subject, share, rng))[:share]
        for turn, (batch, length) in enumerate(shapes):
            accumulation = rng.choice((1, 2, 3, 5))
            domain = domain_of(batch, length, regime_lines(subject))
            key = (domain, min(accumulation, 2))
            if key not in skylines:
                skylines[key] = trace_regime(subject, batch, length, accumulation)
            case = Case(architecture, setting, batch, length, accumulation)
            case.symbolic = skylines[key].domain == domain
            case.skyline_bytes = _by_phase(skylines[key].peaks(batch, length, accumulation))
            exact = trace_shape(subject, batch, length, accumulation)
            case.traced_bytes = _by_phase(exact.peaks(batch, length, accumulation))
            if turn == 0 and len(plan_depths(subject.config.get_text_config()).depths) == 2:
                whole = trace_full_depth(subject, batch, length, accumulation)
                case.full_depth_bytes = _by_phase(whole.peaks(batch, length, accumulation))
            yield case


def _by_phase(peaks: Sequence[PhasePeak]) -> dict[str, int]:
    return {peak.phase.value: peak.allocated_bytes for peak in peaks}


def worst(cases: Sequence[Case], phase: str = "") -> float:
    """The signed error that is largest in size, percent, among the cases that have the phase."""
    return max((case.error_percent(phase) for case in cases if phase in ("", *case.traced_bytes)), key=abs)


def table(cases: Sequence[Case]) -> str:
    """One line per architecture: worst signed errors, percent."""
    phases = [phase.value for phase in Phase if any(phase.value in case.traced_bytes for case in cases)]
    lines = [
        "| architecture | shapes | by symbols | peak | "
        + " | ".join(phases)
        + " | peak, plain loss | depth |",
        "|---|" + "--:|" * (len(phases) + 5),
    ]
    for name in dict.fromkeys(case.architecture for case in cases):
        own = [case for case in cases if case.architecture == name]
        plain = [case for case in own if case.setting.loss == "plain"]
        depths = [error for case in own if (error := case.depth_error_percent()) is not None]
        cells = [
            name,
            str(len(own)),
            str(sum(case.symbolic for case in own)),
            *(_cell(own, phase) for phase in ("", *phases)),
            f"{worst(plain):+.5f} %" if plain else "-",
            f"{max(depths, key=abs):+.5f} %" if depths else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(cases: Sequence[Case], phase: str) -> str:
    known = [case for case in cases if phase in ("", *case.traced_bytes)]
    return f"{worst(known, phase):+.4f} %" if known else "-"


def cases_of(data: Mapping[str, Any]) -> list[Case]:
    """The cases of a data file, as they were compared."""
    known = {item.name for item in fields(Case)}
    return [
        Case(
            **{key: value for key, value in case.items() if key in known}
            | {"setting": Setting(**case["setting"])}
        )
        for case in data["cases"]
    ]


def page(data: Mapping[str, Any], name: str) -> str:
    """The page of a data file of that name."""
    lines = [
        "# Skylines against fresh traces",
        "",
        "Generated by `python scripts/skyline_check.py --write`; the data, with every shape and setting, lie",
        f"in docs/accuracy/{name}. A skyline comes from traces at one prime shape and two small",
        "depths; each cell is its worst signed error against traces of the very shapes, at random shapes of",
        f"every regime ({SHORTEST} to {LONGEST} tokens, batch 1 to 32), over devices, methods,",
        "checkpointing, losses, packing and accumulation. `by symbols` counts the shapes whose regime holds",
        "a prime shape; the others, in regimes too narrow for one, were traced as they are. `depth` compares",
        "extension over depth with a trace of every layer at the same shape.",
        "",
        f"{data['date']}, " + ", ".join(f"{name} {number}" for name, number in data["versions"].items()),
        "",
        table(cases_of(data)),
        "",
        "CUDA's attention kernels round lengths up to their tiles, and so do both traces.",
        "",
        "This says that few traces answer for all shapes. It doesn't say that a trace is what a device does:",
        "that is docs/accuracy.md.",
        "",
    ]
    return "\n".join(lines)


def write_report(cases: Sequence[Case]) -> None:
    """Writes the dated data file and the page generated from it."""
    today = datetime.date.today().isoformat()
    data = {
        "date": today,
        "versions": {name: version(name) for name in LIBRARIES},
        "architectures": ARCHITECTURES,
        "cases": [{**asdict(case), "error_percent": case.error_percent()} for case in cases],
    }
    target = ROOT / "docs" / "accuracy" / f"{today}-skyline.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "skyline.md").write_text(page(data, target.name), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=sorted(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--shapes", type=int, default=20, help="shapes per architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shapes")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy and docs/skyline.md")
    options = parser.parse_args()
    cases = []
    for name in options.only:
        began = time.monotonic()
        for case in compare(name, options.shapes, options.seed):
            cases.append(case)
            by_phase = {phase: round(case.error_percent(phase), 5) for phase in case.traced_bytes}
            print(
                f"{name} {case.batch}x{case.length} accumulation={case.accumulation} {case.setting}: "
                f"{case.error_percent():+.5f} % {by_phase} depth {case.depth_error_percent()} "
                f"{'' if case.symbolic else 'not symbolic '}"
                f"[{time.monotonic() - began:.0f} s]",
                file=sys.stderr,
                flush=True,
            )
    print(table(cases))
    if options.write:
        write_report(cases)


if __name__ == "__main__":
    main()
