"""Proves that every recipe says what it is, composes, and has a plan that fits the device its own command names.

Plans are made as `launch` makes them, with real traces by processes that import the libraries once for all recipes; no
weights, no network, no GPU. tests/test_readme.py runs recipes by the command itself.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from launcher import workflow
from launcher.config import config_root, group_choices, load_job
from launcher.documents import to_json
from launcher.job import Action
from launcher.planner.tracer import Tracer

RECIPES = sorted((config_root() / "recipes").rglob("*.yaml"))
HEADER = ("What", "Command", "Peak", "Verified")
PLAN_KEYS = {
    "method",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "activation_checkpointing",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
}
PREDICTED_KEYS = {
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_device_bytes",
    "peak_phase",
    "by_category_bytes",
    "by_phase_bytes",
    "host_peak_bytes",
    "step_seconds",
    "tokens_per_second",
}
DOCUMENT_KEYS = {
    "feasible",
    "plan",
    "predicted",
    "capacity_bytes",
    "headroom_bytes",
    "rejected",
    "run_dir",
    "versions",
    "planning_seconds",
}

DEFAULT = "smollm_lora"
LIKE_OTHERS = ("llama70b_full", "qwen32b_lora")
"""Recipes for several devices of which llama70b_qlora and mixtral_lora tell nearly as much, in less time."""


@pytest.fixture(scope="module")
def tracers() -> Iterator[Callable[[Sequence[str]], Tracer]]:
    """Tracers by the optional libraries that they need."""
    opened: dict[tuple[str, ...], Tracer] = {}
    with ExitStack() as stack:

        def tracer(needed: Sequence[str]) -> Tracer:
            key = tuple(needed)
            if key not in opened:
                opened[key] = stack.enter_context(Tracer(key))
            return opened[key]

        yield tracer


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def header(recipe: Path) -> dict[str, str]:
    """The four comment lines under the package line."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    matches = [re.fullmatch(r"# ([A-Z][a-z]+): (.+)", line) for line in lines[1:5]]
    assert all(matches), lines[1:5]
    return {match[1]: match[2] for match in matches if match}


def command(recipe: Path) -> list[str]:
    """The arguments of the recipe's own command."""
    program, *arguments = shlex.split(header(recipe)["Command"])
    assert program == "launch"
    return arguments


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 6
    assert {path.stem for path in RECIPES} == set(group_choices("recipe"))


