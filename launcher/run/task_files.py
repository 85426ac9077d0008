"""Task files for clusters that start images: SkyPilot's and Kubeflow's, from the plan. Pure text.

Every node runs what `launch.cluster=manual` starts by hand (`launcher.run.node`); the cluster says which node it is, and
how the first one is called. Written for SkyPilot 0.14 and Kubeflow Trainer 2.2 to 2.4 (TrainJob v1alpha1, which took
`runtimePatches` in place of `podTemplateOverrides` with 2.2).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from launcher.cluster import DEFAULT_PORT, Cluster
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind
from launcher.run.render import NODE_MODULE
from launcher.run.slurm import node_memory_bytes
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from launcher.units import GIB, MIB

ACCELERATORS: Final[Mapping[str, str]] = {
    "a100_40g": "A100",
    "a100_80g": "A100-80GB",
    "a10g_24g": "A10G",
    "b200_180g": "B200",
    "h100_80g": "H100",
    "h200_141g": "H200",
    "l40s_48g": "L40S",
    "l4_24g": "L4",
    "mi300x_192g": "MI300X",
    "rtx3090_24g": "RTX3090",
    "rtx4090_24g": "RTX4090",
    "rtx5090_32g": "RTX5090",
    "t4_16g": "T4",
    "v100_16g": "V100",
    "v100_32g": "V100-32GB",
}
"""conf/hardware in SkyPilot's words (its catalogues and sky/utils/gpu_names.py, 0.14.1)."""
GPU_RESOURCES: Final[Mapping[DeviceKind, str]] = {
    DeviceKind.CUDA: "nvidia.com/gpu",
    DeviceKind.ROCM: "amd.com/gpu",
}
"""What the makers' device plugins for Kubernetes call a device."""
TORCHRUN: Final = "PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT"
"""What the torch runtime sets; torchrun would read them too, beside what accelerate tells it."""
RUN_VOLUME: Final = "run"
SHARED_MEMORY: Final = "shared-memory"
"""Volumes of a pod. NCCL moves data between the processes of a node through /dev/shm, of which a pod has 64 MiB."""
MANAGER: Final = "memory-first-launcher/launch"
"""Whose patches they are."""
SAVE_MARGIN_SECONDS: Final = 30
"""What a pod may live longer than its interrupted workers."""


def skypilot_text(paths: RunPaths, order: WorkerOrder) -> str:
    """Task file of SkyPilot.

    Raises:
        ConfigError: When it is not known what SkyPilot calls the device.
    """
    spec, plan = order.job.launch, order.plan
    resources: dict[str, Any] = {"cpus": f"{spec.cpus_per_device * plan.num_devices}+"}
    if memory_bytes := node_memory_bytes(order):
        resources["memory"] = f"{math.ceil(memory_bytes / GIB)}+"
    if order.job.hardware.kind is not DeviceKind.CPU:
        resources["accelerators"] = {_accelerator(order): plan.num_devices}
    if spec.image:
        resources["image_id"] = f"docker:{spec.image.removeprefix('docker:')}"
    if spec.infra:
        resources["infra"] = spec.infra
    task: dict[str, Any] = {"name": job_name(paths), "num_nodes": plan.num_nodes, "resources": resources}
    if spec.volume:
        task["volumes"] = {spec.volume_path: spec.volume}
    else:
        task["file_mounts"] = {folder: folder for folder in _to_copy(paths, order)}
    if spec.setup:
        task["setup"] = "\n".join(spec.setup) + "\n"
    command = shlex.join([spec.python or "python3", "-m", NODE_MODULE, str(paths.root)])
    task["run"] = (
        "export PYTHONSAFEPATH=1\n"
        'address=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        f"exec {command} \\\n"
        f'  --rank "$SKYPILOT_NODE_RANK" --address "$address" --port {spec.main_port or DEFAULT_PORT}\n'
    )
    comments = [
        "A task of SkyPilot: trains the job of this run directory. To start it, where SkyPilot is:",
        f"  {submit_hint(paths, order)}",
        *_image_words(order),
    ]
    if not spec.volume:
        comments += [
            "The run directory is copied to the node, and its results are to be copied back:",
            f"  rsync -a {shlex.quote(f'{job_name(paths)}:{paths.root}/')} {shlex.quote(f'{paths.root}/')}",
        ]
    return _with_comments(comments, task)


def _accelerator(order: WorkerOrder) -> str:
    hardware, spec = order.job.hardware, order.job.launch
    name = spec.accelerator or ACCELERATORS.get(hardware.name, "")
    if not name:
        raise ConfigError(
            f"it is not known what SkyPilot calls {hardware.name}",
            "launch.accelerator=<name>; `sky gpus list` prints them",
        )
    return name


