"""Want of memory is recognised: real failures of a process that may take no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.worker.exhausted import is_out_of_memory, worded

PROGRAM = """
import json, resource, sys
import torch
from safetensors.torch import load_file, save_file
from launcher.worker.exhausted import is_out_of_memory

file = sys.argv[1]
save_file({"weight": torch.ones(64 << 20)}, file)
torch.ones(8)
with open("/proc/self/statm") as stream:
    taken = int(stream.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (96 << 20),) * 2)
found = {}
for name, attempt in {
    "allocator": lambda: torch.ones(64 << 20),
    "mapped file": lambda: torch.from_file(file, size=64 << 20),
    "safetensors": lambda: load_file(file),
    "python": lambda: bytearray(256 << 20),
}.items():
    try:
        attempt()
    except BaseException as failure:
        found[name] = [is_out_of_memory(failure), f"{type(failure).__name__}: {failure}"]
    else:
        found[name] = [False, "it fits"]
print(json.dumps(found))
"""


def test_all_that_a_full_process_runs_into_is_want_of_memory(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert {name: is_memory for name, (is_memory, _) in found.items()} == dict.fromkeys(found, True), found
    assert len(found) == 4


DEVICE_FULL = {
    # c10/cuda/CUDAException.cpp (torch 2.13); the whole text as in deepbeepmeep/Wan2GP issue 1083
    "runtime": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    # before torch 2.8 the same in a plain RuntimeError
    "older runtime": RuntimeError("CUDA error: out of memory"),
    # c10/cuda/driver_api.h, C10_CUDA_DRIVER_CHECK: what expandable segments call
    "driver": RuntimeError("CUDA driver error: out of memory"),
    # QwenLM/Qwen3 issue 873
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    # pytorch/pytorch issue 20123, and a status of cuDNN 9 (cudnn_graph.h)
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    # torch/csrc/distributed/c10d/NCCLUtils.cpp; NVIDIA/nccl issue 1410 has the frame, 1235 both last lines
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
        "2.27.3\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "NCCL's own": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 6291456 bytes"
    ),
    # triton/backends/nvidia/driver.c, gpuAssert
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    # torch's allocator, quoted by another error, as by torch.distributed.checkpoint's CheckpointException
    "quoted": RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@pytest.mark.parametrize("library", DEVICE_FULL)
def test_what_a_full_device_says_is_want_of_memory_whoever_asked(library: str) -> None:
    assert is_out_of_memory(DEVICE_FULL[library])


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA kernel read out of memory bounds",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 1 'invalid argument'",
        "the advice is out of memory of the author",
    ],
)
def test_other_failures_are_not(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(FileNotFoundError(2, "No such file or directory"))


def test_want_of_memory_that_another_error_covers_is_seen() -> None:
    def failed(reason: BaseException, *, hidden: bool = False, named: bool = False) -> BaseException:
        try:
            try:
                raise reason
            except BaseException as first:
                if named:
                    raise RuntimeError("optimizer step failed") from first
                if hidden:
                    raise RuntimeError("optimizer step failed") from None
                raise RuntimeError("optimizer step failed")  # noqa: B904  # as libraries do
        except RuntimeError as second:
            return second

    assert is_out_of_memory(failed(MemoryError(), named=True))
    assert is_out_of_memory(failed(DEVICE_FULL["runtime"]))
    assert not is_out_of_memory(failed(ValueError("no"), named=True))
    assert not is_out_of_memory(failed(MemoryError(), hidden=True))  # its author says that it is no matter
    around = RuntimeError("one")
    around.__cause__ = RuntimeError("other")
    around.__cause__.__cause__ = around
    assert not is_out_of_memory(around)


def test_a_failure_that_says_nothing_says_where_it_was() -> None:
    with pytest.raises(MemoryError) as caught:
        raise MemoryError
    where = f"in {test_a_failure_that_says_nothing_says_where_it_was.__name__}, test_exhausted.py:"
    assert worded(caught.value).startswith(f"MemoryError: {where}")
    assert worded(MemoryError()) == "MemoryError: " and worded(ValueError("so")) == "ValueError: so"


FULL = """
import resource, sys
from launcher.worker.exhausted import RESERVE_BYTES
from launcher.worker.leaks import allocated_now_bytes

reserve = [bytearray(RESERVE_BYTES)]
allocated_now_bytes()
with open("/proc/self/status") as stream:
    (taken,) = (int(line.split()[1]) << 10 for line in stream if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken, taken))
held, size = [], 1 << 20
while size:  # to the last byte
    try:
        held.append(bytes(size))
    except MemoryError:
        size //= 2
is_full = False
try:
    bytes(1 << 20)
except MemoryError:
    is_full = True
reserve.clear()
bytes(RESERVE_BYTES // 2)
print(is_full, allocated_now_bytes() > 0)
"""


def test_what_a_worker_keeps_is_room_enough_to_say_what_it_had() -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert child.stdout.split() == ["True", "True"], child.stderr
