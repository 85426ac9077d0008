"""What a cluster can't start: found before anything is planned."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from launcher.cluster import USED_BY, Cluster, LaunchSpec
from launcher.hardware import DeviceKind
from launcher.job import Action, JobSpec, OffloadDevice

NAME: Final = re.compile(r"[\w.,:@+/-]*")
"""Names of partitions and accounts: nothing that sbatch or a YAML reader could take for something else."""
OPTION: Final = re.compile(r"--([A-Za-z][\w-]*)(=[^\s'\"\\#]*)?")
"""An option of sbatch in one word that survives sbatch's own reading of a script: quotes, spaces and `#`."""
PLANNED: Final = re.compile(
    "nodes|ntasks|ntasks-per-node|tasks-per-node|chdir|output|error|wrap|array|parsable|signal|requeue|no-requeue|"
    "open-mode|test-only|wait"
)
"""Options of sbatch that the plan, the run directory or the start need as they are."""
Problem = tuple[str, str]
"""What is wrong, and a hint."""


def cluster_limits(job: JobSpec, is_packaged: bool) -> tuple[Problem, ...]:
    """What a job asks for that its cluster can't do, each with a hint.

    Args:
        job: The job, as composed: its hardware may still be `auto`.
        is_packaged: Whether the model comes as a package, which is unpacked into this machine's cache.
    """
    spec, num_nodes = job.launch, job.hardware.num_nodes
    found = list(_unheeded(spec))
    if spec.cluster is Cluster.LOCAL and num_nodes > 1 and job.action is Action.RUN:
        found.append(
            (
                f"hardware.num_nodes={num_nodes} with launch.cluster=local, which is this machine alone",
                "launch.cluster=manual starts node 0 here and prints a command for every other node; "
                "launch.cluster=slurm submits a job",
            )
        )
    if spec.cluster.is_elsewhere and job.hardware.kind is DeviceKind.AUTO:
        found.append(
            (
                f"hardware=auto is this machine, and launch.cluster={spec.cluster.value} runs on others",
                "name the nodes' hardware, as hardware=a100_80g",
            )
        )
    if spec.cluster is Cluster.SLURM:
        found += _slurm(spec)
    elif spec.cluster.is_elsewhere:
        found += [*_in_images(job, is_packaged), *_shared(job)]
    return tuple(found)


def _unheeded(spec: LaunchSpec) -> Iterator[Problem]:
    default = LaunchSpec()
    for key, clusters in USED_BY.items():
        value = getattr(spec, key)
        if value != getattr(default, key) and spec.cluster not in clusters:
            yield (
                f"launch.{key}={_shown(value)} says nothing to launch.cluster={spec.cluster.value}",
                f"launch.{key} is for launch.cluster={' or '.join(cluster.value for cluster in clusters)}",
            )


def _shown(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def _slurm(spec: LaunchSpec) -> Iterator[Problem]:
    for key in ("partition", "account", "main_address"):
        if not NAME.fullmatch(getattr(spec, key)):
            yield (
                f"launch.{key}={getattr(spec, key)!r} is not a name",
                "letters, digits and . , : @ + / - _ are legal",
            )
    for option in spec.options:
        read = OPTION.fullmatch(option)
        if read is None:
            yield (
                f"launch.options: {option!r} is not an option of sbatch in one word",
                "as --constraint=a100; without spaces, quotes, backslashes and #",
            )
        elif PLANNED.fullmatch(read[1]):
            yield (
                f"launch.options: {option!r} is what the launcher decides",
                "hardware.num_nodes, run_dir, launch.requeue and launch.grace_seconds say it; "
                f"not to be given: {PLANNED.pattern.replace('|', ', ')}",
            )


def _in_images(job: JobSpec, is_packaged: bool) -> Iterator[Problem]:
    spec = job.launch
    if spec.cluster is Cluster.KUBERNETES and not spec.image:
        yield (
            "launch.cluster=kubernetes without launch.image: the runtime's own image has no launcher in it",
            "launch.image=<image with this package and its dependencies>",
        )
    if spec.cluster is Cluster.SKYPILOT and not spec.image and not spec.setup:
        yield (
            "launch.cluster=skypilot without launch.image and launch.setup: nothing would install the launcher",
            "launch.image=docker:<image with this package>, or launch.setup with the line that installs it",
        )
    if job.planner.pin.offload_device is OffloadDevice.NVME:
        yield (
            f"planner.pin.offload_device=nvme with launch.cluster={spec.cluster.value}: nothing mounts "
            f"hardware.nvme_path={job.hardware.nvme_path or '(empty)'} where its workers run",
            "planner.pin.offload_device=cpu; launch.cluster=slurm swaps to its nodes' own drives",
        )
    if is_packaged:
        yield (
            f"model.path={job.model.path} is unpacked into this machine's cache, which "
            f"launch.cluster={spec.cluster.value} does not see",
            "a hub id, or a folder below launch.volume_path",
        )


def _shared(job: JobSpec) -> Iterator[Problem]:
    """Problems with what lies in folders: nodes elsewhere see those below `volume_path`, or copies of single ones."""
    spec, name = job.launch, f"launch.cluster={job.launch.cluster.value}"
    needs_volume = spec.cluster is Cluster.KUBERNETES or job.hardware.num_nodes > 1
    if bool(spec.volume) != bool(spec.volume_path) or (spec.volume_path and not _is_plain(spec.volume_path)):
        yield (
            f"launch.volume={spec.volume or '(empty)'} with launch.volume_path={spec.volume_path or '(empty)'}",
            "both or none: the volume's name, and the absolute folder at which nodes mount it",
        )
    elif needs_volume and not spec.volume:
        yield (
            f"{name} with {job.hardware.num_nodes} nodes needs a folder that all of them and this machine know",
            "launch.volume=<its name> launch.volume_path=<folder>, and run_dir=<a folder below it>",
        )
    elif spec.volume and not _is_below(job.run_dir or "runs", spec.volume_path):
        yield (
            f"run_dir={job.run_dir or 'runs'} is not below launch.volume_path={spec.volume_path}",
            "nodes read the run directory from the volume, under the same name as here",
        )
    for key, path in (("model.path", job.model.path), ("data.path", job.data.path)):
        if not path or not os.path.exists(path):  # which calls no name too long
            continue  # a hub id
        if not os.path.isabs(path):
            yield f"{key}={path} is relative to a folder of this machine", "give the absolute path"
        elif spec.volume and not _is_below(path, spec.volume_path):
            yield f"{key}={path} is not below launch.volume_path={spec.volume_path}", "nodes see nothing else"


def _is_plain(folder: str) -> bool:
    return os.path.isabs(folder) and os.path.normpath(folder) == folder.rstrip("/") != ""


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(folder)