def _to_copy(paths: RunPaths, order: WorkerOrder) -> list[str]:
    """What a node needs of this machine, where they share no volume."""
    wanted = [str(paths.root), order.weights, order.job.data.path]
    return [path for path in wanted if path == str(paths.root) or (path and Path(path).exists())]


def train_job_text(paths: RunPaths, order: WorkerOrder) -> str:
    """TrainJob of Kubeflow."""
    spec, plan, hardware = order.job.launch, order.plan, order.job.hardware
    requests: dict[str, Any] = {"cpu": str(spec.cpus_per_device * plan.num_devices)}
    limits: dict[str, Any] = {}
    if memory_bytes := node_memory_bytes(order):
        requests["memory"] = limits["memory"] = f"{math.ceil(memory_bytes / MIB)}Mi"
    if hardware.kind in GPU_RESOURCES:
        requests[GPU_RESOURCES[hardware.kind]] = limits[GPU_RESOURCES[hardware.kind]] = plan.num_devices
    command = [spec.python or "python3", "-m", NODE_MODULE, str(paths.root)]
    command += ["--port", str(spec.main_port or DEFAULT_PORT)]
    script = [
        *map(_literal, spec.setup),
        'rank="$PET_NODE_RANK" address="$PET_MASTER_ADDR"',
        f"unset {TORCHRUN}",
    ]
    script.append('exec "$@" --rank "$rank" --address "$address"')
    job: dict[str, Any] = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job_name(paths)},
        "spec": {
            "runtimeRef": {"name": spec.runtime},
            "trainer": {
                "image": spec.image,
                "numNodes": plan.num_nodes,
                "numProcPerNode": plan.num_devices,
                "command": ["sh", "-c", "\n".join(script), "sh"],
                "args": [_literal(word) for word in command],
                "env": [{"name": "PYTHONSAFEPATH", "value": "1"}],
                "resourcesPerNode": {"requests": requests, **({"limits": limits} if limits else {})},
            },
            "runtimePatches": [_pod_patch(order)],
        },
    }
    if spec.time_limit_minutes:
        job["spec"]["activeDeadlineSeconds"] = spec.time_limit_minutes * 60
    comments = [
        "A TrainJob of Kubeflow: trains the job of this run directory. To start it:",
        f"  {submit_hint(paths, order)}",
        *_image_words(order),
        f"The claim {spec.volume}, mounted at {spec.volume_path}, must hold this run directory under the same name.",
    ]
    return _with_comments(comments, job)


def _pod_patch(order: WorkerOrder) -> dict[str, Any]:
    """Volumes, and time to save: what a TrainJob changes of its runtime's pods."""
    spec = order.job.launch
    pod = {
        "terminationGracePeriodSeconds": spec.grace_seconds + SAVE_MARGIN_SECONDS,
        "volumes": [
            {"name": RUN_VOLUME, "persistentVolumeClaim": {"claimName": spec.volume}},
            {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": RUN_VOLUME, "mountPath": spec.volume_path},
                    {"name": SHARED_MEMORY, "mountPath": "/dev/shm"},
                ],
            }
        ],
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}}}


def _literal(text: str) -> str:
    """A text that Kubernetes leaves alone: it would put a value for `$(NAME)`, and `$` for `$$`."""
    return text.replace("$", "$$")


def job_name(paths: RunPaths) -> str:
    """A name for the job after the run directory: a DNS label that leaves room for the pods' endings."""
    words = re.sub(r"[^a-z0-9]+", "-", paths.root.name.lower()).strip("-")
    return f"run-{words}"[:50].rstrip("-")


def submit_hint(paths: RunPaths, order: WorkerOrder) -> str:
    """The command that submits a task file, for a person."""
    if order.job.launch.cluster is Cluster.KUBERNETES:
        return shlex.join(["kubectl", "create", "-f", str(paths.train_job)])
    return shlex.join(["sky", "launch", "-c", job_name(paths), str(paths.skypilot_task)])


def _image_words(order: WorkerOrder) -> list[str]:
    image = order.job.launch.image or "what launch.setup makes of the default image"
    words = [
        f"The image ({image}) must hold Python 3.11 or newer as `{order.job.launch.python or 'python3'}`, and this",
        "package with the libraries of the machine that planned; nodes with unequal versions refuse each other.",
    ]
    if order.plan.uses_offload:
        words.append(
            "DeepSpeed compiles its CPU optimizer on the node: a C++ compiler and ninja must be there."
        )
    return words


def _with_comments(comments: list[str], document: dict[str, Any]) -> str:
    lines = [line for comment in comments for line in comment.splitlines()]
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return "".join(f"# {line}\n" for line in lines) + text


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
