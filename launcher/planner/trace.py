"""Traces a job: runs the workload's training loop on fake tensors and returns the skyline of its memory."""

from __future__ import annotations

import copy
import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers.masking_utils as masking_utils
import transformers.trainer_pt_utils as trainer_pt_utils
import transformers.utils.logging as transformers_logging
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from datasets import disable_progress_bars
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from launcher import workload
from launcher.engines import engine
from launcher.errors import UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, Engine, JobSpec, Loss, Precision
from launcher.plan import Plan
from launcher.planner import cuda_twin, fake_world, worst_case
from launcher.planner.attribution import Attribution
from launcher.planner.cuda_twin import replaced
from launcher.planner.depth import DepthMismatch, assemble, plan_depths, truncate
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.generation import generation_lengths
from launcher.planner.materialize import quantized_layers
from launcher.planner.polynomial import TracedShape
from launcher.planner.regimes import Lines, config_dimensions, domain_of, symbolic_shape
from launcher.planner.rehearsal import Rehearsal
from launcher.planner.skyline import Domain, Profile, Skyline, build_skyline
from launcher.planner.tape import Tape
from launcher.planner.tracer import Subject, SubjectFacts, uses_bitsandbytes
from launcher.planner.worlds import part_share, traced_world

TRACED_RANK = 0
"""The rank that saves, and whose parts are never smaller than another's."""


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
    if subject.job.generation.enabled:
        generation = subject.job.generation
        dimensions |= {
            generation.batch_size,
            *(size + i for size in generation_lengths(generation) for i in (0, 1)),
        }
    return Lines(tile, tuple(sorted(lengths)), tuple(sorted(dimensions)))


def _parameter_dimensions(subject: TraceSubject) -> set[int]:
    """Dimensions that no config names: those of fused projections are sums of others."""
    config = copy.deepcopy(subject.config)
    text = config.get_text_config()
    truncate(text, min(plan_depths(text).depths))
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if uses_bitsandbytes(subject.plan):
            stack.enter_context(quantized_layers().stand_ins(on_gpu=False))
        if subject.plan.attention is Attention.FLASH_ATTENTION_2:
            stack.enter_context(cuda_twin.flash_attention_2())
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
    return build_skyline(domain, profile, accumulation)


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
    """Runs the training loop once on fake tensors; with an engine in a process of its own, which the engine changes.

    Args:
        subject: What is traced.
        shape: At which batch and length.
        depth: With how many decoder layers.
        accumulation: Micro batches per optimizer step; more than two add nothing but waiting inputs.

    Raises:
        UnsupportedByPlanner: When the tracer can't follow an operation.
    """
    if subject.plan.engine is Engine.NONE:
        return _record(subject, shape, depth, accumulation)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_record, subject, shape, depth, accumulation).result()


def _record(subject: TraceSubject, shape: TracedShape, depth: int, accumulation: int) -> Profile:
    plan = replace(
        traced_world(subject.plan),
        micro_batch_size=shape.batch,
        max_length=shape.length,
        gradient_accumulation_steps=min(accumulation, 2),
    )
    if plan.engine is not Engine.NONE and plan.precision is Precision.FP16_MIXED:
        plan = replace(plan, precision=Precision.BF16_MIXED)  # the same sizes, and no loss scale to look at
    config = copy.deepcopy(subject.config)
    truncate(config.get_text_config(), depth)
    fake = FastFakeTensorMode()
    on_gpu = subject.hardware.kind in (DeviceKind.CUDA, DeviceKind.ROCM)
    twins = dict(worst_case.twins())
    if on_gpu:
        twins |= cuda_twin.twins()
    quantizes = uses_bitsandbytes(plan)
    if quantizes:
        quantized_layers().prepare()
        twins |= quantized_layers().twins(on_cpu=not on_gpu)
    tape = Tape(shape, twins=twins, padded=subject.padded and shape.batch > 1, fake=fake)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if plan.engine is not Engine.NONE:
            fake_world.join(subject.job, plan, TRACED_RANK, folder)
            stack.enter_context(engine(plan, DeviceKind.CPU))
        if quantizes:
            stack.enter_context(quantized_layers().stand_ins(on_gpu=on_gpu))
        if on_gpu and plan.attention is Attention.FLASH_ATTENTION_2:
            stack.enter_context(cuda_twin.flash_attention_2())
        model = _build_on_meta(subject, config, plan)
        # the list of blocks is for one shape; a trace with symbols answers for many, and can do without
        attribution = None if shape.length_is_symbol else Attribution(model)
        tape.locate = attribution.path if attribution is not None else None
        stack.enter_context(replaced(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(replaced(masking_utils, "fast_all", lambda mask: not _pads(tape, mask)))
        stack.enter_context(replaced(trainer_pt_utils, "nested_numpify", _zeros_like))
        if on_gpu:
            stack.enter_context(cuda_twin.branches(subject.hardware))
        rehearsal = Rehearsal(tape, model, subject.job, plan, on_gpu, attribution, part_share(subject.plan))
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


def _pads(tape: Tape, mask: torch.Tensor) -> bool:
    """Whether a mask masks something in the worst case; a single sequence is never padded."""
    return tape.padded and mask.shape[0] > 1


def _zeros_like(tensor: torch.Tensor) -> NDArray[np.float64]:
    """What evaluation gets for the losses it gathers: fake tensors have no numbers to convert."""
    return np.zeros(tensor.shape)


def _build_on_meta(subject: TraceSubject, config: PretrainedConfig, plan: Plan) -> nn.Module:
    try:
        with torch.device("meta"):
            model = workload.build_model(config, plan, "", subject.job)
            quantization = workload.quantization_config(subject.job.method, plan)
            if quantization is not None:
                model = quantized_layers().convert_to_shell(model, quantization)
            return workload.attach_adapters(model, subject.job, plan)
    except (ValueError, ImportError) as failure:
        raise UnsupportedByPlanner(
            f"transformers can't build {config.model_type} with attention={plan.attention}: {failure}",
            "another `planner.pin.attention` may be supported",
        ) from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries and the cyclic garbage collector, so that releases happen by reference count."""
    level = logging.root.manager.disable
    collecting = gc.isenabled()
    disable_progress_bars()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
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
            if shows_progress:
                transformers_logging.enable_progress_bar()
            if collecting:
                gc.enable()


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
