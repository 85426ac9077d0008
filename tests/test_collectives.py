"""What gloo holds and allocates, seen by torch's profiler in a process of its own: two threads on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROLOGUE = """
import json, os, sys
import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

rank, folder = int(sys.argv[1]), sys.argv[2]
store = distributed.FileStore(folder + "/store", 2)
distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
SIZE = 1 << 18  # elements


def changes(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return [num_bytes for _, num_bytes in found]
"""

RELEASES = """
from launcher.worker.__main__ import leave
from launcher.worker.collectives import settled_collectives


def reduce_many():
    for _ in range(200):
        whole, part = torch.ones(SIZE), torch.empty(SIZE // 2)
        distributed.all_reduce(whole)
        distributed.reduce_scatter_tensor(part, whole)
        handle = distributed.all_gather_into_tensor(whole, part, async_op=True)
        handle.wait()


with settled_collectives():
    left = sum(changes(reduce_many))
distributed.all_reduce(torch.ones(1))  # its own wait is back
if rank == 0:
    print(json.dumps({"left": left, "largest": SIZE * 4}))
distributed.destroy_process_group()
leave(0)
"""

ALLOCATIONS = """
from launcher.worker.collectives import settled_collectives

whole, part, parts = torch.ones(SIZE), torch.ones(SIZE // 2), [torch.ones(SIZE // 2) for _ in range(2)]
CALLS = {
    "all_reduce": lambda: distributed.all_reduce(whole),
    "broadcast": lambda: distributed.broadcast(whole, 0),
    "reduce": lambda: distributed.reduce(whole, 0),
    "all_gather": lambda: distributed.all_gather(parts, part),
    "all_gather_into_tensor": lambda: distributed.all_gather_into_tensor(whole, part),
    "reduce_scatter_tensor": lambda: distributed.reduce_scatter_tensor(part, whole),
    "gather": lambda: distributed.gather(part, parts if rank == 0 else None, 0),
    "scatter": lambda: distributed.scatter(part, parts if rank == 0 else None, 0),
    "all_reduce_coalesced": lambda: distributed.all_reduce_coalesced([part, whole]),
}


def highest(numbers):
    total = top = 0
    for number in numbers:
        total += number
        top = max(top, total)
    return top


def peaks():
    found = {}
    for name, call in CALLS.items():
        distributed.barrier()
        found[name] = highest(changes(call)) // 1024  # a barrier's flag and a scalar are not what is asked
    return found


with settled_collectives():
    real = peaks()
distributed.destroy_process_group()

from torch.testing._internal.distributed.fake_pg import FakeStore
from launcher.planner.gloo_twin import allocate_as_gloo

distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
plain = peaks()
allocate_as_gloo()
twin = peaks()
if rank == 0:
    print(json.dumps({"real": real, "plain": plain, "twin": twin}))
"""


def two_ranks(program: str, folder: Path) -> dict[str, Any]:
    """What rank 0 of a program on two ranks prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROLOGUE + program, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    said, _ = ranks[0].communicate(timeout=300)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the kernel's account of threads is Linux's")
def test_what_gloo_releases_is_in_the_account(tmp_path: Path) -> None:
    found = two_ranks(RELEASES, tmp_path)
    assert abs(found["left"]) < found["largest"] / 4  # one that is missed has all of it


def test_the_stand_in_allocates_what_gloo_does(tmp_path: Path) -> None:
    found = two_ranks(ALLOCATIONS, tmp_path)
    assert found["twin"] == found["real"]
    assert found["plain"] != found["real"]
