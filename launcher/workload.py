"""The workload: model, adapters, trainer and training loop. Traced AND trained: there is no second copy.

The tracer calls these functions with fake tensors, the worker with real ones. What differs between the two is
passed in (weights or none, a data set, an output folder), never decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.utils.quantization_config import Mxfp4Config
from trl import SFTConfig
from trl.models import enable_selective_activation_checkpointing

from launcher import vision
from launcher.architecture import DEQUANTIZED_AS_READ, stored_quantization
from launcher.classification import build_classifier_trainer, tokenized
from launcher.errors import UnsupportedByPlanner
from launcher.job import (
    AdapterDtype,
    Checkpointing,
    Engine,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Precision,
    Quantization,
    Task,
)
from launcher.loading import require_loaded
from launcher.optimisation import AUTOCAST, BF16_WEIGHTS
from launcher.optimizers import low_rank_arguments
from launcher.plan import Plan
from launcher.trainers import RowPreparation, require_liger_loss, token_accuracy, trainer_class

LEARNING_RATES = {Method.LORA: 2e-4, Method.QLORA: 2e-4, Method.FULL: 2e-5}
"""Defaults by method; what Axolotl, TRL and Unsloth ship for each (read 2026-11)."""

NOT_LEARNT = -100
"""Label of a token that the loss leaves out (torch's cross entropy)."""
UNCUT = 1 << 30
"""Tokens that no text has."""

AUTO_CLASSES: Mapping[Task, Any] = {
    Task.CAUSAL_LM: AutoModelForCausalLM,
    Task.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    Task.IMAGE_TEXT_TO_TEXT: AutoModelForImageTextToText,
}
"""The classes of transformers that build the model of a task."""


def weight_dtype(precision: Precision) -> torch.dtype:
    """Dtype in which the weights are held."""
    return torch.bfloat16 if precision in BF16_WEIGHTS else torch.float32


def model_config(source: str, model: ModelSpec) -> PretrainedConfig:
    """The transformers config: of a folder or hub id, or (empty source) of the catalogue's facts."""
    config: PretrainedConfig
    if not source:
        config = AutoConfig.for_model(**model.architecture)
    else:
        config = AutoConfig.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    config.get_text_config().use_cache = False  # training keeps no keys and values
    if model.task is Task.SEQUENCE_CLASSIFICATION:
        config.num_labels = model.num_labels
    return config


def quantization_config(method: MethodSpec, plan: Plan) -> BitsAndBytesConfig | None:
    """How the weights are quantised; None when they are not."""
    if plan.method is not Method.QLORA:
        return None
    if method.quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantization.value,
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=compute_dtype(plan.precision),
        # only floating-point parameters can be sharded; the bytes are the same, two or four of them to a number
        bnb_4bit_quant_storage=weight_dtype(plan.precision) if plan.zero_stage == 3 else torch.uint8,
    )


def compute_dtype(precision: Precision) -> torch.dtype:
    """Dtype in which matrices are multiplied."""
    names = {Precision.FP16_MIXED: torch.float16, Precision.FP32: torch.float32}
    return names.get(precision, torch.bfloat16)


def build_model(config: PretrainedConfig, plan: Plan, weights: str, job: JobSpec) -> nn.Module:
    """Builds the model: with the weights of a folder or hub id, or (empty) with its shapes only.

    Without weights the tensors are on the current default device, and not quantised yet. Weights are read from
    safetensors files only: a pickle may run what is in it.
    """
    options: dict[str, Any] = {
        "dtype": weight_dtype(plan.precision),
        "attn_implementation": plan.attention.value,
        "trust_remote_code": job.model.trust_remote_code,
    }
    model: nn.Module
    auto_class = AUTO_CLASSES[job.model.task]
    if not weights:
        if job.model.code_digest and auto_class.__name__ in (getattr(config, "auto_map", None) or {}):
            options["code_revision"] = (
                job.model.revision
            )  # from_pretrained takes it from the weights' revision
        model = auto_class.from_config(config, **options)
        return model
    quantization = quantization_config(job.method, plan)
    if quantization is not None:  # weights go straight to the device that quantises them
        options["quantization_config"] = quantization
        if plan.engine is not Engine.DEEPSPEED or plan.zero_stage < 3:  # transformers refuses both together
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            options["device_map"] = {"": device}
    elif stored_quantization(config.to_dict()) == DEQUANTIZED_AS_READ:
        # said by us, because transformers' own choice depends on the kernels that are installed
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, loaded = auto_class.from_pretrained(weights, config=config, revision=job.model.revision, **options)
    require_loaded(model, loaded, weights, job.model.task)  # in place of transformers' own objection to sizes
    return model


def scales_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """Scales and tables that bitsandbytes keeps beside a quantised weight; none for any other."""
    state = getattr(weight, "quant_state", None)
    nested = getattr(state, "state2", None)
    values = [getattr(weight, "SCB", None), getattr(state, "offset", None)]
    values += [getattr(holder, name, None) for holder in (state, nested) for name in ("absmax", "code")]
    return [value for value in values if isinstance(value, torch.Tensor)]


