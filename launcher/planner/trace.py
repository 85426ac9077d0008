"""Traces a job: runs the workload's training loop on fake tensors and returns the skyline of its memory."""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
import traceback
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import trl.kernels.chunked_logprob as trl_chunked
import trl.trainer.utils as trl_utils
from torch import nn
from transformers import PretrainedConfig

from launcher import workload
from launcher.domain import Domain
from launcher.engines import engine
from launcher.errors import LauncherError, UnsupportedByPlanner
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, Engine, JobSpec, Loss, Precision, Task
from launcher.libraries import uses_bitsandbytes
from launcher.plan import Plan
from launcher.planner import attention_twin, cuda_twin, gloo_twin, kernel_twins, worst_case
from launcher.planner.attribution import Attribution
from launcher.planner.depth import assemble_first, layer_period, plan_depths, truncate
from launcher.planner.fast_fake import FastFakeTensorMode, Memory, Told
from launcher.planner.generation import generation_lengths
from launcher.planner.materialize import quantized_layers
from launcher.planner.polynomial import TracedShape
from launcher.planner.quiet import quiet
from launcher.planner.recorder import WorkRecorder
from launcher.planner.regimes import Lines, config_dimensions, domain_of, symbolic_shape
from launcher.planner.rehearsal import Rehearsal
from launcher.planner.replica import Layers
from launcher.planner.skyline import Profile, Skyline, build_skyline
from launcher.planner.stand_ins import answers, kernels
from launcher.planner.tape import Tape
from launcher.planner.tracer import Subject
from launcher.planner.worlds import part_share, traced_world
from launcher.vision import image_shape

LONGEST = 1 << 20
"""No sequence is longer, in tokens: as far as the lines of Liger's loss are listed."""
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
    return _lines(subject, _parameter_dimensions(subject))


def lines_by_loss(subject: TraceSubject) -> dict[Loss, Lines]:
    """Those with each loss in place of the plan's."""
    dimensions = _parameter_dimensions(subject)
    others = ((loss, replace(subject, plan=replace(subject.plan, loss=loss))) for loss in Loss)
    return {loss: _lines(other, dimensions) for loss, other in others}


