"""Reads this machine: its CUDA devices through NVML, its memory through the kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pynvml
from pydantic import TypeAdapter

from launcher.hardware import DeviceKind, HardwareSpec, MatrixFlops
from launcher.run.cgroups import memory_limit_bytes

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Which devices CUDA shows a process, by number or UUID; none of those from the first that is not there."""


@dataclass(frozen=True)
class DetectedDevice:
    """One CUDA device of this machine."""

    product: str
    """The maker's name."""
    memory_bytes: int
    """What the driver reports as usable."""
    uuid: str = ""
    """The driver's name for this very device."""


def is_installed(module: str) -> bool:
    """Whether a Python module can be imported here; asked without importing it."""
    return find_spec(module) is not None


def detect_cuda(environment: Mapping[str, str] = os.environ) -> tuple[DetectedDevice, ...]:
    """The CUDA devices of this machine that a process would see, in its order; empty where there is no driver.

    Args:
        environment: The environment of that process.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return visible_devices([_described(handle) for handle in handles], environment)
    finally:
        pynvml.nvmlShutdown()


def _described(handle: Any) -> DetectedDevice:
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    return DetectedDevice(
        name if isinstance(name, str) else name.decode(),
        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        uuid if isinstance(uuid, str) else uuid.decode(),
    )


def visible_devices(
    devices: Sequence[DetectedDevice], environment: Mapping[str, str]
) -> tuple[DetectedDevice, ...]:
    """Those of a machine's devices that CUDA_VISIBLE_DEVICES lets a process see, in its order.

    Numbers count as the driver does, which is CUDA's own order where all devices are alike. Parts of a device (MIG) are
    not known by name: they count as devices that are not there.

    Args:
        devices: All of them, in the driver's order.
        environment: The environment of the process.
    """
    if VISIBLE not in environment:
        return tuple(devices)
    shown: list[DetectedDevice] = []
    for name in environment[VISIBLE].split(","):
        word = name.strip()
        if word.isdigit():
            found = [devices[int(word)]] if int(word) < len(devices) else []
        else:  # the beginning of a UUID is enough, if it is that of one device only
            found = [device for device in devices if word and device.uuid.startswith(word)]
        if len(found) != 1:
            break
        shown += found
    return tuple(shown)


def detect_cpu_memory_bytes(root: Path = Path("/")) -> int:
    """The memory this process may use: the machine's, or the limit of its control groups if that is lower.

    Args:
        root: Of the file system.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        entries = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total = int(entries["MemTotal"].split()[0]) << 10
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes(root)
    return total if limit is None else min(total, limit)


def resolve_hardware(
    wanted: HardwareSpec,
    known: Iterable[Mapping[str, Any]],
    devices: tuple[DetectedDevice, ...],
    cpu_memory_bytes: int,
) -> HardwareSpec:
    """Fills in what `hardware=auto` and `hardware=cpu` leave to this machine.

    Args:
        wanted: The job's hardware.
        known: The built-in hardware facts.
        devices: CUDA devices of this machine.
        cpu_memory_bytes: Memory that a CPU process may use here.
    """
    if wanted.kind is DeviceKind.AUTO and devices:
        entry = _match(devices[0], known)
        facts = {"kind": "cuda", "supports_flash_attention": True} if entry is None else dict(entry)
        facts |= {"product": devices[0].product, "memory_bytes": devices[0].memory_bytes}
        return _with_given(_from_facts(facts), wanted)
    if wanted.kind is DeviceKind.AUTO:
        wanted = _with_given(_from_facts(next(entry for entry in known if entry["name"] == "cpu")), wanted)
    if wanted.kind is DeviceKind.CPU and not wanted.memory_bytes:
        return replace(wanted, memory_bytes=cpu_memory_bytes)
    return wanted


def _with_given(found: HardwareSpec, wanted: HardwareSpec) -> HardwareSpec:
    """The facts of a device that was found, but for what the user said otherwise: every key that has no default value."""
    default = HardwareSpec()
    given = {
        item.name: value
        for item in fields(HardwareSpec)
        if (value := getattr(wanted, item.name)) != getattr(default, item.name)
    }
    rates = {
        item.name: rate
        for item in fields(MatrixFlops)
        if (rate := getattr(wanted.matrix_flops, item.name)) != getattr(default.matrix_flops, item.name)
    }
    given |= {
        "matrix_flops": replace(found.matrix_flops, **rates),
        "sources": {**found.sources, **wanted.sources},
    }
    return replace(found, **given)


def is_here(hardware: HardwareSpec, devices: tuple[DetectedDevice, ...]) -> bool:
    """Whether this machine has what a plan was made for: as many of the devices as one node needs.

    A CPU's devices are processes on the one CPU there is.
    """
    return hardware.kind is DeviceKind.CPU or num_here(hardware, devices) >= hardware.num_devices


def num_here(hardware: HardwareSpec, devices: tuple[DetectedDevice, ...]) -> int:
    """How many of this machine's CUDA devices are what a plan was made for."""
    return sum(_is_product(hardware.product, device) for device in devices)


def _match(device: DetectedDevice, entries: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The built-in facts of the same product with the nearest memory."""
    same = [
        entry for entry in entries if entry.get("kind") == "cuda" and _is_product(entry["product"], device)
    ]
    return min(same, key=lambda entry: abs(entry["memory_bytes"] - device.memory_bytes), default=None)


def _is_product(product: str, device: DetectedDevice) -> bool:
    """Whether the product's words stand together in the device's name: an L40S is no L4."""
    wanted, words = _words(product), _words(device.product)
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in starts)


def _words(product: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", product.lower())


def _from_facts(facts: Mapping[str, Any]) -> HardwareSpec:
    return TypeAdapter(HardwareSpec).validate_python(facts)
