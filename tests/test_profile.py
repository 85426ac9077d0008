"""`profile=`: what it sets, that what is typed wins, and a real small job that production refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import load_job
from launcher.errors import ConfigError
from launcher.job import Grade, PlannerSpec, Profile
from tests.tiny_job import write_tiny_model


def test_production_leaves_more_free_and_refuses_squeezed_plans() -> None:
    job = load_job(["profile=production"])
    assert job.profile is Profile.PRODUCTION
    assert (job.planner.headroom, job.planner.refused_grades) == (0.1, (Grade.SQUEEZED,))


def test_the_default_is_an_experiment_and_sets_nothing() -> None:
    job = load_job([])
    assert job.profile is Profile.EXPERIMENT and job.planner == PlannerSpec()
    assert load_job(["profile=experiment"]) == job


@pytest.mark.parametrize("recipe", ["smollm_lora", "llama_full"])
def test_what_is_typed_wins(recipe: str) -> None:
    words = [f"recipe={recipe}", "profile=production", "data.path=train.jsonl"]
    assert load_job([*words, "planner.headroom=0.02"]).planner.headroom == 0.02
    assert load_job(["planner.headroom=auto", *words]).planner.headroom == "auto"
    assert load_job([*words, "planner.refused_grades=[]"]).planner.refused_grades == ()
    assert load_job([*words, "planner.refused_grades=[tight]"]).planner.refused_grades == (Grade.TIGHT,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("profile=prduction", "did you mean `production`"),
        ("planner.refused_grades=[comfortable]", "refuses every plan"),
        ("planner.refused_grades=[tite]", "legal: comfortable, tight, squeezed"),
    ],
)
def test_mistakes_are_named(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_job([words])


def plan(folder: Path, *words: str) -> tuple[int, dict[str, object], str]:
    child = subprocess.run(
        [
            sys.executable, "-m", "launcher.cli", f"model.path={folder}", f"data.path={folder}/train.jsonl",
            "data.format=auto", "data.max_length=96", "training.precision=fp32", "planner.pin.micro_batch_size=1",
            "planner.pin.activation_checkpointing=full", "planner.pin.loss=chunked", "hardware=cpu", "action=plan",
            *words,
        ],
        capture_output=True, text=True, check=False, cwd=folder, timeout=600,
    )  # fmt: skip
    return (
        child.returncode,
        json.loads(child.stdout) if "output=json" in words else {},
        child.stdout + child.stderr,
    )


@pytest.mark.thorough
def test_a_squeezed_plan_is_an_experiment_and_no_production(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    code, roomy, _ = plan(tmp_path, "output=json", "profile=production")
    assert code == 0 and roomy["profile"] == "production"
    predicted = roomy["predicted"]
    assert isinstance(predicted, dict)
    memory = f"hardware.memory_bytes={round(1.01 * predicted['peak_device_bytes'])}"
    words = (memory, "planner.headroom=0")
    code, taken, text = plan(tmp_path, "output=json", *words)
    squeeze = taken["squeeze"]
    assert code == 0 and isinstance(squeeze, dict) and squeeze["grade"] == "squeezed", text
    code, refused, _ = plan(tmp_path, "output=json", *words, "profile=production")
    assert code == 3 and refused["feasible"] is False
    rejected = refused["rejected"]
    assert isinstance(rejected, list) and len(rejected) == 1
    rejection = rejected[0]
    assert "is squeezed, which profile=production refuses" in rejection["reason"]
    assert rejection["is_refused"] is True and rejection["short_by_bytes"] > 0
    code, _, text = plan(tmp_path, *words, "profile=production")
    words_said = " ".join(text.split())
    assert code == 3 and "profile=production" in words_said and "planner.refused_grades=[]" in words_said
    assert "activation_checkpointing=full, micro_batch_size=1" in words_said
    code, _, text = plan(tmp_path, *words, "profile=production", "planner.refused_grades=[]")
    assert code == 0 and "headroom, profile=production" in text
