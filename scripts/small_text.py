"""A small random language model with a byte-level tokenizer, and text from a file: real runs in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257
"""Bytes, and the end of a text."""


def write_small_model(
    folder: Path,
    architecture: Mapping[str, Any],
    text: str,
    num_rows: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model, its tokenizer and `train.jsonl` into a folder.

    Args:
        folder: Where to.
        architecture: The model's config; a vocabulary of at least `VOCABULARY`.
        text: What stands in every row, after its number.
        num_rows: Rows.
        dtype: In which the weights are stored.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: index for index, token in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    rows = "".join(json.dumps({"text": f"{number}: {text}"}) + "\n" for number in range(num_rows))
    (folder / "train.jsonl").write_text(rows)