@every_recipe
def test_recipe_says_what_it_is(recipe: Path) -> None:
    comments = header(recipe)
    assert tuple(comments) == HEADER
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*_(lora|qlora|full)", recipe.stem)
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", comments["Verified"])
    job = load_job(command(recipe))
    assert job.recipe == recipe.stem
    assert job.action is Action.RUN
    assert job.method.name.value == recipe.stem.rsplit("_", 1)[1]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, marks=pytest.mark.thorough) if path.stem in LIKE_OTHERS else path
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_recipe_plans_on_the_device_of_its_command(
    recipe: Path, tracers: Callable[[Sequence[str]], Tracer], tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "Tracer", lambda needed: nullcontext(tracers(needed)))
    _, _, answer = workflow.planned(load_job([*command(recipe), "action=plan"]))
    assert answer.failure is None
    document: dict[str, Any] = json.loads(to_json(answer.document))
    assert set(document) >= DOCUMENT_KEYS
    assert document["feasible"] is True
    assert set(document["plan"]) >= PLAN_KEYS
    assert set(document["predicted"]) >= PREDICTED_KEYS
    assert list(tmp_cwd.iterdir()) == []
    check_figures(document)
    check_against_job(document, command(recipe))
    if recipe.stem != DEFAULT:  # that of the default job is planned for this machine
        check_stated_peak(document, header(recipe)["Peak"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "engine", "stage"),
    [
        (
            ["hardware.num_devices=8"],
            "deepspeed",
            1,
        ),  # states of one device, shared, leave room for a sequence
        # among so many nodes the exchange decides: once per step, and as little as can be
        (
            ["hardware.num_devices=8", "hardware.num_nodes=128", "training.global_batch_size=2048"],
            "ddp",
            0,
        ),
    ],
    ids=["8 devices", "1024 devices"],
)
def test_a_model_of_8_billion_weights_is_planned_on_many_devices(
    words: list[str],
    engine: str,
    stage: int,
    tracers: Callable[[Sequence[str]], Tracer],
    tmp_cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workflow, "Tracer", lambda needed: nullcontext(tracers(needed)))
    arguments = ["recipe=llama_full", "hardware=a100_80g", *words]
    _, _, answer = workflow.planned(load_job([*arguments, "action=plan"]))
    assert answer.failure is None
    document: dict[str, Any] = json.loads(to_json(answer.document))
    plan = document["plan"]
    assert (plan["engine"], plan["zero_stage"]) == (engine, stage)
    assert not plan["offload_optimizer"] and not plan["offload_parameters"]
    check_figures(document)
    check_against_job(document, arguments)
    # two bytes a weight: AdamW's two states as many; DeepSpeed's in fp32, with a copy of the weights, and a part of them
    sizes, ranks = document["predicted"]["by_category_bytes"], plan["num_devices"] * plan["num_nodes"]
    states = 6 * sizes["parameters"] / ranks if stage else 2 * sizes["parameters"]
    assert sizes["optimizer_state"] == pytest.approx(states, rel=0.001)
    weighed = {(item["plan"]["engine"], item["plan"]["zero_stage"]) for item in document["rejected"]}
    assert weighed >= {("ddp", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)}


def check_stated_peak(document: dict[str, Any], stated: str) -> None:
    """A recipe's header says what its plan takes of which device."""
    match = re.match(r"(\d+\.\d) of (\d+\.\d) GiB, planned 20\d\d-\d\d-\d\d: ", stated)
    assert match, stated
    assert float(match[1]) == pytest.approx(document["predicted"]["peak_device_bytes"] / 2**30, rel=0.02)
    assert float(match[2]) == pytest.approx(document["capacity_bytes"] / 2**30, abs=0.05)


def check_figures(document: dict[str, Any]) -> None:
    """The plan fits, its parts sum to the whole, and what was rejected for its size does not fit."""
    predicted, budget = document["predicted"], document["capacity_bytes"] - document["headroom_bytes"]
    assert 0 < predicted["peak_allocated_bytes"] <= predicted["peak_device_bytes"] <= budget
    assert sum(predicted["by_category_bytes"].values()) == predicted["peak_allocated_bytes"]
    assert predicted["by_phase_bytes"][predicted["peak_phase"]] == predicted["peak_allocated_bytes"]
    assert max(predicted["by_phase_bytes"].values()) == predicted["peak_allocated_bytes"]
    for item in document["rejected"]:
        assert item["reason"]
        assert set(item["plan"]) == set(document["plan"])
        assert item["plan"] != document["plan"]
        if item["short_by_bytes"] and not item["is_host_short"]:
            assert item["peak_device_bytes"] == budget + item["short_by_bytes"]


def check_against_job(document: dict[str, Any], arguments: list[str]) -> None:
    """The planner kept what changes the result."""
    job, plan = load_job(arguments), document["plan"]
    batch = plan["micro_batch_size"] * plan["gradient_accumulation_steps"]
    devices = plan["num_devices"] * plan["num_nodes"]
    assert devices == job.hardware.num_devices * job.hardware.num_nodes
    assert batch * devices == job.training.global_batch_size
    assert plan["method"] == job.method.name.value
    assert plan["precision"] == job.training.precision.value
    assert plan["max_length"] in (job.planner.choices.max_length or (job.data.max_length,))
    assert plan["rank"] in (
        (0,) if plan["method"] == "full" else job.planner.choices.rank or (job.method.rank,)
    )
    if job.hardware.memory_bytes:
        assert document["capacity_bytes"] == job.hardware.memory_bytes
