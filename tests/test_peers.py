"""Peers' recipes: the page is its data, six of them were trained, and the small trainings are the recipes' own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.config import load_job
from launcher.documents import from_json
from scripts import peers_page
from scripts.peers import RECIPES, Outcome, joined, newest
from scripts.peers_measured import (
    COUNTED,
    MEASURED,
    TURNS,
    Findings,
    Pair,
    Side,
    scaled_memory_bytes,
    small_architecture,
    small_job,
)

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@pytest.fixture(scope="module")
def found() -> Findings:
    return from_json(Findings, json.dumps(newest("peers-measured")))


def test_page_is_generated_from_the_data(found: Findings) -> None:
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert page == peers_page.page(newest("peers"), found)


def test_every_recipe_has_a_row_of_its_own_settings() -> None:
    rows = newest("peers")["rows"]
    assert [row["recipe"]["name"] for row in rows] == [recipe.name for recipe in RECIPES]
    for row, recipe in zip(rows, RECIPES, strict=True):
        assert row["recipe"] == json.loads(json.dumps(asdict(recipe)))
        assert Outcome(**row["ours"]).fits
    assert {"LLaMA-Factory", "Axolotl", "TRL", "torchtune", "ms-swift", "Unsloth"} <= {
        recipe.name.split()[0] for recipe in RECIPES
    }


def test_six_were_measured_two_of_each_method(found: Findings) -> None:
    assert [pair.recipe for pair in found.pairs] == list(MEASURED)
    methods = [BY_NAME[pair.recipe].method for pair in found.pairs]
    assert sorted(methods) == ["full", "full", "lora", "lora", "qlora", "qlora"]
    context = load_job(["hardware=cpu"]).hardware.context_bytes
    for pair in found.pairs:
        for side in (pair.theirs, pair.ours):
            assert len(side.step_seconds) == len(side.cpu_seconds) == TURNS * COUNTED
            assert min(side.step_seconds) > 0 and min(side.cpu_seconds) > 0
            assert side.measured_bytes == pytest.approx(side.predicted_bytes, rel=0.01)
            assert side.measured_bytes <= pair.memory_bytes - context


def test_what_was_measured_is_the_recipe(found: Findings) -> None:
    for pair in found.pairs:
        recipe = BY_NAME[pair.recipe]
        job = load_job(small_job(recipe, Path("model")))
        assert job.training.global_batch_size == recipe.micro * recipe.accumulation
        assert job.method.name.value == recipe.method
        assert recipe.method == "full" or job.method.rank == recipe.rank
        assert pair.length == job.data.length == recipe.length // 32
        assert pair.theirs.settings.startswith(
            f"{recipe.micro} x {recipe.accumulation}, {recipe.checkpointing}, {recipe.loss}"
        )
        assert dict(pair.model) == small_architecture(load_job(recipe.job).model.architecture)


def test_a_small_model_keeps_the_proportions() -> None:
    large = dict(load_job(["model=qwen2_5_7b"]).model.architecture)
    small = small_architecture(large)
    assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"]
    for model in (large, small):
        heads, hidden = model["num_attention_heads"], model["hidden_size"]
        assert heads == 7 * model["num_key_value_heads"]
        assert model["vocab_size"] / (hidden * model["num_hidden_layers"]) == pytest.approx(1.515, rel=1e-3)
    assert "eos_token_id" not in small


def test_memory_stands_to_the_small_training_as_the_card_to_the_large_one() -> None:
    card = load_job(["hardware=a100_40g"])
    context = card.hardware.context_bytes
    theirs = Outcome(True, "", context + 1_000_000_000, 1.0)
    room = 0.95 * card.hardware.memory_bytes - context
    assert scaled_memory_bytes(card, theirs, 1_000, 77) == pytest.approx(77 + room / 1e6, abs=1)


def side(predicted: float, *seconds: float) -> Side:
    return Side("1 x 8, full, plain", predicted, seconds, seconds, 2 << 20, 1 << 20)


def test_the_page_says_first_where_ours_is_slower() -> None:
    name = MEASURED[0]
    slower = Pair(name, {}, 64, 1, side(1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0), side(1.0, *[4.0] * 6))
    faster = Pair(MEASURED[1], {}, 64, 1, side(3.0, *[4.0] * 6), side(1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0))
    section = peers_page.measured_section(Findings("2026-11-27", 1, {}, (1.0,), (faster, slower)), BY_NAME)
    assert f"Ours was slower in 1 of 2: {name}." in section
    first, second = section.splitlines()[-2:]
    assert f"| {name} | lora 8 |" in first and "| 1.00 | 0.50 (0.50 to 0.50) | 0.50 | +100 % |" in first
    assert "| 3.00 | 2.00 (1.00 to 4.00) | 2.00 | +50 % | 2.00, 1.00, +100.000 % |" in second


def test_a_kept_row_goes_when_its_recipe_trains_something_else() -> None:
    rows = newest("peers")["rows"]
    changed = [rows[0] | {"recipe": rows[0]["recipe"] | {"length": 1}}, *rows[1:3]]
    assert [row["recipe"]["name"] for row in joined([], changed)] == [
        row["recipe"]["name"] for row in rows[1:3]
    ]
    assert json.loads(json.dumps(joined([rows[0]], changed))) == rows[:3]


def test_int8_weights_are_called_so() -> None:
    assert BY_NAME["Axolotl llama-3/instruct-lora-8b"].what == "lora 32 on int8"
    assert BY_NAME["Axolotl llama-3/qlora"].what == "qlora 32"
    assert BY_NAME["ms-swift full/train"].what == "full"


def test_where_a_peer_is_faster_the_page_says_so() -> None:
    recipe = BY_NAME["NeMo AutoModel llama3_1_8b_peft_benchmark"]
    theirs, ours = Outcome(False, "", 1, None), Outcome(True, "", 1, 10_000.0)
    said = " ".join(peers_page.faster_section([(recipe, theirs, ours)]).split())
    assert "trains 12,471 tokens/s where 10,000 are predicted for our plan: 1.25 times as fast" in said
    assert "ours is the slower plan there" in said
    assert not peers_page.faster_section([(recipe, theirs, Outcome(True, "", 1, 20_000.0))])
