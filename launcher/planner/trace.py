"""Traces a job: runs the workload's training loop on fake tensors and returns the skyline of its memory."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.masking_utils as masking_utils
import transformers.trainer_pt_utils as trainer_pt_utils
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, PrinterCallback
from transformers.core_model_loading import dot_natural_key
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from launcher import workload
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, JobSpec, Loss
from launcher.memory import Category, Phase
from launcher.plan import Plan
from launcher.planner import worst_case
from launcher.planner.cuda_twin import cuda_twin, replaced
from launcher.planner.depth import DepthMismatch, assemble, plan_depths, truncate
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.polynomial import Exponents, TracedShape
from launcher.planner.profile import build_profile, sum_blocks
from launcher.planner.regimes import Lines, config_dimensions, domain_of, symbolic_shape
from launcher.planner.skyline import Domain, Profile, Skyline, build_skyline
from launcher.planner.tape import Region, Tape
from launcher.planner.tracer import Subject, SubjectFacts, uses_bitsandbytes

STEPS = 2
"""Optimizer steps traced: the optimizer's state is born in the first, the peak is often in the second."""
EVALUATION_BATCHES = 2


@dataclass(frozen=True)
class TraceSubject:
    """What is traced: everything but the shape."""

    job: JobSpec
    """The job."""
    plan: Plan
    """The plan; its batch and length are replaced by those of the trace."""
    hardware: HardwareSpec
    """Decides which device's code paths are followed."""
    config: PretrainedConfig
    """The model, at full depth."""

    @property
    def padded(self) -> bool:
        """Whether batches have padding in the worst case."""
        return not self.job.data.packing


