"""Renders what is handed to `accelerate launch`: pure text, nothing is written here."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.run_paths import RunPaths

WORKER_MODULE: Final = "launcher.worker.train"

QUIET: Final = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What every worker gets unless the user set it: a log of whole lines, written at once, and no telemetry."""

ALLOCATOR_SETTINGS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch 2.9 to 2.13 look for the CUDA allocator's settings; the first one is the older name."""

CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""Quota and period of the control group (version 2), in microseconds; a quota of `max` is none."""


def accelerate_config(hardware: HardwareSpec) -> str:
    """Configuration file of `accelerate launch` for one process on one device.

    `mixed_precision` is the text `no` (a bare one would be read as false): accelerate passes it on in
    `ACCELERATE_MIXED_PRECISION`, which transformers' TrainingArguments read first and then overrule with
    `bf16` or `fp16` (training_args.py, 5.17 to 5.23). Any other value would stand where both are off.
    `gpu_ids` is `all` so that accelerate leaves CUDA_VISIBLE_DEVICES as `worker_environment` sets it.
    """
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "gpu_ids": "all",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": hardware.kind is DeviceKind.CPU,
    }
    return "# accelerate launch --config_file: one process on one device\n" + yaml.safe_dump(config)


def worker_command(paths: RunPaths, python: str = sys.executable) -> tuple[str, ...]:
    """The command line of the worker."""
    return (
        python,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(paths.accelerate_config),
        "-m",
        WORKER_MODULE,
        str(paths.root),
    )


def worker_environment(hardware: HardwareSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the worker's environment has beyond the inherited one.

    What the user set is kept, and repeated here so that the command script does the same in another shell.
    Two things are not the user's to set: which of several devices is used (with more than one in sight, the
    trainer would wrap the model in nn.DataParallel, unplanned), and where Python looks for this package.

    Args:
        hardware: Where the worker will run.
        inherited: The environment that the additions are for.
    """
    additions = {name: inherited.get(name, value) for name, value in QUIET.items()}
    additions |= _import_path(inherited)
    if hardware.kind is DeviceKind.CPU:
        additions["ACCELERATE_USE_CPU"] = "true"
        additions["CUDA_VISIBLE_DEVICES"] = ""  # else torch.cuda.is_available() would choose the wrong meter
        # accelerate would set the physical cores, or 1 if they can't be counted
        additions["OMP_NUM_THREADS"] = inherited.get("OMP_NUM_THREADS") or str(usable_cores())
        return additions
    visible = inherited.get("CUDA_VISIBLE_DEVICES")
    additions["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0].strip()
    if not visible:  # count as the driver does, not fastest first
        additions["CUDA_DEVICE_ORDER"] = inherited.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if hardware.kind is DeviceKind.CUDA:
        additions |= _allocator(inherited)
    return additions


def _allocator(inherited: Mapping[str, str]) -> dict[str, str]:
    """Expandable segments, which fragment less; only the new name, because the old one draws a warning."""
    chosen = {name: inherited[name] for name in ALLOCATOR_SETTINGS if name in inherited}
    return chosen or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _import_path(inherited: Mapping[str, str]) -> dict[str, str]:
    """Lets a worker import this package without an installation, and no module from the current folder.

    `python -m` puts the current folder first, where a user's `datasets.py` would hide the library.
    """
    path = {"PYTHONSAFEPATH": "1"}
    root = package_root()
    entries = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *entries):
        entries.insert(0, root)
    if entries:
        path["PYTHONPATH"] = os.pathsep.join(entries)
    return path


def package_root() -> str:
    """The folder that the `launcher` package lies in."""
    return str(Path(__file__).resolve().parents[2])


def usable_cores() -> int:
    """Cores that this process may keep busy: by its affinity, and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.exists():
        quota, _, period = CPU_QUOTA.read_text(encoding="ascii").partition(" ")
        if quota.isdigit():
            cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def command_script(command: Sequence[str], environment: Mapping[str, str], folder: str) -> str:
    """The same command as a POSIX shell script that a person can run.

    Args:
        command: The command line.
        environment: What the environment must have beyond the shell's.
        folder: Where it runs; relative paths in the job are meant from here.
    """
    lines = [
        "#!/bin/sh",
        "# Starts the training of this run directory, as the launcher does.",
        "# worker.json holds the job and the plan; from a checkpoint in checkpoints/ it continues.",
        "set -eu",
        f"cd -- {shlex.quote(folder)}",
    ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    lines.append("exec " + shlex.join(command))
    return "\n".join(lines) + "\n"
