"""DeepSpeed's swapping to NVMe under the tape: its own swappers run, and files are the sizes that were written to them.

Read off deepspeed 0.19.8. What stands in is the handle of its C++ (csrc/aio, csrc/pin_memory): page-locked buffers, and
reads and writes, which allocate nothing. A file is as long as what is written to it, from its beginning.

Groups of states below 1 MiB, and gradients below it, are not swapped (swap_tensor/utils.py, `MIN_AIO_BYTES`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_optimizer_swapper, utils
from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES
from deepspeed.runtime.zero import stage3

from launcher.planner.fake_offload import on_host
from launcher.planner.swapping import Swapping
from launcher.planner.tape import OFF_DEVICE, ON_DEVICE, Tape


class Drive:
    """The NVMe of a rank, and the page-locked buffers before it.

    Args:
        host: Where host memory is: on a CPU it is the device's.
    """

    def __init__(self, host: torch.device) -> None:
        self._host = host
        self._locked: dict[int, torch.Tensor] = {}
        self._files: dict[str, int] = {}
        self._groups: list[int] = []
        self._limit_bytes = 0

    def lock(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer whose pages stay in memory; unlike what torch pins it is as large as it was asked for."""
        buffer = torch.empty(elements, dtype=dtype, device=self._host)
        self._locked[buffer.untyped_storage()._cdata] = buffer
        return buffer

    def is_locked(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a buffer."""
        return tensor.untyped_storage()._cdata in self._locked

    def write(self, path: str, num_bytes: int) -> None:
        """Writes to a file."""
        self._files[path] = max(num_bytes, self._files.get(path, 0))

    def note_groups(self, optimizer: Any) -> None:
        """Keeps how large the groups of states are, in which DeepSpeed swaps."""
        item_bytes = torch.tensor([], dtype=optimizer.master_weights_and_grads_dtype).element_size()
        self._groups = [item_bytes * int(count) for count in optimizer.fp16_partitioned_groups_flat_numel]
        self._limit_bytes = item_bytes * int(optimizer.sub_group_size)

    def swapping(self) -> Swapping:
        """What lies on NVMe, and before it."""
        return Swapping(
            groups_bytes=tuple(self._groups),
            limit_bytes=self._limit_bytes,
            least_bytes=MIN_AIO_BYTES,
            locked_bytes=tuple(buffer.nbytes for buffer in self._locked.values()),
            files_bytes=tuple(self._files.values()),
        )


class _Handle:
    """What DeepSpeed reads and writes with: all of it is done by the time that it waits."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._pending = 0

    def new_cpu_locked_tensor(self, elements: int, example: torch.Tensor) -> torch.Tensor:
        """A page-locked buffer of a tensor's dtype."""
        return self._drive.lock(int(elements), example.dtype)

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> bool:
        """As the process ends."""
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor can be read into and written from."""
        return self._drive.is_locked(tensor)

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Begins to read."""
        self._pending += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Begins to write."""
        self._drive.write(path, buffer.nbytes)
        self._pending += 1
        return 0

    def wait(self) -> int:
        """How many reads and writes have ended."""
        ended, self._pending = self._pending, 0
        return ended


class _TorchOnHost:
    """torch as the swappers see it: what they make is in host memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *sizes: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """As torch's; what it calls `cpu` is the host."""
        return torch.zeros(*sizes, device=OFF_DEVICE if device == "cpu" else device, **options)

    def Tensor(self) -> torch.Tensor:  # torch's name
        """A tensor of no size, in the place of what was written out."""
        return torch.empty(0, device=OFF_DEVICE)


def swap(tape: Tape, *, on_gpu: bool) -> None:
    """Gives DeepSpeed's swapper of optimizer states a drive, in this process.

    Args:
        tape: Is told what lies on the drive.
        on_gpu: Whether the job runs on a GPU, and host memory is another one.
    """
    drive = Drive(OFF_DEVICE if on_gpu else ON_DEVICE)
    tape.swapped = drive.swapping
    handles = SimpleNamespace(aio_handle=lambda **settings: _Handle(drive))
    partitioned_optimizer_swapper.AsyncIOBuilder = lambda: SimpleNamespace(load=lambda: handles)
    sharded = stage3.DeepSpeedZeroOptimizer_Stage3
    sharded._configure_tensor_swapping = _noting_groups(sharded._configure_tensor_swapping, drive)
    if on_gpu:
        utils.torch = optimizer_utils.torch = _TorchOnHost()
        # weights that are on the drive are tensors of no size, made where torch makes them by default: on the host
        sharded._create_fp32_partitions = on_host(sharded._create_fp32_partitions)


def _noting_groups(configure: Callable[..., None], drive: Drive) -> Callable[..., None]:
    @wraps(configure)
    def configured(optimizer: Any, *settings: Any) -> None:
        drive.note_groups(optimizer)
        configure(optimizer, *settings)

    return configured