def regime_lines(subject: TraceSubject) -> Lines:
    """Where the regimes of a job meet, read off the libraries and the model's config."""
    text = subject.config.get_text_config()
    tile: int | None = trl_chunked.TOKEN_CHUNK_SIZE if subject.plan.loss is Loss.CHUNKED else None
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = window and (kinds is None or "sliding_attention" in kinds)
    lengths: set[int] = {int(window)} if window and slides else set()
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk:
        lengths.add(int(chunk) + 1)
    own_batch = subject.job.evaluation.batch_size if subject.job.evaluation.enabled else None
    if own_batch and tile:
        lengths.add(tile // own_batch + 2)
    dimensions = {*config_dimensions(subject.config.to_dict()), subject.plan.rank, own_batch or 1}
    vocabulary_tile = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    dimensions |= {vocabulary_tile, text.vocab_size % vocabulary_tile, trl_chunked.TOKEN_CHUNK_SIZE}
    dimensions |= _parameter_dimensions(subject)
    return Lines(tile, tuple(sorted(lengths)), tuple(sorted(dimensions)))


def _parameter_dimensions(subject: TraceSubject) -> set[int]:
    """Dimensions that no config names: those of fused projections are sums of others."""
    config = copy.deepcopy(subject.config)
    text = config.get_text_config()
    truncate(text, min(plan_depths(text).depths))
    with _quiet():
        model = _build_on_meta(subject, config, subject.plan)
    return {size for parameter in model.parameters() for size in parameter.shape}


def trace_regime(subject: TraceSubject, batch: int, length: int, accumulation: int) -> Skyline:
    """The skyline of the regime that holds a shape; of that shape alone where no symbol fits into the regime."""
    lines = regime_lines(subject)
    domain = domain_of(batch, length, lines)
    shape = symbolic_shape(domain, lines)
    if shape is None:
        return trace_shape(subject, batch, length, accumulation)
    return _trace(subject, shape, domain, accumulation)


def trace_shape(subject: TraceSubject, batch: int, length: int, accumulation: int) -> Skyline:
    """The skyline of one shape alone: exact, without symbols."""
    domain = Domain(batch, batch, length, length, 1, None)
    shape = TracedShape(batch, length, batch_is_symbol=False, length_is_symbol=False)
    return _trace(subject, shape, domain, accumulation)


def trace_full_depth(subject: TraceSubject, batch: int, length: int, accumulation: int) -> Skyline:
    """As `trace_shape`, with every layer traced: what extension over depth is tested against."""
    domain = Domain(batch, batch, length, length, 1, None)
    shape = TracedShape(batch, length, batch_is_symbol=False, length_is_symbol=False)
    profile = record(subject, shape, subject.config.get_text_config().num_hidden_layers, accumulation)
    return build_skyline(domain, profile, [profile.live], accumulation)


def _trace(subject: TraceSubject, shape: TracedShape, domain: Domain, accumulation: int) -> Skyline:
    text = subject.config.get_text_config()
    depths = plan_depths(text)
    profiles = [record(subject, shape, depth, accumulation) for depth in depths.depths]
    try:
        return assemble(domain, profiles, depths.steps, accumulation)
    except DepthMismatch as mismatch:
        logging.getLogger(__name__).info("tracing every layer: %s", mismatch)
        profile = record(subject, shape, text.num_hidden_layers, accumulation)
        return assemble(domain, [profile], 0.0, accumulation)


def record(subject: TraceSubject, shape: TracedShape, depth: int, accumulation: int) -> Profile:
    """Runs the training loop once on fake tensors.

    Args:
        subject: What is traced.
        shape: At which batch and length.
        depth: With how many decoder layers.
        accumulation: Micro batches per optimizer step; more than two add nothing but waiting inputs.

    Raises:
        UnsupportedByPlanner: When the tracer can't follow an operation.
    """
    plan = replace(
        subject.plan,
        micro_batch_size=shape.batch,
        max_length=shape.length,
        gradient_accumulation_steps=min(accumulation, 2),
    )
    config = copy.deepcopy(subject.config)
    truncate(config.get_text_config(), depth)
    fake = FastFakeTensorMode()
    on_gpu = subject.hardware.kind in (DeviceKind.CUDA, DeviceKind.ROCM)
    twins = dict(worst_case.twins())
    quantizes = uses_bitsandbytes(plan)
    if quantizes:
        _quantized().prepare()
        twins |= _quantized().twins(on_cpu=not on_gpu)
    tape = Tape(shape, twins=twins, padded=subject.padded and shape.batch > 1, fake=fake)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        model = _build_on_meta(subject, config, plan)
        stack.enter_context(replaced(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(replaced(masking_utils, "fast_all", _without_padding(subject.padded)))
        stack.enter_context(replaced(trainer_pt_utils, "nested_numpify", _zeros_like))
        if on_gpu:
            stack.enter_context(cuda_twin(subject.hardware))
        if on_gpu and quantizes:
            stack.enter_context(_quantized().gpu_branches())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rehearsal = _Rehearsal(tape, model, subject.job, plan)
        trainer_inputs = rehearsal.inputs(folder)
        stack.enter_context(fake)
        stack.enter_context(tape)
        try:
            return rehearsal.run(trainer_inputs)
        except (RuntimeError, NotImplementedError, TypeError) as failure:
            operation = f" at {tape.failed}" if tape.failed else ""
            raise UnsupportedByPlanner(
                f"the tracer can't follow {config.model_type} with attention={plan.attention}, "
                f"loss={plan.loss}, precision={plan.precision}{operation}: {failure}",
                "another `planner.pin.attention` or `planner.pin.loss` may be traceable",
            ) from failure


def _without_padding(padded: bool) -> Callable[[torch.Tensor], bool]:
    """Answers transformers' question whether a mask masks nothing; a single sequence is never padded."""
    return lambda mask: not (padded and mask.shape[0] > 1)


def _zeros_like(tensor: torch.Tensor) -> NDArray[np.float64]:
    """What evaluation gets for the losses it gathers: fake tensors have no numbers to convert."""
    return np.zeros(tensor.shape)


def _build_on_meta(subject: TraceSubject, config: PretrainedConfig, plan: Plan) -> nn.Module:
    try:
        with torch.device("meta"):
            model = workload.build_model(config, plan, "", subject.job)
            quantization = workload.quantization_config(subject.job.method, plan)
            if quantization is not None:
                model = _quantized().convert_to_shell(model, quantization)
            return workload.attach_adapters(model, subject.job, plan)
    except ValueError as failure:
        raise UnsupportedByPlanner(
            f"transformers can't build {config.model_type} with attention={plan.attention}: {failure}",
            "another `planner.pin.attention` may be supported",
        ) from failure


def _quantized() -> Any:
    """What knows bitsandbytes; importing it takes a second that most jobs need not wait."""
    return importlib.import_module("launcher.planner.quantized")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries and the cyclic garbage collector, so that releases happen by reference count."""
    level = logging.root.manager.disable
    collecting = gc.isenabled()
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        gc.disable()
        gc.freeze()  # the loop collects garbage by itself; a large heap makes that slow
        try:
            yield
        finally:
            gc.unfreeze()
            logging.disable(level)
            if collecting:
                gc.enable()


@dataclass
class _Rehearsal:
    """One traced run of the training loop: tells the tape where in the step it is, and what blocks are for."""

    tape: Tape
    model: nn.Module
    job: JobSpec
    plan: Plan
    batch_inputs: Mapping[Exponents, int] | None = None
    gradients: Mapping[Exponents, int] | None = None

    def inputs(self, folder: Path) -> dict[str, Any]:
        """Everything of the trainer that holds no tensors of the model; built outside the fake mode."""
        plan, evaluation = self.plan, self.job.evaluation
        rows = plan.micro_batch_size * plan.gradient_accumulation_steps * STEPS
        held_out = workload.evaluation_batch_size(self.job, plan) * EVALUATION_BATCHES
        arguments = workload.training_arguments(
            self.job,
            plan,
            folder,
            {
                "use_cpu": True,
                "max_steps": STEPS,
                "eval_strategy": "steps" if evaluation.enabled else "no",
                "eval_steps": STEPS,
                "save_strategy": "no",
                "report_to": [],
                "train_sampling_strategy": "sequential",
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "dataloader_pin_memory": False,
                "bf16": plan.precision.value.endswith(
                    "_mixed"
                ),  # fp16 has the same sizes, and no CPU autocast
                "fp16": False,
            },
        )
        return {
            "arguments": arguments,
            "train_dataset": _blank_rows(rows, plan.max_length),
            "eval_dataset": _blank_rows(held_out, plan.max_length) if evaluation.enabled else None,
            "tokenizer": blank_tokenizer(),
        }

    def run(self, inputs: dict[str, Any]) -> Profile:
        """Builds the trainer around fake tensors, trains, and sums up the tape."""
        _materialize(self.model)
        weights = _weights(self.model)
        self.tape.mark(weights, Category.PARAMETERS)
        self.tape.mark(self.model.buffers(), Category.BUFFERS)
        parameters = self.tape.size_of(weights)
        buffers = self.tape.size_of(self.model.buffers())
        trainer = workload.build_trainer(
            self.model, self.plan, callbacks=[workload.PhaseCallback(self._enter)], **inputs
        )
        trainer.remove_callback(PrinterCallback)  # prints metrics, and there are none
        self._trainer = trainer
        self._listen(trainer)
        trainer.train()
        states = self.tape.size_of(_state_tensors(trainer))
        self._enter(Phase.SAVE)
        self._instant = torch.empty(1)  # the highest moment of saving is what is alive when it begins
        resident = {
            Category.PARAMETERS: sum_blocks(parameters),
            Category.BUFFERS: sum_blocks(buffers),
            Category.GRADIENTS: self.gradients or {},
            Category.OPTIMIZER_STATE: sum_blocks(states),
        }
        return build_profile(self.tape.events, resident, self.batch_inputs or {})

    def _enter(self, phase: Phase) -> None:
        if phase is Phase.OPTIMIZER_STEP:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.tape.mark(gradients, Category.GRADIENTS)
            self.gradients = sum_blocks(self.tape.size_of(gradients))
        if self.tape.phase is Phase.OPTIMIZER_STEP:
            self.tape.mark(_state_tensors(self._trainer), Category.OPTIMIZER_STATE)
        self.tape.phase = phase
        self.tape.region = Region.OUTSIDE

    def _listen(self, trainer: SFTTrainer) -> None:
        base: Any = self.model
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        backbone = base.base_model
        backbone.register_forward_pre_hook(self._backbone_begins)
        backbone.register_forward_hook(self._backbone_ends)
        for module in backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(self._layer_begins)
                module.register_forward_hook(self._layer_ends, always_call=True)
        collate = trainer.data_collator

        def collate_and_mark(examples: list[Any]) -> Any:
            batch = collate(examples)
            self.tape.mark(batch.values(), Category.INPUTS)
            if self.batch_inputs is None:
                self.batch_inputs = sum_blocks(self.tape.size_of(batch.values()))
            return batch

        trainer.data_collator = collate_and_mark

    def _backbone_begins(self, module: nn.Module, args: Any) -> None:
        self.tape.region = Region.BACKBONE

    def _backbone_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tape.settle(Region.BACKBONE, Category.ACTIVATIONS)
        self.tape.region = Region.HEAD
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(self._backward_reaches_backbone)

    def _backward_reaches_backbone(self, gradient: torch.Tensor) -> None:
        self.tape.region = Region.BACKWARD

    def _layer_begins(self, module: nn.Module, args: Any) -> None:
        if self.tape.region is Region.BACKWARD:
            self.tape.region = Region.RECOMPUTE

    def _layer_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.tape.region is Region.RECOMPUTE:
            self.tape.settle(Region.RECOMPUTE, Category.ACTIVATIONS)
            self.tape.region = Region.BACKWARD


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, and the scales that belong to quantised ones."""
    parameters: list[torch.Tensor] = list(model.parameters())
    quantized = [p for p in parameters if hasattr(p, "quant_state") or hasattr(p, "SCB")]
    return parameters + [value for p in quantized for value in _quantized().state_tensors(p)]


def _state_tensors(trainer: SFTTrainer) -> list[torch.Tensor]:
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _materialize(model: nn.Module) -> None:
    """Puts fake tensors on the fake device in place of parameters and buffers; shared ones stay shared.

    In the order in which weights are loaded: the base model's by name, adapters afterwards.
    """
    fakes: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    names = [
        (f"{path}.{name}", module, name)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    for _, module, name in sorted(names, key=lambda item: (_is_adapter(item[0]), dot_natural_key(item[0]))):
        parameter = module._parameters[name]
        assert parameter is not None  # listed above
        if id(parameter) not in fakes:
            fakes[id(parameter)] = _fake_parameter(module, name, parameter, dtype)
        module._parameters[name] = fakes[id(parameter)]
    for module in modules.values():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    # Fake parameters are in place; torch can't swap fake tensors, which moving a module asks for.
    model.to = lambda *args, **kwargs: model  # type: ignore[method-assign]


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _fake_parameter(
    module: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype
) -> nn.Parameter:
    if type(parameter) is not nn.Parameter and name == "weight" and _quantized().is_quantized(module):
        weight: nn.Parameter = _quantized().quantize_weight(module, dtype)
        return weight
    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=parameter.requires_grad)


def _blank_rows(count: int, length: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[0] * length] * count})


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of two words: the trainer asks for one, rows that are already token ids need none."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def open_subject(subject: Subject) -> TraceSubject:
    """Builds the transformers config of a subject described in plain data."""
    config = workload.model_config("", subject.job.model)
    return TraceSubject(subject.job, subject.plan, subject.hardware, config)


def facts(subject: Subject) -> SubjectFacts:
    """What the libraries say about a subject before anything is traced."""
    opened = open_subject(subject)
    text = opened.config.get_text_config()
    model_class = AutoModelForCausalLM._model_mapping.get(type(opened.config), None)
    supports_sdpa = bool(getattr(model_class, "_supports_sdpa", True))
    if not supports_sdpa:  # its lines are asked for before the planner knows
        opened = replace(opened, plan=replace(opened.plan, attention=Attention.EAGER))
    return SubjectFacts(regime_lines(opened), plan_depths(text), text.num_hidden_layers, supports_sdpa)
