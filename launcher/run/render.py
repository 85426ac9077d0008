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

from launcher.cluster import Node
from launcher.engine_config import accelerate_settings
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Engine
from launcher.plan import Plan
from launcher.run.cgroups import cpu_limit
from launcher.run_paths import RunPaths

WORKER_MODULE: Final = "launcher.worker"
NODE_MODULE: Final = "launcher.run.node"

QUIET: Final = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What every worker gets unless the user set it: a log of whole lines, written at once, and no telemetry."""

SAFE: Final = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
"""No checkpoint may run code when it is read: transformers asks for that itself, DeepSpeed 0.19 asks for the opposite
(torch_checkpoint_engine.py), and torch heeds this variable first."""

ALLOCATOR_SETTINGS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch 2.9 to 2.13 look for the CUDA allocator's settings; the first one is the older name."""

LINE_PREFIX: Final = "[rank ${rank}] "
"""torchrun's template of what each line of a process begins with (torch 2.9 to 2.13, distributed/run.py)."""


def accelerate_config(hardware: HardwareSpec, plan: Plan, paths: RunPaths) -> str:
    """Configuration file of `accelerate launch`; the same for every node."""
    config = accelerate_settings(hardware, plan, str(paths.deepspeed_config))
    devices = "one process on one device" if plan.world_size == 1 else f"{plan.world_size} processes"
    if plan.num_nodes > 1:
        devices += f" on {plan.num_nodes} nodes"
    return f"# accelerate launch --config_file: {devices}\n" + yaml.safe_dump(config)


def worker_command(
    paths: RunPaths, plan: Plan, node: Node | None = None, python: str = sys.executable
) -> tuple[str, ...]:
    """The command line that starts the processes of one machine.

    Every line that a process prints is marked with its rank (see `LINE_PREFIX`), and kept in a file of its own below
    `RunPaths.logs`.

    Args:
        paths: The run directory, which every machine sees under the same name.
        plan: The plan.
        node: Which machine; None: the only one.
        python: Interpreter on that machine.
    """
    node = node or Node()
    command = [python, "-m", "accelerate.commands.launch", "--config_file", str(paths.accelerate_config)]
    if plan.engine is not Engine.NONE:
        command += ["--main_process_port", str(node.port), "--tee", "3", "--log_dir", str(paths.logs)]
    if plan.num_nodes > 1:
        # not in the file: accelerate's parser has defaults for these two, and lets them win
        command += ["--same_network", "--rdzv_backend", "static"]
        command += ["--machine_rank", str(node.rank), "--main_process_ip", node.address]
    elif plan.engine is not Engine.NONE:
        command += ["--rdzv_backend", "loopback"]
    return (*command, "-m", WORKER_MODULE, str(paths.root))


def node_command(paths: RunPaths, node: Node, python: str = sys.executable) -> tuple[str, ...]:
    """The command line that does one machine's part of a run on several: it meets the others, then starts the workers.

    It follows them, and ends them when another machine fails (see `launcher.run.node`).
    """
    return (
        python,
        "-m",
        NODE_MODULE,
        str(paths.root),
        "--rank",
        str(node.rank),
        "--address",
        node.address,
        "--port",
        str(node.port),
    )


def worker_environment(
    hardware: HardwareSpec, inherited: Mapping[str, str], plan: Plan | None = None
) -> dict[str, str]:
    """What the workers' environment has beyond the inherited one.

    What the user set is kept, and repeated here so that the command script does the same in another shell.
    Two things are not the user's to set: how many of the devices are used (with more of them in sight than processes,
    the trainer would wrap the model in nn.DataParallel, unplanned), and where Python looks for this package.

    Args:
        hardware: Where the workers will run.
        inherited: The environment that the additions are for.
        plan: What they run; None: one process on one device.
    """
    engine, num_devices = (plan.engine, plan.num_devices) if plan else (Engine.NONE, 1)
    additions = {name: inherited.get(name, value) for name, value in QUIET.items()}
    additions |= (
        import_path(inherited) | SAFE | {"ACCELERATE_USE_CPU": "false"}
    )  # whatever the user's shell says
    if engine is not Engine.NONE:
        additions["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = LINE_PREFIX
        if plan is not None and plan.num_nodes == 1:
            # launcher.worker.loopback has its own; torchrun warns where none is given
            additions["PET_RDZV_ENDPOINT"] = "127.0.0.1:0"
    if hardware.kind is DeviceKind.CPU:
        return additions | _cpu_environment(engine, num_devices, inherited)
    visible = [
        device.strip() for device in inherited.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()
    ]
    devices = visible or [str(index) for index in range(num_devices)]
    additions["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:num_devices])
    if not visible:  # count as the driver does, not fastest first
        additions["CUDA_DEVICE_ORDER"] = inherited.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if hardware.kind is DeviceKind.CUDA:
        additions |= _allocator(inherited)
    return additions


def _cpu_environment(engine: Engine, num_devices: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """A CPU's share of the environment.

    With DeepSpeed ACCELERATE_USE_CPU must be off: accelerate would fall back to DDP, and ZeRO 3 would still shard the
    weights as they are loaded (accelerate 1.15, state.py, `AcceleratorState.__init__`).
    """
    cores = max(1, usable_cores() // num_devices)
    return {
        "CUDA_VISIBLE_DEVICES": "",  # else torch.cuda.is_available() would choose the wrong meter
        # accelerate would set the physical cores, or 1 if they can't be counted
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS") or str(cores),
        **({"DS_ACCELERATOR": "cpu"} if engine is Engine.DEEPSPEED else {"ACCELERATE_USE_CPU": "true"}),
        **heap_environment(inherited),
    }


def heap_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Lets a process on a CPU keep the memory that it has claimed, instead of giving it back after each step.

    glibc returns the heap's top as soon as a backward pass has let go of enough, and the next step claims it anew, page
    by page: a tenth of the time of SmolLM2-135M's steps. Setting one of the two stops glibc from adapting the other, so
    blocks are taken from the heap up to the largest size that glibc accepts (32 MiB on 64 bits, where it ends up too).

    Args:
        inherited: The environment; what it says holds.
    """
    settings = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    return {name: inherited.get(name) or value for name, value in settings.items()}


def _allocator(inherited: Mapping[str, str]) -> dict[str, str]:
    """Expandable segments, which fragment less; only the new name, because the old one draws a warning."""
    chosen = {name: inherited[name] for name in ALLOCATOR_SETTINGS if name in inherited}
    return chosen or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def import_path(inherited: Mapping[str, str]) -> dict[str, str]:
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


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores that this process may keep busy, at least one: by its affinity, and by its control groups' quotas.

    Args:
        root: Of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_limit(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


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
