"""The worker: one process that trains, watched by the meter. Started by `accelerate launch`.

It reads its order from the run directory and leaves there what it measured, how it ended, and the trained
model. Its exit code is the launcher's: 0, 4 (out of memory), 5 (data), 6 (anything else), 130 (interrupted).
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig

from launcher import workload
from launcher.callbacks import GenerationCallback, PhaseCallback
from launcher.checkpoints import last_checkpoint
from launcher.documents import append_lines, write_document
from launcher.engines import engine, engine_arguments, gather_when_saving, prepare_trainer
from launcher.errors import DataError, LauncherError
from launcher.job import JobSpec
from launcher.memory import Category, HeldMemory, MemoryMeasurement, Phase, StepShape
from launcher.plan import Plan
from launcher.redaction import redacted
from launcher.run_paths import RunPaths
from launcher.run_record import WORKER_MARK, Status, WorkerOrder, WorkerOutcome
from launcher.stored_secrets import known_secrets
from launcher.worker.checkpoints import save_aside
from launcher.worker.cuda_meter import CudaMeter
from launcher.worker.engine import connect, leave_together
from launcher.worker.exhausted import RESERVE_BYTES, is_out_of_memory, worded
from launcher.worker.held import held_memory
from launcher.worker.ingredients import Ingredients, prepare
from launcher.worker.laid_out import blamed_template
from launcher.worker.leaks import LeakCallback, LeakWatch, allocated_now_bytes
from launcher.worker.meter import CpuMeter, Meter, resident_peak_bytes
from launcher.worker.progress import Progress, ProgressCallback
from launcher.worker.ranks import rank, world_size
from launcher.worker.recorder import METERED_STEPS
from launcher.worker.residents import bucket_sizes_bytes, lasting_tensors, weigh_gradients, weigh_residents
from launcher.worker.results import save_results, saved_bytes
from launcher.worker.swapped import swap_buffers_seen
from launcher.worker.tasks import check_images
from launcher.worker.trusted import trusted_checkpoints

EXIT_CODES = {
    Status.DONE: 0,
    Status.OUT_OF_MEMORY: 4,
    Status.DATA_ERROR: 5,
    Status.FAILED: 6,
    Status.INTERRUPTED: 130,
}


def train(
    job: JobSpec,
    plan: Plan,
    ingredients: Ingredients,
    progress: Progress,
    report: Callable[[str], None],
    resume: Path | None = None,
) -> tuple[Trainer, MemoryMeasurement]:
    """Loads, trains, and measures, from a checkpoint (`resume`) or from the beginning.

    The only training in this project; the tracer runs the same workload.
    """
    # the arguments come first: with them accelerate connects the processes, and transformers learns to shard weights
    changes = {**ingredients.changes, **engine_arguments(job, plan)}
    arguments = workload.training_arguments(job, plan, ingredients.output_dir, changes)
    connect(plan)
    set_seed(job.training.seed)  # the adapters are the same on every process, and on any number of them
    built: list[Trainer] = []
    meter = _meter_of(built)
    with _abandoned_on_failure(meter):
        with meter.measure_load():
            model = ingredients.load()
        meter.enter(Phase.LOAD, 0)
        model = ingredients.adapt(model)

        def enter(phase: Phase) -> None:
            if phase is Phase.OPTIMIZER_STEP and not progress.gradient_bytes:
                progress.gradient_bytes = weigh_gradients(model, trainer.optimizer)
            progress.enter(phase)
            meter.enter(phase, max(0, trainer.state.global_step - progress.first_step))

        leaks = LeakWatch(ingredients.spare_bytes)
        callbacks: list[TrainerCallback] = [
            ProgressCallback(progress, plan, ingredients.metrics, report),
            PhaseCallback(enter),
            LeakCallback(leaks, METERED_STEPS + 1, report),
        ]
        if ingredients.prompts:
            write = _generation_writer(ingredients, report)
            callbacks.append(GenerationCallback(enter, ingredients.prompts, job.generation, write))
        trainer = _built(model, job, plan, arguments, ingredients, callbacks)
        built.append(trainer)
        progress.trainer = trainer
        for note in ingredients.settle(trainer):
            report(note)
        prepare_trainer(trainer, plan, enter)
        check_images(trainer, job)
        meter.watch(trainer)
        _watch_batches(trainer, progress, meter, METERED_STEPS * plan.gradient_accumulation_steps)
        _follow_passes(model, progress, meter)
        save_aside(trainer, ingredients.output_dir)
        if resume is not None:
            enter(Phase.RESUME)
        _run_loop(trainer, plan, meter, resume)
        resident = {**weigh_residents(model, trainer.optimizer), Category.GRADIENTS: progress.gradient_bytes}
        if not progress.is_stopped:
            gather_when_saving(trainer, plan)
            _save(trainer, job, ingredients, enter)
        return trainer, replace(_measured(meter, resident, progress, ingredients), leak=leaks.leak)


def _run_loop(trainer: Trainer, plan: Plan, meter: Meter, resume: Path | None) -> None:
    """Trains; engines wrap the model here, and make their buffers."""
    with swap_buffers_seen(plan, meter.receive):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def _save(trainer: Trainer, job: JobSpec, ingredients: Ingredients, enter: Callable[[Phase], None]) -> None:
    merged = ingredients.merged if job.method.merge else None
    places = ingredients.model, merged, ingredients.output_dir
    save_results(trainer, ingredients.tokenizer, *places, enter)


def _meter_of(trainers: Sequence[Trainer]) -> Meter:
    """What measures this process; the trainer joins when it is built."""
    of_device = CudaMeter if torch.cuda.is_available() else CpuMeter
    return of_device(
        buckets=lambda: bucket_sizes_bytes(trainers), residents=lambda: lasting_tensors(trainers)
    )


def _built(
    model: nn.Module,
    job: JobSpec,
    plan: Plan,
    arguments: SFTConfig,
    ingredients: Ingredients,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    rows = (ingredients.train_dataset, ingredients.eval_dataset)
    try:
        return workload.build_trainer(model, job, plan, arguments, *rows, ingredients.tokenizer, callbacks)
    except TemplateError as failure:
        raise blamed_template(ingredients.tokenizer, job, failure) from failure


@contextmanager
def _abandoned_on_failure(meter: Meter) -> Iterator[None]:
    """Stops a meter when what it measures fails."""
    try:
        yield
    except BaseException:
        meter.abandon()
        raise


def _measured(
    meter: Meter, resident: Mapping[Category, int], progress: Progress, ingredients: Ingredients
) -> MemoryMeasurement:
    """Reads the meter for the last time, and leaves the step that it saw."""
    phases = meter.finish()
    if ingredients.timeline is not None and meter.step is not None:
        write_document(ingredients.timeline, meter.step)
    return MemoryMeasurement(
        rank=rank(),
        meter=meter.name,
        phases=phases,
        resident_bytes=resident,
        shapes=_in_order(progress.shapes),
        evaluation_shapes=_in_order(progress.evaluation_shapes),
        host_peak_bytes=resident_peak_bytes(),
        disk_bytes=saved_bytes(ingredients.output_dir, ingredients.model, ingredients.merged),
    )


def _in_order(shapes: set[StepShape]) -> tuple[StepShape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (shape.micro_batch_size, shape.length)))


def _generation_writer(
    ingredients: Ingredients, report: Callable[[str], None]
) -> Callable[[int, torch.Tensor], None]:
    def write(step: int, tokens: torch.Tensor) -> None:
        texts = ingredients.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        report(f"generated {len(texts)} texts at step {step}")
        if ingredients.generations is not None and rank() == 0:  # the others generate the same
            append_lines(ingredients.generations, ({"step": step, "text": text} for text in texts))

    return write


def _watch_batches(trainer: Trainer, progress: Progress, meter: Meter, num_batches: int) -> None:
    collate = trainer.data_collator
    remaining = [num_batches]

    def collate_and_note(examples: list[Any]) -> Any:
        batch = collate(examples)
        meter.receive(value for value in batch.values() if isinstance(value, torch.Tensor))
        shape = StepShape(*batch["input_ids"].shape)
        if progress.phase is Phase.EVALUATION:
            progress.evaluation_shapes.add(shape)
        elif remaining[0] > 0:
            remaining[0] -= 1
            progress.shapes.add(shape)
        return batch

    trainer.data_collator = collate_and_note


def _follow_passes(model: nn.Module, progress: Progress, meter: Meter) -> None:
    """Counts tokens, and shows the meter what the loader's batches became on a device that is not the host's."""

    def begin(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if module.training and "input_ids" in kwargs:
            progress.tokens += kwargs["input_ids"].numel()
        given = (value for value in kwargs.values() if isinstance(value, torch.Tensor))
        meter.receive(value for value in given if value.device.type != "cpu")

    model.register_forward_pre_hook(begin, with_kwargs=True)


def run(order: WorkerOrder, paths: RunPaths) -> Status:
    """Carries out an order and leaves its outcome in the run directory."""
    progress = Progress(phase_file=paths.phase(rank()))
    progress.enter(Phase.LOAD)
    listens = rank() == 0  # rank 0 tells the others, so that all stop after the same step
    signal.signal(
        signal.SIGINT, (lambda number, frame: _ask_to_stop(progress, frame)) if listens else signal.SIG_IGN
    )
    status, message, seconds = Status.DONE, "", 0.0
    held: HeldMemory | None = None
    reserve = [bytearray(RESERVE_BYTES)]
    before_bytes = allocated_now_bytes()
    measurement: MemoryMeasurement | None = None
    try:
        _report("reading data and tokenizer")
        ingredients = prepare(order, paths)
        _report("loading the model")
        began = time.perf_counter()
        with trusted_checkpoints(order.plan), engine(order.plan, order.job.hardware.kind):
            _, measurement = train(
                order.job, order.plan, ingredients, progress, _report, last_checkpoint(paths.checkpoints)
            )
        seconds = time.perf_counter() - began
        if progress.is_stopped:
            status, message = (
                Status.INTERRUPTED,
                f"stopped after step {progress.steps}; {_left_by(order.plan, progress)}",
            )
    except DataError as failure:
        status, message = Status.DATA_ERROR, str(failure)
    except LauncherError as failure:
        status, message = Status.FAILED, str(failure)
    except KeyboardInterrupt:
        status, message = Status.INTERRUPTED, "stopped before the first step; there is nothing to save"
    except Exception as failure:  # the process boundary: whatever it was, the parent must learn of it
        status = Status.OUT_OF_MEMORY if is_out_of_memory(failure) else Status.FAILED
        if status is Status.OUT_OF_MEMORY:
            reserve.clear()
            held = held_memory(progress.trainer, before_bytes)
        message = worded(failure)
        traceback.print_exc()
    message = redacted(message, known_secrets(os.environ))
    try:
        if measurement is not None:
            write_document(paths.measured(rank()), measurement)
        outcome = replace(_outcome(status, message, seconds, progress), held=held)
        write_document(paths.outcome(rank()), outcome)
    except OSError as failure:  # then the launcher has this line alone
        _report(f"{message or status.value}; and that can't be written: {failure}")
        return Status.FAILED
    if status in (Status.DONE, Status.INTERRUPTED):
        leave_together()
    return status


def _left_by(plan: Plan, progress: Progress) -> str:
    """What an interrupted run leaves."""
    if plan.swaps:
        return "no checkpoint: none can be read back with optimizer states on NVMe"
    if progress.steps == progress.first_step:
        return "no step was done since, and nothing new is saved"
    return "a checkpoint was saved"


def _ask_to_stop(progress: Progress, frame: FrameType | None) -> None:
    """The first interrupt asks the loop to save and stop; a second one, or one before the loop, ends it."""
    if progress.stop_asked or not progress.step_ends:
        raise KeyboardInterrupt
    progress.stop_asked = True
    _report("interrupted: saving a checkpoint soon (press again to stop at once)")


def _outcome(status: Status, message: str, seconds: float, progress: Progress) -> WorkerOutcome:
    steps = [later - earlier for earlier, later in itertools.pairwise(progress.step_ends)]
    settled = steps[METERED_STEPS:]  # the meter slows the first steps down
    tokens = list(progress.step_tokens)[METERED_STEPS:]
    rates = [count / seconds for count, seconds in zip(tokens, settled, strict=True)]
    return WorkerOutcome(
        status=status,
        message=message,
        steps=progress.steps,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        train_seconds=seconds,
        tokens_per_second=statistics.median(rates) if rates else None,
        step_seconds=statistics.median(settled) if settled else None,
        world_size=world_size(),
        rank=rank(),
        host=socket.gethostname(),
        ended_at_seconds=time.time(),
        tokens_per_step=statistics.median(tokens) if tokens else None,
        phase=progress.phase,
    )


def _report(line: str) -> None:
    """One line for the person who waits; the other processes would say the same."""
    if rank() != 0:
        return
    sys.stderr.write(WORKER_MARK + line + "\n")
    sys.stderr.flush()
