"""What the training loop shows: a line per logged step, metrics.jsonl, and a saved stop when interrupted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, MutableSequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.documents import append_lines
from launcher.job import Engine
from launcher.memory import Phase, StepShape
from launcher.plan import Plan
from launcher.units import format_bytes
from launcher.worker.engine import all_stop_now
from launcher.worker.meter import process_memory_bytes
from launcher.worker.random_states import remembered_random_states

KEPT_STEPS = 1024
"""Last optimizer steps whose times are kept: runs are long, and what is kept of every step grows with them."""
KEPT_LOGS = 100
"""Entries of the trainer's `log_history` that are kept, here and in checkpoints; metrics.jsonl has them all."""


@dataclass
class Progress:
    """What the training loop has shown so far."""

    steps: int = 0
    first_step: int = 0
    """Optimizer steps of earlier runs that this one goes on from."""
    first_loss: float | None = None
    last_loss: float | None = None
    step_ends: MutableSequence[float] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS + 1))
    """When the last steps ended, and the one before them."""
    step_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    """Tokens of each of the last steps, padding included."""
    tokens: int = 0
    """Tokens of the step that is on."""
    stop_asked: bool = False
    is_stopped: bool = False
    shapes: set[StepShape] = field(default_factory=set)
    """Shapes of the first training batches."""
    evaluation_shapes: set[StepShape] = field(default_factory=set)
    gradient_bytes: int = 0
    phase: Phase = Phase.LOAD
    """The phase that the loop is in."""
    phase_file: Path | None = None
    """Where it is noted, for those who wonder about a process that is gone."""
    trainer: Trainer | None = None
    """The trainer, once there is one."""

    def enter(self, phase: Phase) -> None:
        """The loop enters a phase."""
        self.phase = phase
        if self.phase_file is not None:
            with suppress(OSError):  # a full disk is found out when something is saved
                self.phase_file.write_text(phase.value, encoding="ascii")


class ProgressCallback(TrainerCallback):
    """Prints a line per logged step, appends it to metrics.jsonl, turns an interrupt into a saved stop."""

    def __init__(self, progress: Progress, plan: Plan, metrics: Path | None, report: Callable[[str], None]):
        self._progress = progress
        self._plan = plan
        self._metrics = metrics
        self._report = report
        # an engine has gradients and counts of its own in the middle of a step: there it is finished
        self._gives_up = plan.engine is Engine.NONE and plan.gradient_accumulation_steps > 1
        self._put_back: Callable[[], None] = lambda: None
        self._epoch_begins = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts; a resumed run has read by now how far it was."""
        self._progress.first_step = state.global_step
        self._progress.step_ends.append(time.perf_counter())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loader draws next; a resumed run draws that again."""
        self._remember()
        self._epoch_begins = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The batches of an optimizer step are there, and nothing is drawn for them yet."""
        if not self._epoch_begins:
            self._remember()
        self._epoch_begins = False

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro batch is done. A step may take longer than there is time to save: one that began is given up."""
        if self._gives_up and self._progress.stop_asked:
            self._put_back()  # the checkpoint is of the step before, and what goes on from it draws for this one anew
            kwargs["model"].zero_grad()  # the plan has no gradients beside what is saved
            self._stop(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An optimizer step is done."""
        self._progress.steps = state.global_step
        self._progress.step_ends.append(time.perf_counter())
        self._progress.step_tokens.append(self._progress.tokens)
        self._progress.tokens = 0
        if all_stop_now(self._plan, state.global_step, self._progress.stop_asked):
            self._stop(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Metrics are out."""
        if len(state.log_history) > 2 * KEPT_LOGS:
            del state.log_history[:-KEPT_LOGS]
        if not logs or not state.is_world_process_zero:
            return
        memory = process_memory_bytes()
        ends = self._progress.step_ends
        seconds = ends[-1] - ends[-2] if len(ends) > 1 else None
        rate = self._progress.step_tokens[-1] / seconds if seconds else None
        line = {"step": state.global_step, **logs, "step_seconds": seconds, "tokens_per_second": rate}
        line |= {f"memory_{name}_bytes": value for name, value in memory.items()}
        if self._metrics is not None:
            with suppress(OSError):  # as above
                append_lines(self._metrics, [line])
        if "loss" in logs:
            loss = float(logs["loss"])
            self._progress.last_loss = loss
            if self._progress.first_loss is None:
                self._progress.first_loss = loss
            words = [f"step {state.global_step}/{state.max_steps}", f"loss {loss:.4f}"]
            words += [f"{rate:,.0f} tokens/s"] if rate else []
            words += [f"memory {name} {format_bytes(value)}" for name, value in memory.items()]
            self._report("  ".join(words))
        elif "eval_loss" in logs:
            self._report(f"evaluation at step {state.global_step}: loss {float(logs['eval_loss']):.4f}")

    def _remember(self) -> None:
        if self._gives_up:
            self._put_back = remembered_random_states()

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        self._progress.is_stopped = True
        self._progress.steps = state.global_step
        has_new_steps = state.global_step > self._progress.first_step
        control.should_save = (
            has_new_steps and not self._plan.swaps
        )  # what swaps can't go on: see engine_limits.py
        control.should_training_stop = True
