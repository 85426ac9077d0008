"""Optimizer states on NVMe: the folder that is a run's own, and what a machine must have before workers start."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from launcher.errors import LaunchError
from launcher.hardware import HardwareSpec
from launcher.nvme import NvmeEstimate
from launcher.plan import Plan
from launcher.run_paths import RunPaths
from launcher.units import format_bytes

PROBE: Final = """
import sys
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
handle = AsyncIOBuilder().load().aio_handle(1 << 20, 8, False, True, 1)
buffer = handle.new_cpu_locked_tensor(int(sys.argv[1]), torch.empty(0, dtype=torch.uint8))
sys.exit(3 if buffer.data_ptr() == 0 else 0)
"""
"""Compiles, or finds, DeepSpeed's asynchronous reads and writes, and locks as much memory as a rank will."""
CANNOT_LOCK: Final = 3
"""Where DeepSpeed was compiled without assertions; with them it aborts (0.19.8, csrc/aio, deepspeed_pin_tensor.cpp)."""
LINES_SHOWN: Final = 3


def swap_folder(hardware: HardwareSpec, paths: RunPaths, host: str) -> Path:
    """Where a run swaps to: a folder of its own, because DeepSpeed names files by rank and group alone.

    Args:
        hardware: Of it the folder on every node's NVMe.
        paths: The run directory, whose place tells the runs of one host apart.
        host: Name of the machine that writes the run directory; others may have a directory of the same name, and share
            the drive.
    """
    digest = hashlib.sha256(f"{host}:{paths.root.absolute()}".encode()).hexdigest()
    return Path(hardware.nvme_path) / f"swap-{digest[:16]}"


def require_drive(plan: Plan, hardware: HardwareSpec, needed: NvmeEstimate | None) -> None:
    """Checks that this machine's NVMe is there, can be written, and has room for what its ranks swap.

    Args:
        plan: What is to run.
        hardware: Of it the folder.
        needed: What each rank has there; None: nobody knows.

    Raises:
        LaunchError: When it is not.
    """
    if not plan.swaps:
        return
    folder, key = Path(hardware.nvme_path), f"hardware.nvme_path={hardware.nvme_path}"
    if not folder.is_dir():
        raise LaunchError(
            f"{key} is no folder on this machine", "mount the drive, or name another folder of it"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(f"{key} can't be written by this user", "change its mode, or name another folder")
    free_bytes = shutil.disk_usage(folder).free
    needed_bytes = 0 if needed is None else needed.file_bytes * plan.num_devices
    if free_bytes < needed_bytes:
        raise LaunchError(
            f"{key}: {plan.num_devices} ranks swap {needed_bytes} bytes ({format_bytes(needed_bytes)}) there, and it has "
            f"{free_bytes} bytes ({format_bytes(free_bytes)}) free",
            "a larger drive, more machines, or planner.pin.offload_device=cpu",
        )


def require_swapping(plan: Plan, needed: NvmeEstimate | None, variables: Mapping[str, str]) -> None:
    """Checks that DeepSpeed can read and write NVMe on this machine; compiles what it needs for that, once.

    Args:
        plan: What is to run.
        needed: What each rank locks into memory; None: nobody knows.
        variables: The environment of the workers.

    Raises:
        LaunchError: When it can't.
    """
    if not plan.swaps:
        return
    locked_bytes = 1 if needed is None else max(1, needed.locked_bytes)
    accelerator = variables.get("DS_ACCELERATOR", "")
    code, words = _probe(locked_bytes, accelerator)
    if code in (CANNOT_LOCK, -signal.SIGABRT):
        raise LaunchError(
            f"the plan swaps to NVMe, for which each rank locks {locked_bytes} bytes ({format_bytes(locked_bytes)}) into "
            "host memory, and this process may not",
            "`ulimit -l unlimited`, in a container `--ulimit memlock=-1`, or smaller planner.pin.sub_group_elements",
        )
    if code != 0:
        raise LaunchError(
            f"the plan swaps to NVMe, and DeepSpeed's async_io can't be compiled or loaded here: {words}",
            "install libaio with its headers (Debian: libaio-dev), g++ and ninja; or planner.pin.offload_device=cpu",
        )


@cache
def _probe(locked_bytes: int, accelerator: str) -> tuple[int, str]:
    """Tries it in a process of its own: this one imports no torch. The exit code, and the last lines of what it said."""
    environment = {**os.environ, **({"DS_ACCELERATOR": accelerator} if accelerator else {})}
    command = [sys.executable, "-c", PROBE, str(locked_bytes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, " | ".join(lines[-LINES_SHOWN:])


def remove_swapped(plan: Plan, paths: RunPaths, ranks: Sequence[int]) -> None:
    """Removes what a machine's ranks have swapped, which nobody reads again; nothing of others that share the drive.

    DeepSpeed gives each rank a folder (0.19.8, swap_tensor/optimizer_utils.py, `OptimizerSwapper`, and zero/stage3.py).

    Args:
        plan: What ran, or is to run.
        paths: The run directory; its DeepSpeed configuration names the run's folder on the drive.
        ranks: Those of this machine.
    """
    if not plan.swaps or not paths.deepspeed_config.exists():
        return
    config = json.loads(paths.deepspeed_config.read_text(encoding="utf-8"))
    folder = Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"])
    if plan.num_nodes == 1:  # an earlier plan of the run may have had more ranks
        shutil.rmtree(folder, ignore_errors=True)
        return
    of_ranks = folder / "zero_stage_3" / "optimizer"
    for rank in ranks:
        shutil.rmtree(of_ranks / f"rank{rank}", ignore_errors=True)
    with suppress(OSError):  # other machines' ranks are there
        for empty in (of_ranks, of_ranks.parent, folder):
            empty.rmdir()
