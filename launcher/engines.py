"""The engines that train on several devices, as the trainer meets them: traced AND run.

accelerate's launcher and its state fall back without a word: to one process, to DDP, to parameters that are not
sharded. So as training begins every rank looks at what really became of its model, and fails where that is not the plan.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.errors import LaunchError
from launcher.hardware import DeviceKind
from launcher.job import AdapterDtype, Engine, JobSpec, Method
from launcher.memory import Phase
from launcher.optimisation import BF16_WEIGHTS, IN_BF16
from launcher.plan import Plan

MIB = 1 << 20
MASTER_WEIGHTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""Where DeepSpeed's optimizers of stages 1 and 2, and of stage 3, hold the weights that they update
(deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py)."""


def engine_arguments(job: JobSpec, plan: Plan) -> dict[str, Any]:
    """What the trainer's arguments say of the engine; all else is in the files that accelerate reads.

    With DeepSpeed `bf16` must be what its own configuration says, or transformers refuses both.
    """
    if plan.engine is Engine.DEEPSPEED:
        return {"bf16": plan.precision in IN_BF16}
    if plan.engine is not Engine.DDP or plan.buckets is None:
        return {}
    # TRL turns the adapters of a quantised model to bf16 (1.16, trainer/sft_trainer.py); PEFT widens all others to fp32
    keeps_base = plan.method is Method.FULL or job.method.adapter_dtype is AdapterDtype.BASE
    is_bf16 = plan.method is Method.QLORA or (plan.precision in BF16_WEIGHTS and keeps_base)
    bucket_bytes = plan.buckets.reduce_bucket_elements * (2 if is_bf16 else 4)
    return {
        # a fraction is as good as a whole number (torch 2.13, nn/parallel/distributed.py), and rounded each bucket
        # would begin elsewhere in its layer than the one before
        "ddp_bucket_cap_mb": bucket_bytes / MIB,
        "ddp_find_unused_parameters": False,
    }


@contextmanager
def engine(plan: Plan, kind: DeviceKind) -> Iterator[None]:
    """What an engine needs while the trainer is built and trains."""
    if plan.engine is Engine.DEEPSPEED:
        _import_muon_uncompiled()
    if plan.engine is Engine.DEEPSPEED and kind is DeviceKind.CPU:
        _leave_out_shared_memory_op()
    if plan.engine is Engine.FSDP2 and kind is DeviceKind.CPU:
        with _fsdp_on_cpu():
            yield
        return
    yield


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports Muon, an optimizer that no job has, to see that a job's is another one, and that loads torch's
    compiler: seconds in every rank (0.19.8, runtime/zero/utils.py, `is_zero_supported_optimizer`; stage3.py)."""
    original, cast(Any, torch).compile = (
        torch.compile,
        lambda *function, **options: function[0] if function else _same,
    )
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        cast(Any, torch).compile = original


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _leave_out_shared_memory_op() -> None:
    """DeepSpeed compiles an operation for inference at its start on a CPU, for more than a minute; nothing here uses it.

    deepspeed 0.19.8, comm/torch.py: `build_shm_op`, which only `inference_all_reduce` calls, and which looks here.
    """
    import deepspeed.ops  # noqa: PLC0415  # half a second, for runs with DeepSpeed only

    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def _fsdp_on_cpu() -> Iterator[None]:
    """Lets accelerate shard on a CPU: its state turns to FSDP on other devices only (accelerate 1.15, state.py)."""
    original = AcceleratorState.__init__

    def promoted(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = promoted
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def prepare_trainer(trainer: Trainer, plan: Plan, enter: Callable[[Phase], None]) -> None:
    """Settings that the trainer's arguments have no name for, and a look at the model once it is wrapped.

    Args:
        trainer: The trainer, before it trains.
        plan: What it should do.
        enter: Called with the phase that begins.
    """
    handler = trainer.accelerator.ddp_handler
    if plan.engine is Engine.DDP and handler is not None:
        handler.gradient_as_bucket_view = True  # else each gradient is there twice
    trainer.add_callback(EngineCallback(trainer, plan, enter))


class EngineCallback(TrainerCallback):
    """Looks at the wrapped model as training begins, and lets DeepSpeed say when its optimizer steps.

    accelerate calls DeepSpeed's step at the end of the backward pass, before the trainer speaks of it.
    """

    def __init__(self, trainer: Trainer, plan: Plan, enter: Callable[[Phase], None]) -> None:
        self._trainer = trainer
        self._plan = plan
        self._enter = enter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is wrapped."""
        require_engine(self._trainer, self._plan)
        if self._plan.engine is not Engine.DEEPSPEED:
            return
        deepspeed_engine: Any = self._trainer.model_wrapped
        step = deepspeed_engine.step

        def announced(*args: Any, **kwargs: Any) -> Any:
            if deepspeed_engine.is_gradient_accumulation_boundary():  # it is called after every micro batch
                self._enter(Phase.OPTIMIZER_STEP)
            return step(*args, **kwargs)

        deepspeed_engine.step = announced


