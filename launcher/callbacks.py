"""What listens to the training loop: who wants to know its phases, and who generates text in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.job import GenerationSpec
from launcher.memory import Phase


class PhaseCallback(TrainerCallback):
    """Says when the training loop enters a phase. The tracer and the meter listen to the same calls.

    Args:
        enter: Called with the phase that begins.
    """

    def __init__(self, enter: Callable[[Phase], None]) -> None:
        self._enter = enter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loop starts: batches are fetched, then the first step."""
        self._enter(Phase.TRAIN_STEP)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped."""
        self._enter(Phase.OPTIMIZER_STEP)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights are updated and gradients dropped; evaluation and saving come next, when they are due."""
        self._enter(_next_phase(control, evaluated=False))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation is over."""
        self._enter(_next_phase(control, evaluated=True))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint is written."""
        self._enter(Phase.TRAIN_STEP)


def _next_phase(control: TrainerControl, *, evaluated: bool) -> Phase:
    if control.should_evaluate and not evaluated:
        return Phase.EVALUATION
    return Phase.SAVE if control.should_save else Phase.TRAIN_STEP


class GenerationCallback(TrainerCallback):
    """Generates text after each evaluation and at the end of training.

    Args:
        enter: Called with the phase that begins.
        prompts: Batches of prompts, padded on the left; each (input_ids, attention_mask), shape (batch, length).
        generation: How much to generate.
        write: Called with the optimizer step and the token ids of each batch, shape (batch, length).
    """

    def __init__(
        self,
        enter: Callable[[Phase], None],
        prompts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        generation: GenerationSpec,
        write: Callable[[int, torch.Tensor], None],
    ) -> None:
        self._enter = enter
        self._prompts = prompts
        self._generation = generation
        self._write = write
        self._last_step = -1

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation is over."""
        self._generate(state.global_step, kwargs["model"])
        self._enter(_next_phase(control, evaluated=True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training is over."""
        if self._last_step != state.global_step:
            self._generate(state.global_step, kwargs["model"])
            self._enter(Phase.SAVE)

    def _generate(self, step: int, model: nn.Module) -> None:
        self._enter(Phase.GENERATION)
        self._last_step = step
        for tokens, mask in self._prompts:
            device = next(model.parameters()).device
            answer = generate(model, tokens.to(device), mask.to(device), self._generation.max_new_tokens)
            self._write(step, answer.cpu())


def generate(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, **options: Any
) -> Any:
    """Continues prompts greedily, with a cache of keys and values.

    Args:
        model: The model, in training; it is put back so.
        tokens: Prompts, shape (batch, length).
        mask: 0 where a prompt is padded, shape (batch, length).
        max_new_tokens: Tokens generated at most.
        options: Further arguments of transformers' `generate`.
    """
    training = model.training
    model.eval()
    # TRL asks for the router's logits in training; with them transformers computes a loss that fails on single tokens
    routed = getattr(model.config, "output_router_logits", None)
    if routed:
        model.config.output_router_logits = False
    with torch.no_grad():
        answer = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            **options,
        )
    if routed:
        model.config.output_router_logits = routed
    model.train(training)
    return answer
