"""The tape: writes down every storage that is born and freed while the workload runs on fake tensors.

Fake tensors have shapes and lifetimes and no data. A `TorchDispatchMode` above `FakeTensorMode` sees each
operation with its outputs; a storage that was not alive before is an allocation, and a finalizer on the
storage object is its release. Left out: scratch memory that a kernel takes and gives back within one operation.
"""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_non_overlapping_and_dense
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from launcher.domain import Exponents
from launcher.engines import local_tensors
from launcher.memory import Category, Phase, Region, settle_region
from launcher.planner.blocks import FLUSH, Block, Event
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.polynomial import CONSTANT, TracedShape, factor_shape
from launcher.planner.recorder import WorkRecorder
from launcher.planner.swapping import Swapping

aten = torch.ops.aten
ON_DEVICE = torch.device("cpu")
"""Where a trace puts tensors that live in the device's memory."""
OFF_DEVICE = torch.device("meta")
"""Where a trace puts tensors that live in host memory while the job runs on a GPU: a list of their own."""


TORCH_FOLDER, PLANNER_FOLDER = (f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
ENGINE_FRAME = "_engine_run_backward"
"""The Python function from which the autograd engine runs; what it calls itself comes straight from there."""
ENGINE_SUMS = (aten.add.Tensor, aten.index_put.default)
"""What the autograd engine does in place, and never with tensor subclasses, as fake tensors are: it adds a gradient to
those before it, and writes the gradient of rows that were picked into zeros (`index_backward`,
torch/csrc/autograd/FunctionsManual.cpp, torch 2.9 to 2.13)."""
STORAGE_USES = 2
"""Uses of a storage during a dispatch when nobody else holds it: the tensor and the dispatch."""
PRODUCTS = frozenset(
    overload
    for product in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    for overload in (product.default, product.out)
)
"""Operations that torch gives to the matrix library."""
MATRIX_LIBRARY, WORKSPACE = "matrix library", "workspace"
"""Named as module and operation of the matrix library's workspaces."""
EPILOGUE_BYTES = 1 << 20
"""What cuBLASLt, which adds a bias to a product as it goes, takes for itself once a thread: 1,024 KiB
(aten/src/ATen/cuda/CUDABlas.cpp, torch 2.11; seen on an H200, 2026-11-26)."""
PART_PHASES = (Phase.LOAD, Phase.OPTIMIZER_STEP, Phase.SAVE)
"""Phases in which what is as large as a rank's part is one, or a copy of one."""


@dataclass
class Tape(TorchDispatchMode):
    """Records the life of storages.

    Args:
        shape: The traced shape, for writing sizes as polynomials.
        twins: What to run in place of an operation; NotImplemented from a twin means the operation itself.
        padded: Whether padding masks have padding in them.
        fake: The fake-tensor mode below; asked first, because its shortcut is quicker than a dispatch.
        locate: Tells the path of the module at work, for every block; None: nobody asks for modules.
        recorder: Counts the work of the operations; None: nobody asks for speed.
        has_matrix_library: Whether matrix products are those of a GPU's library, which takes workspaces.
    """

    shape: TracedShape
    twins: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    padded: bool = False
    fake: FastFakeTensorMode | None = None
    locate: Callable[[], str] | None = None
    recorder: WorkRecorder | None = None
    has_matrix_library: bool = False
    shapes_only: bool = False
    """Whether tensors off the device are shapes for now, and take no memory."""
    phase: Phase = Phase.LOAD
    region: Region = Region.OUTSIDE
    events: list[Event] = field(default_factory=list)
    host_events: list[Event] = field(default_factory=list)
    """What happens in host memory while the job runs on a GPU."""
    num_instants: int = 0
    swapped: Callable[[], Swapping] | None = None
    """What lies on NVMe at the end; None where nothing is swapped."""
    failed: str = ""
    """The operation that could not be run; empty while there is none."""

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._live: dict[int, Block] = {}
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[tuple[tuple[int, ...], int], dict[Exponents, int]] = {}
        self._names: dict[Any, str] = {}
        self._callers: dict[str, str] = {}
        self._workspaces: set[tuple[bool, str]] = set()
        self._default_stream = torch.cpu.current_stream()
        self._cuda_streams: dict[int, int] = {}
        self._mask_checks = WeakTensorKeyDictionary()  # by identity: comparing tensors is an operation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs on every operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation on fake tensors and records what it allocated."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # by far the most frequent call, and no operation at all
        if types and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # asks again with the tensors that this rank holds
        if func.namespace == "c10d":
            return func(*args, **kwargs)  # collectives write into what is there
        device = kwargs.get("device")
        if device is not None and device.type == "cpu" and device.index is not None:
            kwargs["device"] = torch.device("cpu")  # DeepSpeed numbers its devices
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        recorder = self.recorder
        counted = 0 if recorder is None else recorder.total
        try:
            if func in ENGINE_SUMS and (
                sys._getframe(1).f_code.co_name == ENGINE_FRAME
                and (func is aten.index_put.default or _is_summed_up(*args))
            ):
                output = args[0]
            else:
                output = self._run(func, args, kwargs)
        except Exception:
            self.failed = self.failed or str(func)
            raise
        if func is aten.all.default and args[0].dim() > 1:  # of a mask, not of a number that is compared
            self._mask_checks[output] = True
        if recorder is not None and recorder.active:
            recorder.note(func, args, kwargs, output, self.region is Region.HEAD, counted)
        live = self._live
        births = [
            tensor
            for tensor in (output if isinstance(output, (tuple, list)) else (output,))
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in live
        ]
        if births:
            self.num_instants += 1
            name = self._names.get(func)
            if name is None:
                name = self._names[func] = str(func)
            if self.region is Region.OUTSIDE:
                name += self._place()
            for tensor in births:
                self._record(tensor, name)
        elif isinstance(output, (tuple, list)) and any(isinstance(item, list) for item in output):
            raise NotImplementedError(f"{func} returns nested lists of tensors")
        if func in PRODUCTS and self.has_matrix_library and self.phase is not Phase.LOAD:
            self._take_workspaces(func, args)
        return output

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While it is open, no work is counted."""
        recorder = self.recorder
        was_active = recorder is not None and recorder.active
        if recorder is not None:
            recorder.active = False
        yield
        if recorder is not None:
            recorder.active = was_active

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        twin = self.twins.get(func)
        if twin is not None:
            with self:  # the twin's own operations are recorded like any other
                output = twin(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if self.fake is not None:
            output = self.fake.shortcut(func, args, kwargs)
            if output is not NotImplemented:
                return output
        return func(*args, **kwargs)

    def _take_workspaces(self, func: Any, args: tuple[Any, ...]) -> None:
        """Records what the matrix library takes at the first product of a thread, and keeps.

        Forward and backward pass have a thread each. Its large workspace differs from card to card: here it is a block
        of no size, which shows where among the others it lies.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        wanted = [("products", 0)]
        if func in (aten.addmm.default, aten.addmm.out) and args[0].dim() == 1:
            wanted.append(("epilogues", EPILOGUE_BYTES))
        for name, num_bytes in wanted:
            if (in_backward, name) not in self._workspaces:
                self._workspaces.add((in_backward, name))
                size = {CONSTANT: num_bytes} if num_bytes else {}
                block = Block(num_bytes, size, WORKSPACE, self.phase, self.region, Category.WORKSPACES)
                block.module = MATRIX_LIBRARY
                self._write(block, birth=True)

    def _answer(self, tensor: torch.Tensor) -> bool | int | float:
        """What `.item()` returns: there is no data, so a value that leads on through the step."""
        if tensor in self._mask_checks:
            return not self.padded
        if tensor.dtype is torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _place(self) -> str:
        """The line of the library that asked, of those that are neither torch's nor the tracer's.

        Engines work through all parameters in one loop after another, with the same operation on blocks of all sizes:
        where depths are aligned, the line tells the loops apart.
        """
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            caller = self._callers.get(file)
            if caller is None:
                own = file.startswith((TORCH_FOLDER, PLANNER_FOLDER))
                caller = self._callers[file] = "" if own else Path(file).stem
            if caller:
                return f" {caller}.{frame.f_code.co_name}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def _record(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        on_host = tensor.fake_device == OFF_DEVICE  # type: ignore[attr-defined]
        if on_host and self.shapes_only:
            return
        if key in self._live:
            return  # two outputs of one operation share it
        itemsize = tensor.element_size()
        sizes = tuple(tensor.shape)
        if tensor.numel() * itemsize != num_bytes:
            symbolic = self.shape.length_is_symbol
            sizes = _padded_sizes(tensor, operation) if symbolic else (num_bytes // itemsize,)
        size = self._sizes.get((sizes, itemsize))
        if size is None:
            size = self._sizes[sizes, itemsize] = factor_shape(sizes, itemsize, self.shape)
        block = Block(num_bytes, size, operation, self.phase, self.region, on_host=on_host)
        if self.locate is not None:
            block.module = self.locate()
        current = torch.cpu.current_stream()  # the device of a trace is the CPU: engines make streams of it
        if current is not self._default_stream:
            block.cuda_stream = self._cuda_streams.setdefault(id(current), len(self._cuda_streams) + 1)
        self._live[key] = block
        self._write(block, birth=True)
        self._watchers[key] = weakref.ref(storage, lambda reference, key=key: self._release(key))  # type: ignore[misc]

    def _release(self, key: int) -> None:
        block = self._live.pop(key)
        del self._watchers[key]
        block.alive = False
        self._write(block, birth=False)

    def _write(self, block: Block, *, birth: bool) -> None:
        events = self.host_events if block.on_host else self.events
        events.append(Event(block, birth, self.num_instants, self.phase))

    def mark(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Says what the storages of these tensors are for; the first word counts."""
        for tensor in local_tensors(tensors):
            block = self._live.get(tensor.untyped_storage()._cdata)
            if block is not None and block.category is None:
                block.category = category

    def resize(self, tensor: torch.Tensor, num_bytes: int) -> None:
        """Gives a storage another size: what it held is released, and what it holds now is born. FSDP2 works so."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == num_bytes:
            return
        if storage._cdata in self._live:
            self._release(storage._cdata)
        storage.resize_(num_bytes)
        if num_bytes:
            self.num_instants += 1
            self._record(tensor, "resize_")

    def flush(self) -> None:
        """The allocator gives what it holds for nothing back to the device: a block of no size says so."""
        self._write(Block(0, {}, FLUSH, self.phase, self.region, Category.TEMPORARIES), birth=True)

    def pin(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that the storages of these tensors, in host memory, are pinned."""
        for tensor in tensors:
            block = self._live.get(tensor.untyped_storage()._cdata)
            if block is not None:
                block.is_pinned = True

    def mark_parts(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that the storages of these tensors are a rank's part of what all ranks share."""
        for tensor in local_tensors(tensors):
            block = self._live.get(tensor.untyped_storage()._cdata)
            if block is not None:
                block.is_part = True

    def shrink_parts(self, share: float) -> None:
        """Makes the parts of this rank smaller, once all is recorded: as they are among more ranks.

        Those are the ones that were marked, and what the engine and the optimizer made in their size.
        """
        if share == 1.0:
            return
        blocks = {id(event.block): event.block for event in (*self.events, *self.host_events)}.values()
        sizes = {
            block.num_bytes * 2**power for block in blocks if block.is_part for power in (-2, -1, 0, 1, 2)
        }
        for block in blocks:
            if block.is_part or (block.phase in PART_PHASES and block.num_bytes in sizes):
                block.num_bytes = round(block.num_bytes * share)
                block.size = {key: round(value * share) for key, value in block.size.items()}

    def assign(self, tensors: Iterable[torch.Tensor], module: str) -> None:
        """Says which module the storages of these tensors belong to; the first word counts."""
        for tensor in local_tensors(tensors):
            block = self._live.get(tensor.untyped_storage()._cdata)
            if block is not None and not block.module:
                block.module = module

    def size_of(self, tensors: Iterable[torch.Tensor]) -> list[Block]:
        """The distinct live blocks on the device behind these tensors."""
        keys = {tensor.untyped_storage()._cdata for tensor in local_tensors(tensors)}
        return [self._live[key] for key in keys if key in self._live and not self._live[key].on_host]

    def enter_region(self, region: Region) -> None:
        """A region begins, and another ends."""
        settle_region(self._live.values(), self.region)
        self.region = region


def _is_summed_up(old: Any, new: Any) -> bool:
    """Whether the autograd engine adds a gradient in place to the sum of those before it.

    It does where nobody else holds the sum or its storage, and the sum is dense; never with tensor subclasses, as
    fake tensors are (`can_accumulate_inplace`, torch/csrc/autograd/input_buffer.cpp, torch 2.9 to 2.13).
    """
    uses: int = torch._C._storage_Use_Count(old.untyped_storage()._cdata)
    return uses == STORAGE_USES and old.shape == new.shape and is_non_overlapping_and_dense(old)


def _padded_sizes(tensor: torch.Tensor, operation: str) -> tuple[int, ...]:
    """Sizes of a tensor with its padding: a flat number of bytes can't be split into batch and length."""
    strides = tensor.stride()
    rows = [outer // inner for outer, inner in pairwise(strides) if inner]
    sizes = (tensor.shape[0], *rows, strides[-1]) if len(rows) == len(strides) - 1 else ()
    excess = math.prod(sizes) * tensor.element_size() - tensor.untyped_storage().nbytes()
    if not sizes or not 0 <= excess < max(strides[0], 1) * tensor.element_size():
        raise NotImplementedError(
            f"{operation} returns shape {tuple(tensor.shape)} with strides {strides} over "
            f"{tensor.untyped_storage().nbytes()} bytes"
        )
    return sizes
