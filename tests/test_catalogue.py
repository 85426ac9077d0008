"""Every built-in model is the model that was published.

Each file of conf/model holds a model's architecture and, from a source outside this repository, how many
parameters its checkpoint has. The tests build the architecture on the meta device, where tensors have shapes
but no storage, and count. A count that agrees is strong evidence for the shapes: widths, layers, heads,
experts, vocabulary, biases, norms, vision tower, and whether the head is tied (a tied weight counts once). It
says nothing of what has no weights, such as rotary settings, attention windows and soft caps; of those the
tests prove only that transformers keeps each fact as written.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

CATALOGUE = sorted((Path(__file__).resolve().parents[1] / "conf" / "model").glob("*.yaml"))
REQUIRED = {"id", "num_parameters", "num_parameters_source", "architecture"}
ROUNDED = "num_parameters_rounded_to"
# Kept by every configuration class, though no class declares them as fields.
UNDECLARED = {"model_type", "architectures"}
# Read through getattr by the attention layers of Qwen3-MoE; its configuration class does not declare it.
UNDECLARED_BY_MODEL = {"qwen3_moe": {"head_dim"}}

MODELS = {
    *("llama3_1_8b", "llama3_1_70b", "llama3_2_1b", "llama3_2_3b", "llama3_3_70b"),
    *(
        "qwen2_5_0_5b",
        "qwen2_5_1_5b",
        "qwen2_5_3b",
        "qwen2_5_7b",
        "qwen2_5_14b",
        "qwen2_5_32b",
        "qwen2_5_72b",
    ),
    *("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b", "qwen3_30b_a3b"),
    *("mistral_7b", "mixtral_8x7b"),
    *("gemma2_2b", "gemma2_9b", "gemma2_27b"),
    *("gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3_27b"),
    *("phi4", "gpt_oss_20b"),
    *("smollm2_135m", "smollm2_360m", "smollm2_1_7b", "smollm3_3b"),
    *("olmo2_1b", "olmo2_7b", "olmo2_13b", "olmo2_32b"),
    *("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"),
}
"""What the launcher promises to know without a network; others may come, none of these may go."""

each_model = pytest.mark.parametrize("path", CATALOGUE, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(entry, dict)
    return entry


def build_config(entry: Mapping[str, Any]) -> PreTrainedConfig:
    config = AutoConfig.for_model(**entry["architecture"])
    assert isinstance(config, PreTrainedConfig)
    return config


def build_on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, torch.nn.Module)
    return model


def misspelt(stated: Mapping[str, Any], config: PreTrainedConfig) -> set[str]:
    """Keys that no configuration class declares: they would be stored and read by no layer."""
    declared = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    unknown = set(stated) - declared - UNDECLARED - UNDECLARED_BY_MODEL.get(config.model_type, set())
    for key, value in stated.items():
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            unknown |= {f"{key}.{name}" for name in misspelt(value, inner)}
    return unknown


def altered(stated: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Facts that the configuration holds otherwise than the file states them, as (stated, held)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for key, value in stated.items():
        held = getattr(config, key)
        if isinstance(held, PreTrainedConfig):
            differences |= {f"{key}.{name}": pair for name, pair in altered(value, held).items()}
        elif held != value:
            differences[key] = (value, held)
    return differences


def test_every_promised_model_is_there() -> None:
    assert MODELS - {path.stem for path in CATALOGUE} == set()


def test_no_model_is_listed_twice() -> None:
    ids = [load(path)["id"] for path in CATALOGUE]
    assert len(set(ids)) == len(ids)


@each_model
def test_entry_has_the_agreed_keys(path: Path) -> None:
    entry = load(path)
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", path.stem)
    assert set(entry) - {ROUNDED, "stored_dtype"} == REQUIRED
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["id"])
    assert entry["num_parameters_source"].strip()


@each_model
def test_transformers_keeps_every_fact_as_written(path: Path) -> None:
    entry = load(path)
    config = build_config(entry)
    assert not misspelt(entry["architecture"], config)
    assert not altered(entry["architecture"], config)
    restored = AutoConfig.for_model(**config.to_dict())
    assert not altered(entry["architecture"], restored)


@each_model
def test_parameter_count_is_the_published_one(path: Path) -> None:
    entry = load(path)
    model = build_on_meta(build_config(entry))
    assert [type(model).__name__] == entry["architecture"]["architectures"]
    # parameters() yields a tensor that several modules share only once.
    counted = sum(parameter.numel() for parameter in model.parameters())
    published, unit = entry["num_parameters"], entry.get(ROUNDED, 0)
    assert abs(counted - published) <= unit / 2, f"counted {counted}, published {published}"
