"""Prompts for generation: the beginnings of examples, as the model would be asked to go on from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from launcher.job import GenerationSpec

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids padded on the left, and a mask that is 0 where they are; both of shape (batch, length)."""


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase, examples: Dataset, generation: GenerationSpec
) -> tuple[Batch, ...]:
    """The first examples' prompts in batches.

    Args:
        tokenizer: The model's tokenizer.
        examples: Rows with `messages`, with `prompt`, with `text`, or with `input_ids`.
        generation: How many prompts of which length.
    """
    rows = examples.select(range(min(generation.num_prompts, len(examples))))
    prompts = [_prompt(tokenizer, row)[-generation.prompt_length :] for row in rows]
    step = generation.batch_size
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return tuple(_padded(prompts[at : at + step], int(filler or 0)) for at in range(0, len(prompts), step))


def _prompt(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """A conversation up to its last answer; a given prompt; the first half of a text."""
    if "messages" in row:
        turns = row["messages"]
        ends = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        asked = turns[: ends[-1]] if ends and ends[-1] > 0 else turns
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if "prompt" in row:
        return list(tokenizer(row["prompt"])["input_ids"])
    tokens = list(row["input_ids"] if "input_ids" in row else tokenizer(row["text"])["input_ids"])
    return tokens[: max(1, len(tokens) // 2)]


def _padded(prompts: Sequence[Sequence[int]], filler: int) -> Batch:
    longest = max(len(prompt) for prompt in prompts)
    ids = [[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
