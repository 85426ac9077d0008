"""What torch's profiler does not tell of memory: marks among its events say it.

Tensors of mapped files, tensors that were there before it began, and arrays whose memory is NumPy's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import record_function

from launcher.worker.residents import distinct_storages

RELEASE_MARK = "launcher.release:"
RECEIVE_MARK = "launcher.receive:"
DROP_MARK = "launcher.drop:"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class MappedFile:
    """A file that is part of the address space: weights are read so."""

    begin: int
    """First address."""
    end: int
    """Address after the last one; whole pages."""


def mapped_files(maps: str) -> tuple[MappedFile, ...]:
    """The weight files among a process's mappings, as /proc/self/maps words them."""
    files = []
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].removesuffix(" (deleted)").endswith(".safetensors"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            files.append(MappedFile(begin, end))
    return tuple(files)


class EarlierTensors:
    """Tells when tensors that were there before the profiler are dropped, of which it may know nothing.

    It knows a mapped file as one block, which ends with its last tensor. What a run needs of it are the tensors that
    are alive, so each of them counts until it is dropped, and the end of the file doesn't. And it reports the release
    of a block only if it saw it born (c10/core/CPUAllocator.cpp, `ProfiledCPUMemoryReporter`, torch 2.13): not of one
    that a thread made which is not profiled, as loading does. So drops are marked; a report follows at once, or never.

    Args:
        tensors: Everything alive when the profiler starts.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        maps = Path("/proc/self/maps")
        self._files = mapped_files(maps.read_text()) if maps.exists() else ()
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._opened = 0
        for storage in distinct_storages(tensors):
            address, num_bytes = storage.data_ptr(), storage.nbytes()
            if storage.device.type != "cpu" or not num_bytes:
                continue
            is_mapped = any(file.begin <= address < file.end for file in self._files)
            mark = RELEASE_MARK if is_mapped else DROP_MARK
            self._watchers[address] = weakref.ref(storage, partial(_mark, mark, num_bytes))

    def ends_file(self, change_bytes: int) -> bool:
        """Whether a change of the allocator's bytes is the end of one of the files; asked for every change in order.

        A file of the same size that was opened meanwhile (a checkpoint of the same weights) ends first.
        """
        pages = -(-abs(change_bytes) // PAGE_BYTES) * PAGE_BYTES
        if not any(file.end - file.begin == pages for file in self._files):
            return False
        self._opened += 1 if change_bytes > 0 else -1
        return self._opened < 0


class ForeignTensors:
    """Tells when tensors whose memory is not of torch's allocator come and go: images are NumPy's arrays.

    torch doesn't resize such storages (`torch.from_numpy`, shared memory), and by that they are known.
    """

    def __init__(self) -> None:
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def receive(self, tensors: Iterable[torch.Tensor]) -> None:
        """Marks the bytes of those among tensors that are foreign, now and when they are dropped."""
        self._watchers = {key: watcher for key, watcher in self._watchers.items() if watcher() is not None}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.resizable() or id(storage) in self._watchers or tensor.device.type != "cpu":
                continue
            num_bytes = storage.nbytes()
            self._watchers[id(storage)] = weakref.ref(storage, partial(_mark, RELEASE_MARK, num_bytes))
            with record_function(f"{RECEIVE_MARK}{num_bytes}"):
                pass


def _mark(mark: str, num_bytes: int, reference: object) -> None:
    with record_function(f"{mark}{num_bytes}"):
        pass
