"""Reads this machine: its CUDA devices through NVML, its memory limit through the kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pynvml
from pydantic import TypeAdapter

from launcher.hardware import DeviceKind, HardwareSpec

CGROUP_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Memory limit of the control group, version 2 and 1."""


@dataclass(frozen=True)
class DetectedDevice:
    """One CUDA device of this machine."""

    product: str
    """The maker's name."""
    memory_bytes: int
    """What the driver reports as usable."""


def is_installed(module: str) -> bool:
    """Whether a Python module can be imported here; asked without importing it."""
    return find_spec(module) is not None


def detect_cuda() -> tuple[DetectedDevice, ...]:
    """The CUDA devices of this machine; empty where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        devices = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            devices.append(DetectedDevice(name if isinstance(name, str) else name.decode(), int(memory)))
        return tuple(devices)
    finally:
        pynvml.nvmlShutdown()


def detect_cpu_memory_bytes(root: Path = Path("/")) -> int:
    """The memory this process may use: the machine's, or its control group's limit if that is lower."""
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total = int(fields["MemTotal"].split()[0]) << 10
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in CGROUP_LIMITS:
        file = root / name
        if file.exists():
            text = file.read_text().strip()
            if text.isdigit():
                total = min(total, int(text))
    return total


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
    entries = {entry["name"]: entry for entry in known}
    if wanted.kind is DeviceKind.AUTO and devices:
        entry = _match(devices[0], entries.values())
        facts = {"kind": "cuda", "supports_flash_attention": True} if entry is None else dict(entry)
        facts |= {
            "product": devices[0].product,
            "memory_bytes": wanted.memory_bytes or devices[0].memory_bytes,
            "num_devices": wanted.num_devices,
            "num_nodes": wanted.num_nodes,
        }
        return _from_facts(facts)
    if wanted.kind is DeviceKind.AUTO:
        cpu = _from_facts(dict(entries["cpu"]))
        wanted = replace(
            cpu,
            memory_bytes=wanted.memory_bytes,
            num_devices=wanted.num_devices,
            num_nodes=wanted.num_nodes,
        )
    if wanted.kind is DeviceKind.CPU and not wanted.memory_bytes:
        return replace(wanted, memory_bytes=cpu_memory_bytes)
    return wanted


def is_here(hardware: HardwareSpec, devices: tuple[DetectedDevice, ...]) -> bool:
    """Whether this machine has what a plan was made for."""
    if hardware.kind is DeviceKind.CPU:
        return True
    return any(_is_product(hardware.product, device) for device in devices)


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
