"""Proves that a kept trace answers only for what it was made for, comes back bit for bit, or not at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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
    MethodSpec,
    ModelSpec,
    Optimizer,
    PlannerSpec,
    Precision,
    TrainingSpec,
)
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner import trace_cache
from launcher.planner.depth import DepthPlan
from launcher.planner.regimes import Lines
from launcher.planner.skyline import PhaseSkyline, Skyline
from launcher.planner.subject import subject_of
from launcher.planner.trace_cache import LIBRARIES, TRACED, TraceCache, library_versions, source_digest
from launcher.planner.tracer import SubjectFacts
from tests.test_layering import IMPORTS, MODULES, TREES

SHAPE = {"shape": {"batch": 5, "length": 499}}
JOB = JobSpec(
    model=ModelSpec(path="a/b", id="a/b", architecture={"model_type": "llama", "hidden_size": 64}),
    hardware=HardwareSpec(name="imagined", kind=DeviceKind.CUDA, memory_bytes=10**9),
)
PLAN = Plan(
    method=Method.LORA,
    rank=16,
    max_length=512,
    micro_batch_size=2,
    gradient_accumulation_steps=4,
    activation_checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.CHUNKED,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.BF16,
)
FACTS = SubjectFacts(
    {Loss.CHUNKED: Lines(4096, (128, 1024), (64, 96)), Loss.PLAIN: Lines(None, (128,), (64,))},
    DepthPlan((2, 3), 29.0),
    32,
    True,
)


def key(job: JobSpec = JOB, plan: Plan = PLAN, what: object = None) -> str:
    return TraceCache(None).key(subject_of(job, plan), {"what": what or SHAPE})


def awkward_skyline() -> Skyline:
    """Sizes that lose bits when a decimal is printed too short, and every optional bound."""
    dice = np.random.default_rng(0)
    rows = dice.random((7, len(Category), 3)) * 1e12 / 3
    return Skyline(
        domain=Domain(2, None, 128, 1023, 4097, None),
        exponents=((0, 0, 0), (1, 0, 0), (1, 1, 0)),
        phases=(PhaseSkyline(Phase.TRAIN_STEP, rows), PhaseSkyline(Phase.OPTIMIZER_STEP, rows[:1] + 0.1)),
        resident={
            Category.PARAMETERS: {(0, 0, 0): 2**53 + 1},
            Category.GRADIENTS: {(0, 0, 0): 3, (1, 1, 0): -2},
        },
        batch_inputs={(1, 1, 0): 24, (1, 0, 0): 8},
        traced_accumulation=2,
    )


# keys

RELEVANT: dict[str, Callable[[JobSpec], JobSpec]] = {
    "architecture": lambda job: replace(job, model=replace(job.model, architecture={"model_type": "llama"})),
    "own code": lambda job: replace(job, model=replace(job.model, trust_remote_code=True, code_digest="1a")),
    "adapters' places": lambda job: replace(job, method=MethodSpec(target_modules=("q_proj",))),
    "adapters' dropout": lambda job: replace(job, method=MethodSpec(dropout=0.1)),
    "packing": lambda job: replace(job, data=DataSpec(packing=True)),
    "clipping": lambda job: replace(job, training=TrainingSpec(max_grad_norm=0.0)),
    "evaluation": lambda job: replace(job, evaluation=EvaluationSpec(enabled=True)),
    "kind of device": lambda job: replace(job, hardware=HardwareSpec(kind=DeviceKind.CPU)),
    "flash attention": lambda job: replace(
        job, hardware=HardwareSpec(kind=DeviceKind.CUDA, supports_flash_attention=True)
    ),
}
IRRELEVANT: dict[str, Callable[[JobSpec], JobSpec]] = {
    "trust in code that is not there": lambda job: replace(
        job, model=replace(job.model, trust_remote_code=True)
    ),
    "learning rate": lambda job: replace(job, training=TrainingSpec(learning_rate=3e-3)),
    "seed": lambda job: replace(job, training=TrainingSpec(seed=7)),
    "steps": lambda job: replace(job, training=TrainingSpec(max_steps=7, logging_steps=3)),
    "another clipping norm": lambda job: replace(job, training=TrainingSpec(max_grad_norm=0.3)),
    "data path": lambda job: replace(job, data=DataSpec(path="elsewhere.jsonl", num_examples=5)),
    "run_dir": lambda job: replace(job, run_dir="elsewhere", recipe="other", trace_cache="off"),
    "where weights lie": lambda job: replace(
        job, model=replace(job.model, path="/copy", id="", revision="x")
    ),
    "alpha": lambda job: replace(job, method=MethodSpec(alpha=64)),
    "memory of the device": lambda job: replace(
        job, hardware=HardwareSpec(name="twin", kind=DeviceKind.CUDA, memory_bytes=1, context_bytes=5)
    ),
    "headroom": lambda job: replace(job, planner=PlannerSpec(headroom=0.5)),
}


@pytest.mark.parametrize("name", RELEVANT)
def test_key_changes_with_what_a_trace_depends_on(name: str) -> None:
    assert key(RELEVANT[name](JOB)) != key()


@pytest.mark.parametrize("name", IRRELEVANT)
def test_key_stays_with_what_changes_no_trace(name: str) -> None:
    assert IRRELEVANT[name](JOB) != JOB
    assert key(IRRELEVANT[name](JOB)) == key()


@pytest.mark.parametrize(
    "plan",
    [
        replace(PLAN, method=Method.FULL, rank=0),
        replace(PLAN, rank=8),
        replace(PLAN, precision=Precision.FP32),
        replace(PLAN, activation_checkpointing=Checkpointing.FULL),
        replace(PLAN, attention=Attention.EAGER),
        replace(PLAN, loss=Loss.PLAIN),
        replace(PLAN, optimizer=Optimizer.ADAMW_TORCH),
    ],
)
def test_key_changes_with_every_knob_of_the_plan(plan: Plan) -> None:
    assert key(plan=plan) != key()


def test_the_shape_is_in_the_question_and_not_in_the_subject() -> None:
    assert key(plan=replace(PLAN, micro_batch_size=1, gradient_accumulation_steps=8, max_length=64)) == key()
    assert key(what={"shape": {"batch": 5, "length": 503}}) != key()


def test_key_does_not_depend_on_the_order_of_facts() -> None:
    turned = dict(reversed(JOB.model.architecture.items()))
    assert list(turned) != list(JOB.model.architecture)
    assert key(replace(JOB, model=replace(JOB.model, architecture=turned))) == key()


@pytest.mark.parametrize("library", LIBRARIES)
def test_key_changes_with_every_library_version(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    other = library_versions() | {library: "0.0.1"}
    monkeypatch.setattr(trace_cache, "library_versions", lambda: other)
    assert key() != before


def test_versions_are_those_that_are_installed() -> None:
    assert set(library_versions()) == set(LIBRARIES)
    assert library_versions()["numpy"] == np.__version__


def test_key_changes_with_the_tracers_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(trace_cache, "source_digest", lambda package: "another")
    assert key() != before


def named_modules(module: str) -> set[str]:
    """Those of our modules that a module imports, by a statement or (heavy ones) by their names as text."""
    texts = {
        node.value.removeprefix("launcher.")
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("launcher.")
    }
    return ({found.target for found in IMPORTS[module] if found.is_ours} | texts) & MODULES.keys()


def test_the_digest_holds_all_that_a_tracing_process_imports() -> None:
    """And nothing else: an edit of the command line makes no trace again."""
    planner = {name for name in MODULES if name.startswith("planner.")}
    assert "planner.liger_twin" in named_modules("planner.stand_ins"), "imported by its name"
    seen, waiting = set[str](), [*planner]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += named_modules(name)
    assert {f"{name}.py" for name in seen - planner} == set(TRACED)
    assert {"workload.py", "loading.py", "plan.py", "memory.py"} <= set(TRACED)


def test_source_digest_sees_every_file_of_the_tracer(tmp_path: Path) -> None:
    (tmp_path / "planner").mkdir()
    for name in (*TRACED, "planner/tape.py", "planner/trace.py", "cli.py"):
        (tmp_path / name).write_text("a = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "cli.py").write_text("a = 2\n")
    assert source_digest(tmp_path) == before
    seen = {before}
    for name in (*TRACED, "planner/tape.py", "planner/trace.py"):
        (tmp_path / name).write_text("a = 3\n")
        seen.add(source_digest(tmp_path))
    (tmp_path / "planner/tape.py").rename(tmp_path / "planner/tapes.py")
    seen.add(source_digest(tmp_path))
    assert len(seen) == len(TRACED) + 4


# what is kept


def test_skyline_comes_back_bit_for_bit(nasty_path: Path) -> None:
    kept = awkward_skyline()
    TraceCache(nasty_path / "traces").keep_skyline("a", kept)
    back = TraceCache(nasty_path / "traces").skyline("a")
    assert back is not None
    assert (back.domain, back.exponents, back.traced_accumulation) == (kept.domain, kept.exponents, 2)
    assert (back.resident, back.batch_inputs) == (kept.resident, kept.batch_inputs)
    assert [item.phase for item in back.phases] == [item.phase for item in kept.phases]
    for ours, theirs in zip(back.phases, kept.phases, strict=True):
        assert ours.rows.dtype == theirs.rows.dtype
        assert ours.rows.shape == theirs.rows.shape
        assert ours.rows.tobytes() == theirs.rows.tobytes()
    assert back.peaks(9, 777, 5) == kept.peaks(9, 777, 5)
    assert back.resident_bytes(9, 777) == kept.resident_bytes(9, 777)


@pytest.mark.parametrize(
    "facts",
    [
        FACTS,
        SubjectFacts({Loss.PLAIN: Lines(None, (), ())}, DepthPlan((1,), 0.0), 1, False),
        replace(FACTS, num_layers=7),
    ],
)
def test_facts_come_back(tmp_path: Path, facts: SubjectFacts) -> None:
    TraceCache(tmp_path).keep_facts("a", facts)
    assert TraceCache(tmp_path).facts("a") == facts


def test_an_entry_answers_for_its_own_key_only(tmp_path: Path) -> None:
    cache = TraceCache(tmp_path)
    cache.keep_skyline("a", awkward_skyline())
    assert cache.skyline("b") is None
    assert cache.facts("b") is None


def test_an_entry_of_the_other_kind_is_no_entry(tmp_path: Path) -> None:
    cache = TraceCache(tmp_path)
    cache.keep_skyline("a", awkward_skyline())
    cache.keep_facts("b", FACTS)
    assert cache.facts("a") is None
    assert cache.skyline("b") is None


def edited(text: str) -> str:
    """The same entry with one figure changed."""
    entry = json.loads(text)
    entry["payload"]["traced_accumulation"] = 1
    return json.dumps(entry)


def without_payload(text: str) -> str:
    return json.dumps({"digest": json.loads(text)["digest"]})


BROKEN: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "cut at the end": lambda text: text[:-1],
    "edited": edited,
    "no payload": without_payload,
    "not an object": lambda text: "[1, 2]",
    "not JSON": lambda text: "\0" * len(text),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_entry_is_made_again(tmp_path: Path, how: str) -> None:
    cache = TraceCache(tmp_path)
    cache.keep_skyline("a", awkward_skyline())
    (file,) = tmp_path.iterdir()
    file.write_text(BROKEN[how](file.read_text()))
    assert cache.skyline("a") is None
    assert cache.facts("a") is None
    cache.keep_skyline("a", awkward_skyline())
    assert cache.skyline("a") is not None
    assert list(tmp_path.iterdir()) == [file]


def test_bytes_that_are_no_text_are_no_entry(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\xfa")
    assert TraceCache(tmp_path).skyline("a") is None


def test_without_a_folder_nothing_is_kept(tmp_cwd: Path) -> None:
    cache = TraceCache(None)
    cache.keep_skyline("a", awkward_skyline())
    cache.keep_facts("b", FACTS)
    assert cache.skyline("a") is None
    assert cache.facts("b") is None
    assert list(tmp_cwd.iterdir()) == []