def gather_when_saving(trainer: Trainer, plan: Plan) -> None:
    """Lets FSDP2 save whole weights: its checkpoints hold each rank's part, and of those transformers saves no model."""
    if plan.engine is Engine.FSDP2:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


def local_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What this rank holds of each tensor; of a parameter that DeepSpeed sharded its part, and what is gathered now."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            yield tensor._local_tensor
            continue
        yield tensor
        part = getattr(tensor, "ds_tensor", None)
        if isinstance(part, torch.Tensor):
            yield part


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    """The weights that DeepSpeed's optimizer updates, beside those that the model computes with."""
    inner = getattr(optimizer, "optimizer", None)
    return [weight for name in MASTER_WEIGHTS for weight in getattr(inner, name, [])]


def swap_buffers(optimizer: Any) -> list[torch.Tensor]:
    """The buffers in which DeepSpeed has what it swaps of the optimizer's states (0.19.8, swap_tensor/utils.py)."""
    swapper = getattr(getattr(optimizer, "optimizer", None), "optimizer_swapper", None)
    return [] if swapper is None else list(swapper.swap_buffer_manager.all_buffers)


def averaged_gradients(optimizer: Any) -> list[torch.Tensor]:
    """The gradients of this rank's part, averaged over all ranks, as DeepSpeed's optimizer holds them."""
    averaged = getattr(getattr(optimizer, "optimizer", None), "averaged_gradients", {})
    return [gradient for group in averaged.values() for gradient in group or [] if gradient is not None]


def require_engine(trainer: Trainer, plan: Plan) -> None:
    """Checks, as training begins, that the model is held as the plan says.

    Raises:
        LaunchError: When it is not.
    """
    wanted = {
        Engine.NONE: {DistributedType.NO},
        Engine.DDP: {DistributedType.MULTI_GPU, DistributedType.MULTI_CPU},
        Engine.DEEPSPEED: {DistributedType.DEEPSPEED},
        Engine.FSDP2: {DistributedType.FSDP},
    }[plan.engine]
    found, wrapped = trainer.accelerator.distributed_type, cast(Any, trainer.model_wrapped)
    problem = ""
    if found not in wanted:
        problem = f"accelerate took the run for {found.value}"
    elif plan.engine is Engine.DDP and not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        problem = f"the model is wrapped in {type(wrapped).__name__}"
    elif plan.engine is Engine.DEEPSPEED:
        stage = wrapped.zero_optimization_stage()
        problem = "" if stage == plan.zero_stage else f"DeepSpeed runs ZeRO stage {stage}"
    if not problem and plan.zero_stage == 3:
        whole = [name for name, parameter in wrapped.named_parameters() if not _is_sharded(parameter)]
        problem = f"{len(whole)} parameters are not sharded, such as `{whole[0]}`" if whole else ""
    if problem:
        raise LaunchError(f"the plan is {plan.engine.value}, ZeRO stage {plan.zero_stage}, but {problem}")


def _is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this rank holds a part of a parameter, or DeepSpeed keeps it whole because it is small."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
