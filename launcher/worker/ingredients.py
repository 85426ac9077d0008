"""What one training needs besides job and plan: rows, tokenizer, weights, and where things go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, Trainer

from launcher import workload
from launcher.documents import read_document
from launcher.errors import DataError
from launcher.hardware import DeviceKind
from launcher.memory import MemoryMeasurement
from launcher.optimisation import AUTO_SAVE_STEPS
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from launcher.worker.exhausted import is_out_of_memory
from launcher.worker.laid_out import blamed_template, check_laid_out, require_known_ids, require_longest
from launcher.worker.longest import beyond_rehearsal, keep_longest, most_text, num_batches_trained
from launcher.worker.prompts import Batch, prompt_batches
from launcher.worker.ranks import rank
from launcher.worker.tasks import UNREADABLE, examples_of, source_of, tokenizer_of, unreadable_model


@dataclass(frozen=True)
class Ingredients:
    """What one training needs besides job and plan."""

    load: Callable[[], nn.Module]
    """Reads the model's weights; run under the meter."""
    train_dataset: Dataset
    """Training rows."""
    eval_dataset: Dataset | None
    """Held-out rows."""
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    """Tokenizer of the model; of one that sees images its processor."""
    changes: Mapping[str, Any]
    """Changes to the trainer's arguments."""
    output_dir: Path
    """Where checkpoints go."""
    settle: Callable[[Trainer], tuple[str, ...]] = lambda trainer: ()
    """Has the last word on the data, when the trainer has laid it out; what there is to say of it."""
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model
    """Attaches adapters; run under the meter."""
    metrics: Path | None = None
    """Where metrics.jsonl goes."""
    prompts: tuple[Batch, ...] = ()
    """What to generate from."""
    generations: Path | None = None
    """Where generated text goes."""
    timeline: Path | None = None
    """Where the metered step goes."""
    model: Path | None = None
    """Where the trained weights or adapter go; None: nowhere."""
    merged: Path | None = None
    """Where the merged model goes, if the job asks for one."""
    spare_bytes: int | None = None
    """What the device has above the predicted peak; None where nobody knows."""


def _with_most_text(
    order: WorkerOrder, train_rows: Dataset, eval_rows: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """The examples among which a rehearsal finds its worst batches."""
    job, plan = order.job, order.plan
    num_rows = plan.micro_batch_size * num_batches_trained(job, plan)
    train_rows = most_text(train_rows, num_rows, num_rows * plan.max_length)
    if eval_rows is not None and not job.evaluation.keep_logits:
        num_rows = workload.evaluation_batch_size(job, plan) * plan.world_size
        eval_rows = most_text(eval_rows, num_rows, num_rows * plan.max_length)
    return train_rows, eval_rows


def prepare(order: WorkerOrder, paths: RunPaths) -> Ingredients:
    """Reads data, tokenizer and config; nothing of the model's weights yet.

    Raises:
        DataError: When one of them can't be read, or they do not go together.
    """
    job, plan = order.job, order.plan
    tokenizer = tokenizer_of(job, order.weights, order.converted)
    source = source_of(order.weights, order.converted)
    try:
        config = workload.model_config(source, job.model)
    except UNREADABLE as failure:
        raise unreadable_model(source, failure) from failure
    require_known_ids(tokenizer, config, source)
    train_rows, eval_rows = examples_of(job, tokenizer)

    prompts: tuple[Batch, ...] = ()
    if job.generation.enabled:
        assert isinstance(tokenizer, PreTrainedTokenizerBase)  # a model that sees does not generate here
        asked = train_rows if eval_rows is None else eval_rows
        try:
            prompts = prompt_batches(tokenizer, asked, job.generation)
        except TemplateError as failure:
            raise blamed_template(tokenizer, job, failure) from failure
    num_read = len(train_rows)
    if order.rehearses:
        train_rows, eval_rows = _with_most_text(order, train_rows, eval_rows)
        prompts = tuple(sorted(prompts, key=lambda batch: -batch[0].shape[1])[:1])
    num_given = len(train_rows)

    training, memory_bytes = job.training, job.hardware.memory_bytes
    return Ingredients(
        load=lambda: _loaded(config, order, source),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        tokenizer=tokenizer,
        changes={
            "use_cpu": job.hardware.kind is DeviceKind.CPU,
            "save_strategy": "steps" if training.steps_between_saves else "no",
            "save_steps": training.steps_between_saves or AUTO_SAVE_STEPS,
            "report_to": [integration.value for integration in training.report_to],
            "dataloader_pin_memory": job.hardware.kind is not DeviceKind.CPU,
        },
        output_dir=paths.checkpoints,
        adapt=lambda model: workload.attach_adapters(model, job, plan),
        settle=lambda trainer: _settled(trainer, order, paths, num_given, num_read),
        metrics=paths.metrics,
        prompts=prompts,
        generations=paths.generations,
        timeline=paths.timeline(rank()),
        model=paths.model,
        merged=paths.merged,
        spare_bytes=memory_bytes - order.predicted.peak_device_bytes if memory_bytes else None,
    )


def _settled(
    trainer: Trainer, order: WorkerOrder, paths: RunPaths, num_given: int, num_read: int
) -> tuple[str, ...]:
    """Checks the rows that a trainer laid out, of which a rehearsal keeps the worst; what there is to say of them."""
    job, plan = order.job, order.plan
    if not order.rehearses:
        notes, rehearsed = check_laid_out(trainer, job, plan, num_given), paths.rehearsal.measured(rank())
        if not rehearsed.exists():
            return notes
        return notes + beyond_rehearsal(trainer, read_document(rehearsed, MemoryMeasurement))
    if num_given == num_read:  # what the run would find only after the rehearsal
        check_laid_out(trainer, job, plan, num_given)
    require_longest(trainer, job, plan, num_given)
    keep_longest(trainer, job, plan)
    return ()


def _loaded(config: PretrainedConfig, order: WorkerOrder, source: str) -> nn.Module:
    try:
        return workload.build_model(config, order.plan, source, order.job)
    except (*UNREADABLE, SafetensorError) as failure:
        if is_out_of_memory(failure):
            raise
        raise DataError(
            f"the weights at `{source}` can't be loaded: {failure}",
            "fetch the model again, or correct its config.json where sizes differ",
        ) from failure
