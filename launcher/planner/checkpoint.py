"""Saving, resuming and merging on fake tensors: the libraries' own code runs, and only the files have stand-ins.

A stand-in keeps shapes and dtypes in place of data, says how large the file would be, and holds what the real
function holds while it writes or reads: copies in host memory on a GPU, nothing beside the tensors on a CPU. Read off
safetensors 0.8 (torch.py) and torch 2.13 (serialization.py).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft.peft_model as peft_model
import peft.utils.save_and_load as peft_files
import safetensors.torch as safetensors_torch
import torch
import transformers.modeling_utils as transformers_modeling
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import Trainer

from launcher.memory import Category
from launcher.merge import merge_adapters
from launcher.planner.replaced import replaced
from launcher.planner.tape import OFF_DEVICE

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors names dtypes in a file's header."""
RECORD_ALIGNMENT = 64
"""torch.save puts every storage at a multiple of this (caffe2/serialize/inline_container.h)."""


@dataclass(frozen=True)
class Described:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    """Tensors with the same number share their storage."""
    num_bytes: int
    """Of the storage."""


def describe(tensor: torch.Tensor) -> Described:
    """Writes down what a tensor is."""
    storage = tensor.untyped_storage()
    return Described(tuple(tensor.shape), tensor.dtype, storage._cdata, storage.nbytes())


