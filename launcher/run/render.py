"""Renders what is handed to `accelerate launch`: pure text, nothing is written here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

import yaml

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.run_paths import RunPaths

WORKER_MODULE = "launcher.worker.train"


def accelerate_config(hardware: HardwareSpec) -> str:
    """Configuration file of `accelerate launch` for one process on one device.

    `mixed_precision` stays `no`: the trainer's own arguments decide the precision, and a value here would
    override them through the environment.
    """
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": hardware.kind is DeviceKind.CPU,
        "debug": False,
        "downcast_bf16": "no",
    }
    return yaml.safe_dump(config, sort_keys=True)


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

    On CUDA the caching allocator uses expandable segments, which fragment less. On CPU all cores compute:
    accelerate would set one thread per process.
    """
    additions = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if hardware.kind is DeviceKind.CPU:
        additions["ACCELERATE_USE_CPU"] = "true"
        additions["OMP_NUM_THREADS"] = inherited.get("OMP_NUM_THREADS", str(usable_cores()))
        additions["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # torch 2.9 renamed the variable and still reads the old name
        additions["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        additions["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        additions["CUDA_VISIBLE_DEVICES"] = inherited.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return additions


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command_script(command: Sequence[str], environment: Mapping[str, str], folder: str) -> str:
    """The same command as a script that a person can run."""
    lines = ["#!/bin/sh", "# Trains this run again, as the launcher does.", "set -eu", f"cd {shlex.quote(folder)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    lines.append("exec " + shlex.join(command))
    return "\n".join(lines) + "\n"
