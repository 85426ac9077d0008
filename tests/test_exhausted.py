"""Want of memory is recognised: real failures of a process that may take no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_other_failures_are_not() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(FileNotFoundError(2, "No such file or directory"))


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
