"""What torch does not tell of memory: notes among its events say it.

Tensors that were there before it began, those of mapped files among them, and arrays whose memory is NumPy's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch

from launcher.worker.account import Account, HeldBlock
from launcher.worker.residents import distinct_storages


class Notes:
    """What is to be told to the account at moments of the program, which marks among the events keep.

    Args:
        mark: Puts a mark of a number among the events.
    """

    def __init__(self, mark: Callable[[int], None]) -> None:
        self._mark = mark
        self._notes: list[Callable[[Account], None]] = []

    def write(self, note: Callable[[Account], None]) -> None:
        """Keeps a note for this moment."""
        number = len(self._notes)
        self._notes.append(note)
        self._mark(number)

    def read(self, number: int, account: Account) -> None:
        """Tells the account what was noted at a mark."""
        self._notes[number](account)


class WatchedTensors:
    """Tells when tensors are dropped, of whose release the profiler may say nothing.

    It reports the release of a block only if it saw it born (c10/core/CPUAllocator.cpp, `ProfiledCPUMemoryReporter`,
    torch 2.13): not of one that was there before, or that a thread made which is not profiled, as loading does. It
    knows a mapped file as one block, which ends with its last tensor, while what a run needs of it are the tensors
    that are alive. And it knows nothing of arrays that are NumPy's.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, account: Account, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors from the beginning of an account until they are dropped."""
        for storage in distinct_storages(tensors):
            if storage.device.type == "cpu" and storage.nbytes():
                self._watch(storage, account.take(storage.data_ptr(), storage.nbytes()))

    def receive(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts those of the tensors that are foreign, from now until they are dropped.

        torch doesn't resize such storages (`torch.from_numpy`, shared memory), and by that they are known.
        """
        self._watchers = {key: watcher for key, watcher in self._watchers.items() if watcher() is not None}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.resizable() or id(storage) in self._watchers or tensor.device.type != "cpu":
                continue
            blocks: list[HeldBlock] = []
            address, num_bytes = storage.data_ptr(), storage.nbytes()
            self._watchers[id(storage)] = weakref.ref(storage, partial(self._dropped, blocks))
            self._notes.write(partial(_take_into, blocks, address, num_bytes))

    def _watch(self, storage: torch.UntypedStorage, block: HeldBlock) -> None:
        self._watchers[id(storage)] = weakref.ref(storage, partial(self._dropped, [block]))

    def _dropped(self, blocks: list[HeldBlock], reference: object) -> None:
        self._notes.write(partial(_drop_all, blocks))


def _take_into(blocks: list[HeldBlock], address: int, num_bytes: int, account: Account) -> None:
    blocks.append(account.take(address, num_bytes))


def _drop_all(blocks: list[HeldBlock], account: Account) -> None:
    for block in blocks:
        account.drop(block)
