"""What the engines' checkpoints may name: data, and no code.

`TORCH_FORCE_WEIGHTS_ONLY_LOAD` (launcher/run/render.py) makes torch.load refuse every class that is not named here; the
index of a sharded checkpoint is a pickle that torch reads by itself (2.13, distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import copyreg
import importlib
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata

from launcher.job import Engine
from launcher.plan import Plan

DEEPSPEED: Final = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""Classes of deepspeed 0.19.8 in the files of a ZeRO checkpoint; each holds numbers, and runs nothing when it is made."""
INDEX: Final = {
    metadata.__name__: (
        *(
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
        ),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}
"""Names in the index of a sharded checkpoint (torch 2.13)."""
PATHS_OF_3_13: Final = {"pathlib._local": "pathlib"}
"""Python 3.13 alone writes its paths under this name (its Lib/pathlib/_local.py); another Python reads them, too."""


@contextmanager
def trusted_checkpoints(plan: Plan) -> Iterator[None]:
    """Names what checkpoints of a plan's engine hold, while it trains; everything else in them is refused."""
    classes: list[Any] = [metadata._MEM_FORMAT_ENCODING]
    if plan.engine is Engine.DEEPSPEED:
        known = [getattr(importlib.import_module(module), name) for module, name in DEEPSPEED]
        torch.serialization.add_safe_globals(known)
        classes += known
    with _enumerations_by_value(kind for kind in classes if issubclass(kind, Enum)), _index_of_data():
        yield


@contextmanager
def _enumerations_by_value(kinds: Iterable[type[Enum]]) -> Iterator[None]:
    """Members are written as their class and value: Python 3.11.0 to 3.11.3 asks `getattr` for them, which is code."""
    kept = dict(copyreg.dispatch_table)
    for kind in kinds:
        copyreg.pickle(kind, lambda member: (type(member), (member.value,)))
    try:
        yield
    finally:
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(kept)


@contextmanager
def _index_of_data() -> Iterator[None]:
    module: Any = filesystem
    original = module.pickle
    module.pickle = SimpleNamespace(**{**vars(original), "load": load_index})
    try:
        yield
    finally:
        module.pickle = original


def load_index(stream: IO[bytes]) -> Any:
    """Reads the index of a sharded checkpoint.

    Raises:
        pickle.UnpicklingError: When it names anything but what an index holds.
    """
    return _Index(stream).load()


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The few names that an index has; dtypes, layouts and sizes of torch among them."""
        module = PATHS_OF_3_13.get(module, module)
        if name in INDEX.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        raise pickle.UnpicklingError(f"the checkpoint's index names {module}.{name}, which no index holds")