def attach_adapters(model: nn.Module, job: JobSpec, plan: Plan) -> nn.Module:
    """Puts LoRA adapters on the model, if the plan has any; frozen weights stay as they are.

    Quantised models are prepared first, when the job asks for it: what is not quantised becomes fp32.
    """
    if plan.method is Method.FULL:
        if job.model.freeze_vision:
            vision.freeze_tower(model)
        return model
    method = job.method
    tower = vision.tower_pattern(model) if job.model.freeze_vision else None
    for module in model.modules():
        # on CPUs with avx512_bf16 bitsandbytes repacks 4-bit weights in evaluation, and training can't read them then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # nn.Module's attributes have no type
    if plan.method is Method.QLORA and method.kbit_preparation:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    targets = method.target_modules
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=method.alpha or 2 * plan.rank,
        lora_dropout=method.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=tower,
        modules_to_save=list(method.modules_to_save) or None,
        use_dora=method.use_dora,
        use_rslora=method.use_rslora,
        task_type="SEQ_CLS" if job.model.task is Task.SEQUENCE_CLASSIFICATION else "CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(
        model, config, autocast_adapter_dtype=method.adapter_dtype is AdapterDtype.FP32
    )
    return adapted


def training_arguments(job: JobSpec, plan: Plan, output_dir: Path, changes: Mapping[str, Any]) -> SFTConfig:
    """The trainer's arguments.

    Args:
        job: The job.
        plan: The plan.
        output_dir: Where checkpoints go.
        changes: What the caller's circumstances add (device, saving, a shorter run).
    """
    training, evaluation = job.training, job.evaluation
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_length": plan.max_length,
        "packing": job.data.packing,
        "packing_strategy": "wrapped",
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "per_device_eval_batch_size": evaluation_batch_size(job, plan),
        "gradient_checkpointing": plan.activation_checkpointing is not Checkpointing.NONE,
        "gradient_checkpointing_kwargs": (
            {"offload": True} if plan.activation_checkpointing is Checkpointing.OFFLOAD else None
        ),
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_epochs,
        "learning_rate": training.learning_rate or LEARNING_RATES[plan.method],
        "lr_scheduler_type": training.schedule.value,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": plan.optimizer.value,
        **low_rank_arguments(training, plan.optimizer),
        "use_liger_kernel": plan.loss is Loss.LIGER,
        "bf16": plan.precision in AUTOCAST,
        "fp16": plan.precision is Precision.FP16_MIXED,
        "seed": training.seed,
        "logging_steps": training.logging_steps,
        "save_total_limit": training.save_total_limit,
        "eval_strategy": "no" if not evaluation.enabled else "steps" if evaluation.steps else "epoch",
        "eval_steps": evaluation.steps,
        "eval_accumulation_steps": evaluation.accumulation_steps,
        "dataloader_drop_last": True,
        "disable_tqdm": True,
    }
    return SFTConfig(**{**arguments, **changes})


def evaluation_batch_size(job: JobSpec, plan: Plan) -> int:
    """Sequences per evaluation batch."""
    return job.evaluation.batch_size or plan.micro_batch_size


def build_trainer(
    model: nn.Module,
    job: JobSpec,
    plan: Plan,
    arguments: SFTConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    callbacks: Sequence[TrainerCallback],
    blank_images: vision.BlankImages | None = None,
) -> Trainer:
    """Builds the trainer whose `train()` is both traced and run.

    `blank_images` collates rows that have no images in them, for a model that sees; None: TRL's own collators do.
    """
    keeps_logits = job.evaluation.enabled and job.evaluation.keep_logits
    if plan.activation_checkpointing is Checkpointing.SELECTIVE:
        # TRL wraps the model that it is given, and PEFT hands the call on to its base model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        enable_selective_activation_checkpointing(base)
    if isinstance(model, PeftModel):
        # resumed adapters keep the dtype that they were trained in; by default PEFT turns them to fp32
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)  # type: ignore[method-assign]
    if plan.loss is Loss.LIGER:
        require_liger_loss(model)
    if job.model.task is Task.SEQUENCE_CLASSIFICATION:
        assert isinstance(tokenizer, PreTrainedTokenizerBase)  # a processor belongs to models that see
        return build_classifier_trainer(
            model, arguments, plan.max_length, train_dataset, eval_dataset, tokenizer, callbacks
        )
    trainer = trainer_class(plan)(
        model=model,  # type: ignore[arg-type]  # any module that transformers or PEFT built
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=blank_images,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=token_accuracy if keeps_logits else None,
    )
    if arguments.packing:
        trainer.train_dataset = without_short_row(trainer.train_dataset, plan.max_length)
        if trainer.eval_dataset is not None:
            held_out = without_short_row(trainer.eval_dataset, plan.max_length)
            if keeps_logits:  # examples may be packed into more rows than were planned for
                held_out = held_out.select(range(min(len(held_out), job.evaluation.num_examples)))
            trainer.eval_dataset = held_out
    return trainer


def prepared_rows(
    rows: Dataset, job: JobSpec, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, output_dir: Path
) -> Dataset:
    """Rows as the job's trainer makes token ids of them, before it cuts or packs them.

    Args:
        rows: Examples in a layout that the trainer takes.
        job: The job.
        tokenizer: Of its model.
        output_dir: Scratch space.

    Raises:
        UnsupportedByPlanner: When images are a part of the rows: their tokens are made with each batch.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UnsupportedByPlanner(
            f"model.task={job.model.task}: the tokens of an example with images are made with its batch, not before",
            "data.max_length=<tokens>",
        )
    if job.model.task is Task.SEQUENCE_CLASSIFICATION:
        return tokenized(rows, tokenizer, UNCUT)
    return RowPreparation(tokenizer, "prompt" in rows.column_names).prepared(rows, output_dir)


def without_short_row(rows: Dataset, length: int) -> Dataset:
    """Leaves out the last row of packed data where it is shorter than the others.

    Packing cuts the joined tokens into rows of one length and leaves a rest. A batch with that rest would need
    padding, and with it an attention mask that no other batch has.
    """
    if len(rows) > 1 and len(rows[len(rows) - 1]["input_ids"]) < length:
        return rows.select(range(len(rows) - 1))
    return rows
