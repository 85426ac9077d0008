"""The rehearsal: the workload's training loop, run once on fake tensors under the tape."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer

from launcher import workload
from launcher.callbacks import PhaseCallback
from launcher.domain import Exponents
from launcher.engine_config import shares_from_host
from launcher.engines import (
    averaged_gradients,
    engine_arguments,
    gather_when_saving,
    local_tensors,
    master_weights,
    prepare_trainer,
    swap_buffers,
)
from launcher.job import AdapterDtype, Engine, JobSpec, Method, Precision, Task
from launcher.memory import Category, Phase, Region
from launcher.merge import drop_optimizer
from launcher.optimisation import AUTOCAST
from launcher.optimizers import optimizer_tensors
from launcher.plan import Plan
from launcher.planner.attribution import Attribution
from launcher.planner.blocks import Block
from launcher.planner.checkpoint import (
    FakeFiles,
    checkpoint_folder,
    rehearse_checkpoint,
    rehearse_merge,
    rehearse_resume,
)
from launcher.planner.generation import rehearse_generation
from launcher.planner.host import CHECKPOINT, MERGED, MODEL
from launcher.planner.kept_logits import window_of
from launcher.planner.materialize import initialize_dora, materialize, weight_tensors, with_scales
from launcher.planner.profile import build_host_profile, build_profile, build_stream, sum_blocks
from launcher.planner.skyline import Profile
from launcher.planner.tape import OFF_DEVICE, ON_DEVICE, Tape
from launcher.planner.work import Stage
from launcher.regions import RegionWatch
from launcher.vision import BlankImages, image_shape

STEPS = 2
"""Optimizer steps traced: the optimizer's state is born in the first, the peak is often in the second."""
EVALUATION_BATCHES = 2
FAKE_DEEPSPEED = "launcher.planner.fake_deepspeed"
"""Importing it takes two seconds that jobs without DeepSpeed need not wait."""