def _lines(subject: TraceSubject, parameter_dimensions: Collection[int]) -> Lines:
    text = subject.config.get_text_config()
    tile = _token_tile(subject.plan)
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
    doubling = _liger_tokens_per_tile(subject)
    if own_batch and doubling:
        tiles = (2**power for power in range(LONGEST.bit_length()))
        lengths |= {size for tile in tiles if 1 < (size := doubling * tile // own_batch + 1) <= LONGEST}
    dimensions = {*config_dimensions(subject.config.to_dict()), subject.plan.rank, own_batch or 1}
    shortest = 2
    if subject.job.model.task is Task.IMAGE_TEXT_TO_TEXT:
        image, count = image_shape(subject.config), subject.job.data.images_per_example
        dimensions |= {image.tokens, count}
        shortest = image.tokens * count + 1
    vocabulary_tile = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    dimensions |= {vocabulary_tile, text.vocab_size % vocabulary_tile, trl_chunked.TOKEN_CHUNK_SIZE}
    dimensions |= {*parameter_dimensions}
    if subject.job.generation.enabled:
        generation = subject.job.generation
        dimensions |= {
            generation.batch_size,
            *(size + i for size in generation_lengths(generation) for i in (0, 1)),
        }
    keeps = subject.job.evaluation.enabled and subject.job.evaluation.keep_logits
    return Lines(
        tile,
        tuple(sorted(lengths)),
        tuple(sorted(dimensions)),
        doubling,
        has_symbols=not keeps,
        shortest=shortest,
    )


def _liger_tokens_per_tile(subject: TraceSubject) -> int | None:
    """How many tokens make one token of a tile of Liger's loss, vocabulary / width; None where tiles don't double.

    `fused_linear_cross_entropy_forward`, liger-kernel 0.8.5; a vocabulary no larger than the width makes one tile.
    """
    if subject.plan.loss is not Loss.LIGER:
        return None
    text = subject.config.get_text_config()
    tokens = -(-text.vocab_size // text.hidden_size)
    return int(tokens) if tokens > 1 else None


def _token_tile(plan: Plan) -> int | None:
    """Predicted tokens that the loss handles at a time; None when it handles all at once."""
    tile: int = trl_chunked.TOKEN_CHUNK_SIZE
    return tile if plan.loss is Loss.CHUNKED else None


def _parameter_dimensions(subject: TraceSubject) -> set[int]:
    """Dimensions that no config names: those of fused projections are sums of others."""
    depth = min(plan_depths(subject.config.get_text_config()).depths)
    return {size for parameter in shallow_model(subject, depth).parameters() for size in parameter.shape}


def shallow_model(subject: TraceSubject, depth: int) -> nn.Module:
    """The model with so many layers, on `meta`."""
    config = copy.deepcopy(subject.config)
    truncate(config.get_text_config(), depth)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if uses_bitsandbytes(subject.plan):
            stack.enter_context(quantized_layers().stand_ins(on_gpu=False))
        if subject.plan.attention is Attention.FLASH_ATTENTION_2:
            stack.enter_context(attention_twin.flash_attention_2())
        return _build_on_meta(subject, config, subject.plan)


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
    attempts = plan_depths(text).attempts(text.num_hidden_layers)

    def traced(depths: Sequence[int]) -> list[Profile]:
        return [record(subject, shape, depth, accumulation) for depth in depths]

    return assemble_first(domain, attempts, accumulation, traced)[0]


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
    _import_engine(subject.plan.engine)  # here, once, and not in every process that is forked
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        profile, told = pool.submit(_record_and_tell, subject, shape, depth, accumulation).result()
    _memory().learn(told)
    return profile


def _record_and_tell(
    subject: TraceSubject, shape: TracedShape, depth: int, accumulation: int
) -> tuple[Profile, Told]:
    """A trace, and what this process has learned of operations in it."""
    known = len(_memory().recipes)
    return _record(subject, shape, depth, accumulation), _memory().told(known)


def _import_engine(kind: Engine) -> Any:
    """What makes a process a rank of a world; importing it takes seconds that jobs on one device need not wait."""
    if kind is Engine.DEEPSPEED:
        os.environ["DS_ACCELERATOR"] = "cpu"  # it looks for a device as it is imported; a trace has none
        importlib.import_module("launcher.planner.fake_deepspeed")
    return importlib.import_module("launcher.planner.fake_world")


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
    fake = FastFakeTensorMode(_memory())
    on_gpu = subject.hardware.kind in (DeviceKind.CUDA, DeviceKind.ROCM)
    twins = dict(worst_case.twins())
    if plan.engine is Engine.FSDP2:
        twins |= gloo_twin.twins(on_cpu=not on_gpu)
    if on_gpu:
        is_cuda = subject.hardware.kind is DeviceKind.CUDA
        twins |= attention_twin.twins(shape, rounds=is_cuda)
        twins |= kernel_twins.twins(exact=not shape.length_is_symbol)
    quantizes = uses_bitsandbytes(plan)
    if quantizes:
        quantized_layers().prepare()
        twins |= quantized_layers().twins(on_cpu=not on_gpu)
    recorder = WorkRecorder(shape, _token_tile(plan))
    is_padded = subject.padded and shape.batch > 1
    tape = Tape(shape, twins, is_padded, fake, recorder=recorder, has_matrix_library=on_gpu)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if plan.engine is not Engine.NONE:
            stack.enter_context(engine(plan, DeviceKind.CPU))
            text = subject.config.get_text_config()
            layers = Layers(depth, text.num_hidden_layers, *layer_period(text))
            job = replace(subject.job, hardware=subject.hardware)
            _import_engine(plan.engine).join(job, plan, TRACED_RANK, folder, tape, layers)
        if quantizes:
            stack.enter_context(quantized_layers().stand_ins(on_gpu=on_gpu))
        for stand_in in kernels(subject.hardware, plan, recorder):
            stack.enter_context(stand_in)
        model = _build_on_meta(subject, config, plan)
        # the list of blocks is for one shape; a trace with symbols answers for many, and can do without
        attribution = None if shape.length_is_symbol else Attribution(model)
        tape.locate = attribution.path if attribution is not None else None
        for stand_in in answers(subject.job, plan, tape, on_gpu=on_gpu):
            stack.enter_context(stand_in)
        if on_gpu:
            stack.enter_context(cuda_twin.branches(subject.hardware, shape, recorder))
        rehearsal = Rehearsal(tape, model, subject.job, plan, on_gpu, attribution, part_share(subject.plan))
        trainer_inputs = rehearsal.inputs(folder)
        stack.enter_context(fake)
        stack.enter_context(tape)
        try:
            return rehearsal.run(trainer_inputs)
        except LauncherError:
            raise
        except Exception as failure:  # whatever a library objects to, it ends in no number and no traceback
            raise _refusal(config.model_type, plan, tape.failed, failure) from failure


def _refusal(model_type: str, plan: Plan, operation: str, failure: Exception) -> UnsupportedByPlanner:
    return UnsupportedByPlanner(
        f"the tracer can't follow {model_type} with method.name={plan.method}, attention={plan.attention}, "
        f"loss={plan.loss}, precision={plan.precision} at {operation or _place(failure)}: {_words(failure)}",
        "another `planner.pin.attention` or `planner.pin.loss` may be traceable; with adapters, "
        "`method.target_modules` that names plain projections only",
    )


def _place(failure: BaseException) -> str:
    """Where a library's code failed, `modeling_mixtral.py:509 (forward)`."""
    frame = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"


def _words(failure: BaseException) -> str:
    """An exception in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__


@cache
def _memory() -> Memory:
    """What the traces of this process learn of operations."""
    return Memory()


def _build_on_meta(subject: TraceSubject, config: PretrainedConfig, plan: Plan) -> nn.Module:
    try:
        with torch.device("meta"):
            model = workload.build_model(config, plan, "", subject.job)
            quantization = workload.quantization_config(subject.job.method, plan)
            if quantization is not None:
                model = quantized_layers().convert_to_shell(model, quantization)
            return workload.attach_adapters(model, subject.job, plan)
    except LauncherError:
        raise
    except Exception as failure:  # as in `record`
        raise UnsupportedByPlanner(
            f"transformers can't build {config.model_type} with model.task={subject.job.model.task}, "
            f"method.name={plan.method}, attention={plan.attention} at {_place(failure)}: {_words(failure)}",
            "another `planner.pin.attention` may be supported; with adapters, other `method.target_modules`",
        ) from failure


def open_subject(subject: Subject) -> TraceSubject:
    """Builds the transformers config of a subject described in plain data.

    Raises:
        UnsupportedByPlanner: When transformers does not know the model, or its config class refuses a fact.
    """
    try:
        model = subject.job.model
        runs_own_code = model.trust_remote_code and model.code_digest
        config = workload.model_config(model.path if runs_own_code else "", model)
    except Exception as failure:  # a config class checks its facts in ways of its own
        model_type = subject.job.model.architecture.get("model_type")
        raise UnsupportedByPlanner(
            f"transformers can't read the config of {model_type} at {_place(failure)}: {_words(failure)}",
            "the installed transformers may be too old for the model, or its config.json has facts that clash",
        ) from failure
    return TraceSubject(subject.job, subject.plan, subject.hardware, config)
