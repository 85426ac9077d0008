"""What a training leaves: the trained weights or adapter, and a merged model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from launcher.memory import Phase
from launcher.merge import drop_optimizer, merge_adapters


def save_results(
    trainer: SFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    model: Path | None,
    merged: Path | None,
    enter: Callable[[Phase], None],
) -> None:
    """Saves what was trained, and merges adapters if there is a place for the merged model.

    Args:
        trainer: A trainer that has trained; after a merge it has neither adapters nor optimizer states.
        tokenizer: Saved beside each model.
        model: Where the trained weights or adapter go; None: nowhere.
        merged: Where the merged model goes; None: nothing is merged.
        enter: Called with the phase that begins.
    """
    if model is not None:
        enter(Phase.SAVE)
        trainer.save_model(str(model))
        tokenizer.save_pretrained(str(model))
    if merged is not None and isinstance(trainer.model, PeftModel):
        drop_optimizer(trainer)
        enter(Phase.MERGE)
        merge_adapters(trainer.model).save_pretrained(str(merged))
        tokenizer.save_pretrained(str(merged))
