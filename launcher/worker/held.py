"""What a process had when memory ran out, to be put beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer

from launcher.memory import Category, HeldMemory
from launcher.worker.leaks import allocated_now_bytes
from launcher.worker.meter import resident_peak_bytes
from launcher.worker.residents import distinct_storages, weigh_gradients, weigh_residents


@dataclass(frozen=True)
class MappedFile:
    """A file that is part of the address space: weights are read so."""

    begin: int
    """First address."""
    end: int
    """Address after the last one; whole pages."""


def held_memory(trainer: Trainer | None, before_bytes: int | None) -> HeldMemory | None:
    """What this process has; asked while the failure's traceback keeps alive what was there. None where it can't say.

    What only the failed operation had is gone by then.

    Args:
        trainer: The trainer, once there is one.
        before_bytes: What was allocated before anything was loaded (`allocated_now_bytes`).
    """
    with suppress(Exception):  # memory is short: that the run ended so must still be written down
        allocated = allocated_now_bytes()
        model = None if trainer is None else trainer.model
        resident, mapped_bytes = dict[Category, int](), 0
        if trainer is not None and model is not None:
            optimizer = trainer.optimizer
            gradients = {Category.GRADIENTS: weigh_gradients(model, optimizer)}
            resident = {**weigh_residents(model, optimizer), **gradients}
            mapped_bytes = _mapped_bytes(model.parameters())
        if torch.cuda.is_available():
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
            return HeldMemory(allocated, peak, reserved, None, resident)
        if allocated is not None:
            allocated += mapped_bytes - (before_bytes or 0)
        return HeldMemory(allocated, None, None, resident_peak_bytes(), resident)
    return None


def _mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that lie in files, of which no allocator knows."""
    maps = Path("/proc/self/maps")
    files = mapped_files(maps.read_text()) if maps.exists() else ()
    return sum(
        storage.nbytes()
        for storage in distinct_storages(tensors)
        if any(file.begin <= storage.data_ptr() < file.end for file in files)
    )


def mapped_files(maps: str) -> tuple[MappedFile, ...]:
    """The weight files among a process's mappings, as /proc/self/maps words them."""
    files = []
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].removesuffix(" (deleted)").endswith(".safetensors"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            files.append(MappedFile(begin, end))
    return tuple(files)
