"""Calibration of this machine's device: measured once in a child process, kept in the user's cache, used by plans."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.documents import read_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.rates import Calibration, Rates, published_rates
from launcher.run.detect import DetectedDevice, detect_cuda, num_here
from launcher.run.render import heap_environment
from launcher.run_record import WORKER_MARK

WORKER = "launcher.worker.calibrate"
REFERENCE = Path(__file__).with_name("cpu-rates.json")
"""Calibration of a CPU, for those that are not calibrated."""


def device_name(
    devices: Sequence[DetectedDevice], environment: Mapping[str, str], root: Path = Path("/")
) -> str:
    """The device that a calibration holds for: the first GPU, else the CPU with its threads.

    Args:
        devices: CUDA devices of this machine.
        environment: The environment; OMP_NUM_THREADS decides how many threads work.
        root: Of the file system.
    """
    if devices:
        return devices[0].product
    file = root / "proc/cpuinfo"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    threads = environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', 'CPU')}, {family}, {threads} threads"


def calibration_file(folder: Path, device: str) -> Path:
    """Where a device's calibration is kept."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def calibrate(folder: Path, show: Callable[[str], None]) -> tuple[Path, Calibration]:
    """Measures this machine's device and keeps what was measured; takes about a minute.

    Args:
        folder: Of kept calibrations; a file is written whole or not at all.
        show: Is told of the progress, line by line.

    Returns:
        The file, and what is in it.

    Raises:
        LaunchError: When the child process fails.
    """
    device = device_name(detect_cuda(), os.environ)
    file = calibration_file(folder, device)
    show(f"device    {device}")
    command = [sys.executable, "-m", WORKER, str(file), device]
    last = ""
    environment = {**os.environ, **heap_environment(os.environ)}  # as in a run
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as child:
        assert child.stderr is not None  # it is a pipe
        for line in child.stderr:
            if line.startswith(WORKER_MARK):
                show(line.removeprefix(WORKER_MARK).rstrip())
            elif line.strip():
                last = line.strip()
    if child.returncode:
        raise LaunchError(
            f"the calibration of {device} ended with exit code {child.returncode}: {last}",
            f"`{' '.join(command)}` shows all that it prints",
        )
    return file, read_document(file, Calibration)


def kept_calibration(file: Path) -> Calibration | None:
    """A device's calibration; None where there is none, or where another version wrote it."""
    try:
        return read_document(file, Calibration)
    except LaunchError:
        return None


def device_rates(hardware: HardwareSpec, folder: Path) -> Rates | None:
    """How fast a device works, from the best source there is; None where there is none.

    The calibration of this machine's device, if that is the hardware; else its published facts, or on a CPU the
    calibration of another one: the order of plans is about the same on every CPU.

    Args:
        hardware: The device.
        folder: Of kept calibrations.
    """
    devices = () if hardware.kind is DeviceKind.CPU else detect_cuda()
    kept = kept_calibration(calibration_file(folder, device_name(devices, os.environ)))
    if kept is not None and (hardware.kind is DeviceKind.CPU or num_here(hardware, devices)):
        source = f"calibration of {kept.device}, {kept.measured[:10]}"
        return replace(kept.rates, source=source, is_calibrated=True)
    if hardware.kind is not DeviceKind.CPU:
        return published_rates(hardware)
    other = kept_calibration(REFERENCE)
    if other is None:
        return None
    source = f"those of another CPU: {other.device}, {other.measured[:10]}"
    return replace(other.rates, source=source, is_calibrated=False)
