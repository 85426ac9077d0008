"""The workload: model, adapters, trainer and training loop. Traced AND trained: there is no second copy.

The tracer calls these functions with fake tensors, the worker with real ones. What differs between the two is
passed in (weights or none, a data set, an output folder), never decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from launcher.job import (
    AdapterDtype,
    Checkpointing,
    Engine,
    EvaluationSpec,
    GenerationSpec,
    JobSpec,
    Loss,
    Method,
    MethodSpec,
    ModelSpec,
    Precision,
    Quantization,
)
from launcher.memory import Phase
from launcher.optimizers import low_rank_arguments
from launcher.plan import Plan
from launcher.trainers import require_liger_loss, token_accuracy, trainer_class

LEARNING_RATES = {Method.LORA: 2e-4, Method.QLORA: 2e-4, Method.FULL: 2e-5}
"""Defaults by method; what Axolotl, TRL and Unsloth ship for each (read 2026-11)."""


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


def weight_dtype(precision: Precision) -> torch.dtype:
    """Dtype in which the weights are held."""
    return torch.bfloat16 if precision is Precision.BF16 else torch.float32


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

    Without weights the tensors are on the current default device, and not quantised yet.
    """
    options: dict[str, Any] = {
        "dtype": weight_dtype(plan.precision),
        "attn_implementation": plan.attention.value,
        "trust_remote_code": job.model.trust_remote_code,
    }
    model: nn.Module
    if not weights:
        model = AutoModelForCausalLM.from_config(config, **options)
        return model
    quantization = quantization_config(job.method, plan)
    if quantization is not None:  # weights go straight to the device that quantises them
        options["quantization_config"] = quantization
        if plan.engine is not Engine.DEEPSPEED or plan.zero_stage < 3:  # transformers refuses both together
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            options["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(
        weights, config=config, revision=job.model.revision, **options
    )
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
        return model
    method = job.method
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
        modules_to_save=list(method.modules_to_save) or None,
        use_dora=method.use_dora,
        use_rslora=method.use_rslora,
        task_type="CAUSAL_LM",
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
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": plan.optimizer.value,
        **low_rank_arguments(training, plan.optimizer),
        "use_liger_kernel": plan.loss is Loss.LIGER,
        "bf16": plan.precision is Precision.BF16_MIXED,
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
    plan: Plan,
    arguments: SFTConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
    evaluation: EvaluationSpec | None = None,
) -> SFTTrainer:
    """Builds the trainer whose `train()` is both traced and run."""
    keeps_logits = evaluation is not None and evaluation.keep_logits
    if plan.activation_checkpointing is Checkpointing.SELECTIVE:
        # TRL wraps the model that it is given, and PEFT hands the call on to its base model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        enable_selective_activation_checkpointing(base)
    if isinstance(model, PeftModel):
        # resumed adapters keep the dtype that they were trained in; by default PEFT turns them to fp32
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)  # type: ignore[method-assign]
    if plan.loss is Loss.LIGER:
        require_liger_loss(model)
    trainer = trainer_class(plan)(
        model=model,  # type: ignore[arg-type]  # any module that transformers or PEFT built
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=token_accuracy if keeps_logits else None,
    )
    if arguments.packing:
        trainer.train_dataset = without_short_row(trainer.train_dataset, plan.max_length)
        if trainer.eval_dataset is not None:
            held_out = without_short_row(trainer.eval_dataset, plan.max_length)
            if (
                keeps_logits and evaluation is not None
            ):  # examples may be packed into more rows than were planned for
                held_out = held_out.select(range(min(len(held_out), evaluation.num_examples)))
            trainer.eval_dataset = held_out
    return trainer


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


def without_short_row(rows: Dataset, length: int) -> Dataset:
    """Leaves out the last row of packed data where it is shorter than the others.

    Packing cuts the joined tokens into rows of one length and leaves a rest. A batch with that rest would need
    padding, and with it an attention mask that no other batch has.
    """
    if len(rows) > 1 and len(rows[len(rows) - 1]["input_ids"]) < length:
        return rows.select(range(len(rows) - 1))
    return rows
