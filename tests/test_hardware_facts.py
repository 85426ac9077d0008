"""Proves that the hardware facts in `conf/hardware/` are complete, sourced and plausible.

Every accelerator file has exactly the agreed keys, in the agreed order, with values of the right type under
a plain YAML loader (`312.0e12` without a sign would be text there), a source for each figure that was looked
up, and numbers that agree with relations written here by hand from the makers' pages.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "hardware"
NOT_ACCELERATORS = {"auto", "cpu"}
FACTS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.stem not in NOT_ACCELERATORS
}

CARDS = {
    "a100_40g",
    "a100_80g",
    "a10g_24g",
    "b200_180g",
    "h100_80g",
    "h200_141g",
    "l40s_48g",
    "l4_24g",
    "mi300x_192g",
    "rtx3090_24g",
    "rtx4090_24g",
    "rtx5090_32g",
    "t4_16g",
    "v100_16g",
    "v100_32g",
}
BEFORE_AMPERE = {"t4_16g", "v100_16g", "v100_32g"}
WITHOUT_CLOUD_INSTANCE = {"rtx3090_24g", "rtx4090_24g", "rtx5090_32g"}

KEY_TYPES: dict[str, type] = {
    "name": str,
    "kind": str,
    "product": str,
    "memory_bytes": int,
    "compute_capability": str,
    "supports_bf16": bool,
    "supports_flash_attention": bool,
    "matrix_flops": dict,
    "memory_bandwidth_bytes_per_second": float,
    "device_link_bytes_per_second": float,
    "host_link_bytes_per_second": float,
    "network_bytes_per_second": float,
    "host_memory_bytes": int,
    "num_devices": int,
    "num_nodes": int,
    "context_bytes": int,
    "blas_workspace_bytes": int,
    "matrix_efficiency": float,
    "attention_efficiency": float,
    "bandwidth_efficiency": float,
    "launch_seconds": float,
    "multiprocessors": int,
    "sources": dict,
}
MATRIX_KEYS = ["bf16", "fp16", "fp32", "tf32"]
SOURCE_KEYS = [
    "memory_bytes",
    "compute_capability",
    "supports_bf16",
    "supports_flash_attention",
    "matrix_flops",
    "memory_bandwidth_bytes_per_second",
    "device_link_bytes_per_second",
    "host_link_bytes_per_second",
    "network_bytes_per_second",
    "host_memory_bytes",
    "context_bytes",
    "blas_workspace_bytes",
    "matrix_efficiency",
    "attention_efficiency",
    "bandwidth_efficiency",
    "launch_seconds",
    "multiprocessors",
]

every_card = pytest.mark.parametrize("name", sorted(FACTS))


def test_every_card_is_found() -> None:
    """Guards the tests below against an empty glob, and the list of cards against a lost file."""
    assert len(FACTS) >= 15
    assert CARDS - FACTS.keys() == set()


@every_card
def test_keys_and_types(name: str) -> None:
    facts = FACTS[name]
    assert list(facts) == list(KEY_TYPES)
    assert {key: type(value) for key, value in facts.items()} == KEY_TYPES
    assert list(facts["matrix_flops"]) == MATRIX_KEYS
    assert {type(value) for value in facts["matrix_flops"].values()} == {float}


@every_card
def test_sources_name_every_looked_up_figure(name: str) -> None:
    sources = FACTS[name]["sources"]
    assert list(sources) == SOURCE_KEYS
    for key, text in sources.items():
        assert isinstance(text, str), key
        assert text.strip(), key
        assert re.search(r"\b20\d{2}\b|^(assumed|derived|estimate)\b", text), (
            f"{key}: neither a date nor a caveat"
        )


def test_what_is_stated_of_a_cpu_has_a_source() -> None:
    facts = yaml.safe_load((FOLDER / "cpu.yaml").read_text(encoding="utf-8"))
    read_here = {"name", "kind", "product", "memory_bytes", "sources"}
    assert facts["memory_bytes"] == 0
    assert facts["sources"].keys() == facts.keys() - read_here
    assert all(re.search(r"\b20\d{2}\b", text) for text in facts["sources"].values())


@every_card
def test_name_is_the_file_name(name: str) -> None:
    facts = FACTS[name]
    assert facts["name"] == name
    model = name.split("_")[0].removeprefix("rtx").upper()
    assert model in facts["product"].upper()


@every_card
def test_usable_memory_is_a_little_below_the_marketing_size(name: str) -> None:
    match = re.fullmatch(r"[a-z0-9]+_(\d+)g", name)
    assert match is not None
    marketing = int(match[1])
    memory_bytes = FACTS[name]["memory_bytes"]
    assert memory_bytes < marketing * 2**30
    assert memory_bytes > 0.85 * marketing * 1e9


@every_card
def test_kind_and_capability_agree(name: str) -> None:
    facts = FACTS[name]
    pattern = {"cuda": r"\d{1,2}\.\d", "rocm": r"gfx[0-9a-f]+"}[facts["kind"]]
    assert re.fullmatch(pattern, facts["compute_capability"])
    assert (facts["kind"] == "rocm") == facts["product"].startswith("AMD")


@every_card
def test_bf16_rate_is_zero_exactly_where_bf16_is_missing(name: str) -> None:
    facts = FACTS[name]
    assert (facts["matrix_flops"]["bf16"] == 0) == (not facts["supports_bf16"])
    assert facts["matrix_flops"]["fp16"] > 0
    assert facts["matrix_flops"]["fp32"] > 0


def test_cards_before_ampere_lack_bf16_tf32_and_flash_attention() -> None:
    assert {name for name in CARDS if not FACTS[name]["supports_bf16"]} == BEFORE_AMPERE
    assert {name for name in CARDS if FACTS[name]["matrix_flops"]["tf32"] == 0} == BEFORE_AMPERE
    assert {name for name in CARDS if not FACTS[name]["supports_flash_attention"]} == BEFORE_AMPERE


@pytest.mark.parametrize(
    ("key", "fastest_first"),
    [
        (
            "memory_bandwidth_bytes_per_second",
            "b200_180g mi300x_192g h200_141g h100_80g a100_80g rtx5090_32g a100_40g "
            "rtx4090_24g rtx3090_24g v100_32g l40s_48g a10g_24g t4_16g l4_24g",
        ),
        (
            "device_link_bytes_per_second",
            "b200_180g h100_80g mi300x_192g a100_80g v100_32g rtx5090_32g l4_24g t4_16g",
        ),
        ("host_link_bytes_per_second", "h100_80g a100_40g t4_16g"),
        ("network_bytes_per_second", "h100_80g a100_80g l40s_48g t4_16g l4_24g v100_16g"),
        ("memory_bytes", "mi300x_192g b200_180g h200_141g h100_80g l40s_48g a100_40g v100_32g l4_24g t4_16g"),
        ("context_bytes", "h100_80g a100_40g l4_24g t4_16g"),
    ],
)
def test_known_order(key: str, fastest_first: str) -> None:
    values = [FACTS[name][key] for name in fastest_first.split()]
    assert all(left > right for left, right in pairwise(values)), values


@pytest.mark.parametrize(
    ("left", "right"),
    [("h200_141g", "h100_80g"), ("a100_80g", "a100_40g"), ("v100_32g", "v100_16g")],
)
def test_the_same_chip_with_other_memory_computes_the_same(left: str, right: str) -> None:
    assert FACTS[left]["matrix_flops"] == FACTS[right]["matrix_flops"]
    assert FACTS[left]["compute_capability"] == FACTS[right]["compute_capability"]
    assert FACTS[left]["memory_bytes"] > FACTS[right]["memory_bytes"]


@pytest.mark.parametrize(
    ("name", "sparse_bf16_teraflops"),
    [
        ("a100_40g", 624),
        ("h100_80g", 1979),
        ("h200_141g", 1979),
        ("b200_180g", 4500),
        ("l4_24g", 242),
        ("l40s_48g", 733),
        ("a10g_24g", 140),
        ("rtx3090_24g", 142),
        ("rtx4090_24g", 330.4),
        ("rtx5090_32g", 419),
        ("mi300x_192g", 2614.9),
    ],
)
def test_rates_are_dense(name: str, sparse_bf16_teraflops: float) -> None:
    """The makers' headline figures assume 2:4 sparsity, which training does not have."""
    rates = FACTS[name]["matrix_flops"]
    assert rates["bf16"] == pytest.approx(sparse_bf16_teraflops * 1e12 / 2, rel=0.02)
    assert rates["bf16"] == rates["fp16"]


@every_card
def test_blas_workspace_is_the_default_of_the_architecture(name: str) -> None:
    facts = FACTS[name]
    expected = {"7": 8.125, "8": 8.125, "9": 32, "10": 32, "12": 32, "gfx942": 128}
    assert facts["blas_workspace_bytes"] == expected[facts["compute_capability"].split(".")[0]] * 2**20


@every_card
def test_runtime_context_is_hundreds_of_mebibytes(name: str) -> None:
    assert 100 * 2**20 < FACTS[name]["context_bytes"] < 1024 * 2**20


def test_figures_without_a_published_instance_say_so() -> None:
    for key in ("network_bytes_per_second", "host_memory_bytes"):
        assert {
            name for name in CARDS if FACTS[name]["sources"][key].startswith("estimate:")
        } == WITHOUT_CLOUD_INSTANCE