@dataclass
class Rehearsal:
    """One traced run of the training loop: tells the tape where in the step it is, and what blocks are for."""

    tape: Tape
    model: nn.Module
    job: JobSpec
    plan: Plan
    on_gpu: bool
    attribution: Attribution | None = None
    part_share: float = 1.0
    """How large a rank's parts are, of what they are in the traced world."""
    batch_inputs: Mapping[Exponents, int] | None = None
    steps_done: int = 0
    batches_begun: int = 0
    """Micro batches of the step that is on."""

    def __post_init__(self) -> None:
        self._gradient_blocks: list[Block] = []
        self._regions = RegionWatch(self._enter_region, self._end_backward)

    def inputs(self, folder: Path) -> dict[str, Any]:
        """Everything of the trainer that holds no tensors of the model; built outside the fake mode."""
        plan, evaluation = self.plan, self.job.evaluation
        # accelerate's loader fetches one batch ahead, in every step but the last of an epoch; only on a CPU is that
        # the device's memory (DataLoaderShard moves a batch when its turn comes; accelerate 1.15, data_loader.py)
        ahead = 0 if self.on_gpu else 1
        rows = plan.global_batch_size * STEPS + plan.micro_batch_size * plan.world_size * ahead
        window = window_of(self.job, plan)
        batches = window.traced_batches if evaluation.keep_logits else EVALUATION_BATCHES
        held_out = workload.evaluation_batch_size(self.job, plan) * batches * plan.world_size
        arguments = workload.training_arguments(
            self.job,
            plan,
            folder,
            {
                "use_cpu": True,
                "max_steps": STEPS,
                "eval_strategy": "steps" if evaluation.enabled else "no",
                "eval_steps": STEPS,
                "eval_accumulation_steps": window.traced_window if evaluation.keep_logits else None,
                "save_strategy": "no",
                "report_to": [],
                "train_sampling_strategy": "sequential",
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "dataloader_pin_memory": False,
                # fp16 has the same sizes, and no CPU autocast
                "bf16": plan.precision in AUTOCAST or plan.precision is Precision.FP16_MIXED,
                "fp16": False,
                **engine_arguments(self.job, plan),
            },
        )
        return {
            "arguments": arguments,
            "train_dataset": _blank_rows(rows, plan.max_length, self.job.model.task),
            "eval_dataset": _blank_rows(held_out, plan.max_length, self.job.model.task)
            if evaluation.enabled
            else None,
            "tokenizer": blank_tokenizer(),
            "blank_images": self._blank_images(),
        }

    def _blank_images(self) -> BlankImages | None:
        if self.job.model.task is not Task.IMAGE_TEXT_TO_TEXT:
            return None
        config: Any = self.model.config
        return BlankImages(image_shape(config), self.job.data.images_per_example)

    def run(self, inputs: dict[str, Any]) -> Profile:
        """Builds the trainer around fake tensors, trains, and sums up the tape."""
        adapters_as_base = self.job.method.adapter_dtype is AdapterDtype.BASE
        staged = self._stage_weights()
        materialize(
            self.model,
            adapters_as_base=adapters_as_base and self.plan.method is Method.LORA,
            prepared=self.job.method.kbit_preparation and self.plan.method is Method.QLORA,
            on_gpu=self.on_gpu,
            shard=self._sharder(),
            device=OFF_DEVICE if self.on_gpu and shares_from_host(self.plan) else ON_DEVICE,
        )
        initialize_dora(self.model)
        self.tape.mark(weight_tensors(self.model), Category.PARAMETERS)
        self.tape.mark(self.model.buffers(), Category.BUFFERS)
        trainer = workload.build_trainer(
            self.model, self.job, self.plan, callbacks=[PhaseCallback(self._enter)], **inputs
        )
        if trainer.compute_metrics is not None:  # numpy's, of numbers that there are none of
            trainer.compute_metrics = lambda prediction: {}
        trainer.remove_callback(PrinterCallback)  # prints metrics, and there are none
        self._trainer = trainer
        prepare_trainer(trainer, self.plan, self._enter)
        del staged  # the trainer has moved the model to the device
        weights = weight_tensors(self.model)  # the trainer has cast the adapters of quantised models
        self.tape.mark(weights, Category.PARAMETERS)
        parameters = self.tape.size_of(weights)
        del weights  # engines put others in their place
        self._assign_modules()
        self._listen(trainer)
        trainer.train()
        if self.plan.engine is not Engine.NONE:
            parameters = self.tape.size_of(weight_tensors(self.model))
        buffers = self.tape.size_of(self.model.buffers())
        states = self.tape.size_of(self._optimizer_tensors())
        if self.job.generation.enabled:
            self._enter(Phase.GENERATION)
            self.tape.padded = True  # prompts differ in length
            rehearse_generation(self.model, self.job.generation, on_gpu=self.on_gpu)
        disk_bytes = self._save_and_read(trainer)
        self.tape.shrink_parts(self.part_share)
        resident = {
            Category.PARAMETERS: sum_blocks(parameters),
            Category.BUFFERS: sum_blocks(buffers),
            Category.GRADIENTS: sum_blocks(self._gradient_blocks),
            Category.OPTIMIZER_STATE: sum_blocks(states),
        }
        stream = build_stream(self.tape.events) if self.attribution is not None else None
        profile = build_profile(self.tape.events, resident, self.batch_inputs or {}, stream)
        host = build_host_profile(self.tape.host_events, exact=not self.tape.shape.length_is_symbol)
        work = {} if self.tape.recorder is None else self.tape.recorder.tally()
        swapping = None if self.tape.swapped is None else self.tape.swapped()
        return replace(profile, host=host, disk_bytes=disk_bytes, work=work, swapping=swapping)

    def _stage_weights(self) -> list[torch.Tensor]:
        """Weights in host memory before the trainer moves them to a GPU; quantised ones are read straight to it."""
        if not self.on_gpu or self.plan.method is Method.QLORA or shares_from_host(self.plan):
            return []
        distinct = {id(weight): weight for weight in self.model.parameters()}.values()
        staged = [torch.empty(weight.shape, dtype=weight.dtype, device=OFF_DEVICE) for weight in distinct]
        self.tape.mark(staged, Category.PARAMETERS)
        return staged

    def _save_and_read(self, trainer: Trainer) -> dict[str, int]:
        """Saves, reads a checkpoint again, and merges, as far as the job does; returns the sizes of the folders.

        Reading comes last but one, because what is read was saved before; the optimizer starts without states there.
        """
        files = FakeFiles(self.on_gpu, self.tape.mark)
        model_folder, merged_folder = (Path(str(trainer.args.output_dir)) / name for name in (MODEL, MERGED))
        folders = {MODEL: model_folder}
        with files.in_place():
            self._enter(Phase.SAVE)
            gather_when_saving(trainer, self.plan)
            trainer.save_model(str(model_folder))
            if self.job.training.save_steps is not None and self.plan.engine is Engine.NONE:
                folders[CHECKPOINT] = checkpoint_folder(trainer)
                rehearse_checkpoint(trainer)
                drop_optimizer(trainer)
                self._enter(Phase.RESUME)
                rehearse_resume(trainer)
                self.tape.mark(_state_tensors(trainer), Category.OPTIMIZER_STATE)
            if self.job.method.merge and self.plan.method is not Method.FULL:
                folders[MERGED] = merged_folder
                drop_optimizer(trainer)
                self._enter(Phase.MERGE)
                rehearse_merge(trainer, merged_folder)
        return {name: files.folder_bytes(folder) for name, folder in folders.items()}

    def _enter(self, phase: Phase) -> None:
        if phase is Phase.OPTIMIZER_STEP:
            parts = averaged_gradients(self._trainer.optimizer)
            gradients = [*parts, *(p.grad for p in self.model.parameters() if p.grad is not None)]
            self.tape.mark(gradients, Category.GRADIENTS)
            if self.plan.zero_stage >= 2 or parts:
                self.tape.mark_parts(parts if self.plan.engine is Engine.DEEPSPEED else gradients)
            if gradients:  # the trainer speaks of the step once more when DeepSpeed has made it
                self._gradient_blocks = self.tape.size_of(gradients)
            self._assign_modules()
        if self.tape.phase is Phase.OPTIMIZER_STEP or self.tape.phase is Phase.LOAD:
            self.tape.mark(self._optimizer_tensors(), Category.OPTIMIZER_STATE)
            if self.plan.engine is not Engine.NONE:
                self._mark_weights()
            self._assign_modules()
        self._note_step(phase)
        self.tape.phase = phase
        self._regions.region = self.tape.region = Region.OUTSIDE
        # a phase that allocates nothing has a highest moment too: when it begins
        self._instant = torch.empty(1)
        if self.on_gpu:
            self._host_instant = torch.empty(1, device=OFF_DEVICE)

    def _note_step(self, phase: Phase) -> None:
        """Counts steps; work is counted in the last one, when the optimizer has its states."""
        recorder = self.tape.recorder
        if phase is Phase.OPTIMIZER_STEP and recorder is not None:
            recorder.stage = Stage.UPDATE  # DeepSpeed's comes at the end of the last backward pass
        if self.tape.phase is Phase.OPTIMIZER_STEP and phase is not Phase.OPTIMIZER_STEP:
            self.steps_done += 1
            self.batches_begun = 0
            if recorder is not None:
                recorder.active = self.steps_done == STEPS - 1
                recorder.stage = Stage.FIRST_FORWARD

    def _sharder(self) -> Callable[[nn.Parameter], None] | None:
        """What splits weights while they are loaded; None where they are loaded whole.

        Quantised ones are: transformers refuses both together.
        """
        plan = self.plan
        if plan.engine is not Engine.DEEPSPEED or plan.zero_stage < 3 or plan.method is Method.QLORA:
            return None
        sharder: Callable[[nn.Parameter], None] = importlib.import_module(FAKE_DEEPSPEED).sharder()
        return sharder

    def _optimizer_tensors(self) -> list[torch.Tensor]:
        return [
            *_state_tensors(self._trainer),
            *master_weights(self._trainer.optimizer),
            *swap_buffers(self._trainer.optimizer),
        ]

    def _mark_weights(self) -> None:
        """Engines hold the weights in places of their own, and parts of what all ranks share."""
        weights = weight_tensors(self.model)
        self.tape.mark(weights, Category.PARAMETERS)
        if self.plan.zero_stage == 3:
            self.tape.mark_parts(part for weight in weights for part in _parts_of(weight))
        if self.plan.zero_stage:
            self.tape.mark_parts(self._optimizer_tensors())
        if self.plan.uses_offload:  # gradients stay beside the states, in host memory
            masters = master_weights(self._trainer.optimizer)
            gradients = [weight.grad for weight in masters if weight.grad is not None]
            self.tape.mark(gradients, Category.GRADIENTS)
            self.tape.mark_parts(gradients)

    def _assign_modules(self) -> None:
        if self.attribution is not None:
            self.attribution.assign(self.tape, self._belongings)

    def _belongings(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A parameter or buffer with what is kept for it: scales, gradient, optimizer state."""
        gradient = [] if tensor.grad is None else [tensor.grad]
        return [*with_scales([tensor]), *gradient, *_state_tensors(self._trainer, tensor)]

    def _listen(self, trainer: Trainer) -> None:
        self._regions.listen(trainer)
        collate = trainer.data_collator

        def collate_and_mark(examples: list[Any]) -> Any:
            with self.tape.uncounted():  # the host's work, beside that of the device
                batch = collate(examples)
            self.tape.mark(batch.values(), Category.INPUTS)
            if self.on_gpu:  # the loader's pinned copy, until the next one takes its place
                self._pinned = [torch.empty_like(tensor, device=OFF_DEVICE) for tensor in batch.values()]
                self.tape.mark(self._pinned, Category.INPUTS)
            if self.batch_inputs is None:
                self.batch_inputs = sum_blocks(self.tape.size_of(batch.values()))
            return batch

        trainer.data_collator = collate_and_mark
        step = trainer.training_step

        def step_or_skip(*args: Any, **kwargs: Any) -> torch.Tensor:
            # of the first step one micro batch does: the second has all of them, with the optimizer's states beside
            # (engines count micro batches by themselves)
            alone = self.plan.engine is Engine.NONE
            if alone and self.steps_done == 0 and self.batches_begun > 0:
                return torch.zeros(())
            loss: torch.Tensor = step(*args, **kwargs)
            return loss

        trainer.training_step = step_or_skip  # type: ignore[method-assign]

    def _enter_region(self, region: Region) -> None:
        self.tape.enter_region(region)
        if region is Region.BACKBONE:
            if self.tape.recorder is not None:
                self.tape.recorder.stage = Stage.LATER_FORWARD if self.batches_begun else Stage.FIRST_FORWARD
            self.batches_begun += 1

    def _end_backward(self) -> None:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.tape.mark(gradients, Category.GRADIENTS)
        if self.tape.recorder is not None:
            is_last = self.batches_begun == self.plan.gradient_accumulation_steps
            self.tape.recorder.stage = Stage.UPDATE if is_last else Stage.LATER_FORWARD


def _parts_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """The part of a sharded weight that a rank holds; nothing of a weight that every rank holds whole."""
    held = list(local_tensors([weight]))
    return held if isinstance(weight, DTensor) else held[1:]


def _state_tensors(trainer: Trainer, parameter: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Optimizer state, of one parameter or of all."""
    states = trainer.optimizer.state if trainer.optimizer is not None else {}
    chosen = states.values() if parameter is None else [states.get(parameter, {})]
    return [tensor for state in chosen for tensor in optimizer_tensors(state)]


def _blank_rows(count: int, length: int, task: Task) -> Dataset:
    columns: dict[str, list[Any]] = {"input_ids": [[0] * length] * count}
    if task is Task.SEQUENCE_CLASSIFICATION:
        columns["label"] = [0] * count
    return Dataset.from_dict(columns)


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of two words: the trainer asks for one, rows that are already token ids need none."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
