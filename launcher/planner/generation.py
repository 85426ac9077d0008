"""Generation on fake tensors: the prompt's pass and the last token's, which has the longest cache.

Every token in between needs less than the last one. So the cache that the prompt has left is lengthened to what
all tokens but the last one would have left, and generation goes on from there, in transformers' own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel

from launcher.callbacks import generate
from launcher.job import GenerationSpec


def generation_lengths(generation: GenerationSpec) -> tuple[int, int]:
    """Tokens in the cache after the prompt, and before the last token is fed."""
    return generation.prompt_length, generation.prompt_length + generation.max_new_tokens - 2


def rehearse_generation(model: Any, generation: GenerationSpec, *, on_gpu: bool) -> None:
    """Generates from one batch of prompts of full length, on fake tensors.

    Args:
        model: The model.
        generation: How much; `.item()` must answer that every sequence has ended, so that one token is made a call.
        on_gpu: Whether the job runs on a GPU; transformers uses other kernels for the experts of single tokens there.
    """
    batch = min(generation.batch_size, generation.num_prompts)
    prompt, cached = generation_lengths(generation)
    ids = torch.ones((batch, prompt), dtype=torch.int64)
    answer = generate(
        model, ids, torch.ones_like(ids), generation.max_new_tokens, return_dict_in_generate=True
    )
    cache = answer.past_key_values
    del answer, ids
    lengthen(cache, cached)
    ids = torch.ones((batch, cached + 1), dtype=torch.int64)
    with _experts_of_single_tokens(model) if on_gpu else nullcontext():
        generate(model, ids, torch.ones_like(ids), 2, past_key_values=cache)


@contextmanager
def _experts_of_single_tokens(model: Any) -> Iterator[None]:
    """What `_optimize_model_for_decode` does on devices other than CPUs (generation/utils.py, transformers 5.23).

    `batched_mm` copies the weights of every token's experts.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "get_experts_implementation"):  # added after transformers 5.17
        yield
        return
    usual = base.get_experts_implementation()
    base.set_experts_implementation({k: "batched_mm" if v == "grouped_mm" else v for k, v in usual.items()})
    yield
    base.set_experts_implementation(usual)


def lengthen(cache: Any, length: int) -> None:
    """Replaces what a cache holds by as much as it holds after `length` tokens, layer by layer."""
    for layer in cache.layers:
        kept = length
        if layer.is_sliding:
            kept = min(length, layer.sliding_window)  # one more than it shows: a view of what was joined last
            layer.cumulative_length = length
        for name in ("keys", "values"):
            old = getattr(layer, name)
            setattr(layer, name, None)
            shape = (*old.shape[:-2], kept, old.shape[-1])
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            del old
            setattr(layer, name, new[:, :, 1 - layer.sliding_window :] if layer.is_sliding else new)
