"""What the facts of a config.json must be for a model to exist: numbers that are numbers, heads that divide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

POSITIVE: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
)
"""Facts that are whole numbers from 1, by the names that transformers' config classes have."""
FROM_ZERO: Final = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "sliding_window",
)
"""Facts that are whole numbers too; some configs say 0 where there are none."""
REQUIRED: Final = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Facts that can't be null at the top, where they are given; null elsewhere means that transformers derives them."""
SPLIT_EVENLY: Final = frozenset(
    (
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "starcoder2",
    )
)
"""Models whose heads share the width evenly unless `head_dim` says otherwise; others have a `head_dim` by default."""
NESTED: Final = ("text_config", "vision_config")
"""Configs inside a config."""
LEARNED_POSITIONS: Final[Mapping[str, tuple[str, int]]] = {
    "biogpt": ("max_position_embeddings", 1024),
    "codegen": ("n_positions", 2048),
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "gpt_neo": ("max_position_embeddings", 2048),
    "gptj": ("n_positions", 2048),
    "opt": ("max_position_embeddings", 2048),
}
"""Models with a table of positions: the fact that says how long it is, and its default (transformers 5.24). A longer
sequence is an index error there; elsewhere positions are computed, and have no end."""

DEQUANTIZED_AS_READ: Final = "mxfp4"
"""The one kind of stored quantisation that training undoes: gpt-oss's, whose experts become bf16 as they are read."""

PUBLISHED_QUANTIZED: Final = ("openai/gpt-oss-20b", "openai/gpt-oss-120b")
"""Hub ids whose files are stored so; what is built in are the facts of their weights in bf16 (conf/model)."""


def stored_quantization(facts: Mapping[str, Any]) -> str:
    """How a config.json says that its weights are quantised, by transformers' name; empty when they are not."""
    nested = facts.get("text_config")
    for texts in (facts, nested) if isinstance(nested, Mapping) else (facts,):
        found = texts.get("quantization_config")
        if found:
            return (
                str(found.get("quant_method") or "(none given)") if isinstance(found, Mapping) else str(found)
            )
    return ""


def architecture_mistakes(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What is impossible in the facts of a config.json: each key, dotted where it is nested, and what is wrong.

    Args:
        facts: The config, with transformers' names; unknown keys are left to transformers.
    """
    return tuple(_mistakes(facts, ""))


def longest_sequence(facts: Mapping[str, Any]) -> int | None:
    """Tokens that a sequence may have at most; None where positions have no end."""
    known = LEARNED_POSITIONS.get(str(facts.get("model_type")))
    if known is None:
        return None
    found = facts.get(known[0], known[1])
    return found if isinstance(found, int) else None


def _mistakes(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    kind = facts.get("model_type")
    if not isinstance(kind, str) and (not prefix or kind is not None):
        yield f"{prefix}model_type", f"is {kind!r}; it must be the name of an architecture"
    found = False
    for name in (*POSITIVE, *FROM_ZERO):
        value, least = facts.get(name), 0 if name in FROM_ZERO else 1
        if name not in facts or (value is None and (prefix or name not in REQUIRED)):
            continue
        # some architectures have a number for each layer
        if not all(_is_count(item, least) for item in (value if isinstance(value, list) else [value])):
            found = True
            yield f"{prefix}{name}", f"is {value!r}; it must be a whole number from {least}"
    if not found:
        yield from _head_mistakes(facts, prefix)
    for name in NESTED:
        if isinstance(facts.get(name), Mapping):
            yield from _mistakes(facts[name], f"{prefix}{name}.")
        elif facts.get(name) is not None:
            yield f"{prefix}{name}", f"is {facts[name]!r}; it must be an object"


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _head_mistakes(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for heads_name, width_name in (("num_attention_heads", "hidden_size"), ("n_head", "n_embd")):
        heads, width = facts.get(heads_name), facts.get(width_name)
        if not isinstance(heads, int) or not isinstance(width, int):
            continue
        splits = facts.get("model_type") in SPLIT_EVENLY and facts.get("head_dim") is None
        if splits and width % heads:
            yield (
                f"{prefix}{heads_name}",
                f"is {heads}, which does not divide {width_name}={width}, and there is no head_dim",
            )
        groups = facts.get("num_key_value_heads")
        if isinstance(groups, int) and heads_name == "num_attention_heads" and heads % groups:
            yield f"{prefix}num_key_value_heads", f"is {groups}, which does not divide {heads_name}={heads}"