def safetensors_file_bytes(tensors: Mapping[str, Described], metadata: Mapping[str, str] | None) -> int:
    """Size of a safetensors file: a length, a header of JSON padded to eight bytes, and the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + end


def pickle_file_bytes(described: Any, name: str) -> int:
    """Size of a file of torch.save: it writes one whose storages are cut down to what keeps their alignment.

    Args:
        described: What is saved, with descriptions in place of tensors.
        name: Name of the file; it is in every record of the file.
    """
    stubs: dict[int, tuple[torch.Tensor, int]] = {}

    def stub(tensor: Described) -> torch.Tensor:
        if tensor.storage not in stubs:
            length = RECORD_ALIGNMENT + tensor.num_bytes % RECORD_ALIGNMENT
            stubs[tensor.storage] = torch.zeros(length, dtype=torch.uint8), tensor.num_bytes - length
        flat = stubs[tensor.storage][0][:RECORD_ALIGNMENT].view(tensor.dtype)
        return flat[:1].expand(tensor.shape) if tensor.shape else flat[0]

    with _disable_current_modes(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        torch.save(tree_map_only(Described, stub, described), file)
        return file.stat().st_size + sum(difference for _, difference in stubs.values())


@dataclass
class FakeFiles:
    """Files whose tensors have no data.

    Args:
        on_gpu: Whether the job runs on a GPU, and what is read into host memory is off its device.
        mark: Says what the copies of tensors are for.
    """

    on_gpu: bool
    mark: Callable[[Iterable[torch.Tensor], Category], None]
    contents: dict[str, Any] = field(default_factory=dict)
    """What was written, by path."""
    metadata: dict[str, Mapping[str, str] | None] = field(default_factory=dict)
    """Metadata of safetensors files, by path."""

    def save_safetensors(
        self, tensors: Mapping[str, torch.Tensor], filename: Any, metadata: Mapping[str, str] | None = None
    ) -> None:
        """`safetensors.torch.save_file`: all tensors of a file on a GPU are in host memory at once."""
        on_device = [item for item in tensors.values() if item.device.type != OFF_DEVICE.type and self.on_gpu]
        copies = [torch.empty_like(tensor, device=OFF_DEVICE) for tensor in on_device]
        self.mark(copies, Category.PARAMETERS)
        self.contents[str(filename)] = {name: describe(tensor) for name, tensor in tensors.items()}
        self.metadata[str(filename)] = metadata
        Path(filename).touch()
        del copies

    def save_pickle(self, thing: Any, path: Any) -> None:
        """`torch.save`: on a GPU one tensor at a time is in host memory."""
        kept: list[torch.Tensor] = []

        def write(tensor: torch.Tensor) -> Described:
            if self.on_gpu:
                kept.clear()
                kept.append(torch.empty_like(tensor, device=OFF_DEVICE))
                self.mark(kept, Category.OPTIMIZER_STATE)
            return describe(tensor)

        self.contents[str(path)] = tree_map_only(torch.Tensor, write, thing)
        Path(path).touch()

    def load_weights(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        """`safetensors.torch.load_file` as transformers calls it, into host memory."""
        return self._read(filename, Category.PARAMETERS, on_host=self.on_gpu)

    def load_adapters(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        """`safetensors.torch.load_file` as PEFT calls it, onto the job's device."""
        return self._read(filename, Category.PARAMETERS, on_host=False)

    def load_pickle(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        """`torch.load` as transformers calls it, into host memory."""
        return self._read(filename, Category.OPTIMIZER_STATE, on_host=self.on_gpu)

    def _read(self, filename: Any, category: Category, *, on_host: bool) -> Any:
        def read(described: Described) -> torch.Tensor:
            device = OFF_DEVICE if on_host else torch.device("cpu")
            tensor = torch.empty(described.shape, dtype=described.dtype, device=device)
            if on_host:
                self.mark([tensor], category)
            return tensor

        return tree_map_only(Described, read, self.contents[str(filename)])

    def folder_bytes(self, folder: Path) -> int:
        """Size of the files with tensors below a folder, as they would be with data."""
        total = 0
        for name, content in self.contents.items():
            if Path(name).is_relative_to(folder):
                is_safetensors = name in self.metadata
                total += (
                    safetensors_file_bytes(content, self.metadata[name])
                    if is_safetensors
                    else pickle_file_bytes(content, Path(name).name)
                )
        return total

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the stand-ins in place of the functions that write and read, while it is open."""
        replacements: list[tuple[Any, str, Any]] = [
            (transformers_modeling, "safe_save_file", self.save_safetensors),
            (peft_model, "safe_save_file", self.save_safetensors),
            (safetensors_torch, "load_file", self.load_weights),
            (peft_files, "safe_load_file", self.load_adapters),
            (torch, "save", self.save_pickle),
            (torch, "load", self.load_pickle),
            # fake tensors have no addresses; shared ones share their storage as a whole
            (transformers_modeling, "id_tensor_storage", _storage_identity),
            (peft_model, "id_tensor_storage", _storage_identity),
            (
                transformers_modeling,
                "_find_disjoint",
                lambda groups, tensors: ([set(group) for group in groups], []),
            ),
            (
                transformers_modeling,
                "_find_identical",
                lambda groups, tensors: ([], [set(group) for group in groups]),
            ),
        ]
        with ExitStack() as stack:
            for module, name, replacement in replacements:
                stack.enter_context(replaced(module, name, replacement))
            yield


def _storage_identity(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    storage = tensor.untyped_storage()
    return tensor.device, storage._cdata, storage.nbytes()


def rehearse_checkpoint(trainer: Trainer) -> None:
    """Saves a checkpoint, as the training loop does, below the trainer's own output folder."""
    trainer._save_checkpoint(trainer.model, trial=None)  # type: ignore[arg-type]  # it was built with a model


def rehearse_resume(trainer: Trainer) -> None:
    """Reads the checkpoint that was saved last, as `train(resume_from_checkpoint=...)` does before its first step.

    The optimizer has no states then; afterwards it has those of the checkpoint.
    """
    folder = checkpoint_folder(trainer)
    trainer._load_from_checkpoint(str(folder))
    trainer._load_optimizer_and_scheduler(str(folder))


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where a checkpoint of the trainer's current step is."""
    return Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"


def rehearse_merge(trainer: Trainer, folder: Path) -> None:
    """Merges the adapters and saves the merged model."""
    merge_adapters(trainer.model).save_pretrained(str(folder))
