"""How fast a device works: rates by kind of operation, from the facts of its file or measured on the device itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.hardware import DeviceKind, HardwareSpec


@dataclass(frozen=True)
class MatrixRate:
    """A measured matrix product."""

    dtype: str
    """`fp32`, `bf16` or `fp16`."""
    rows: int
    """Rows of the first operand."""
    inner: int
    """Columns of the first operand, rows of the second."""
    columns: int
    """Columns of the second operand."""
    layout: str
    """How the operands lie in memory: `n` row by row, `t` transposed."""
    flops_per_second: float
    """2 x rows x inner x columns over the time of a call."""


@dataclass(frozen=True)
class AttentionRate:
    """A measured attention, with a causal mask."""

    dtype: str
    """Dtype of queries."""
    length: int
    """Queries, and keys, per head."""
    forward_flops_per_second: float
    """Two products, halved by the mask, over the time of the forward pass."""
    backward_flops_per_second: float
    """Five products, halved by the mask, over the time of the backward pass."""


@dataclass(frozen=True)
class PassRate:
    """A measured pass over the elements of a tensor."""

    kind: str
    """Kind of work, as the planner names it."""
    dtype: str
    """Dtype of the elements."""
    num_bytes: int
    """Bytes read and written by a call."""
    bytes_per_second: float
    """The bytes over the time of a call."""


@dataclass(frozen=True)
class HostRate:
    """Measured time of the host per operation."""

    checkpointing: str
    """Activation checkpointing, by its name in a plan."""
    forward_seconds: float
    """Per operation of a forward pass: Python runs it."""
    backward_seconds: float
    """Per operation of a backward pass: autograd's engine runs it, and Python what is recomputed."""
    both_seconds: float
    """Per operation of both."""


HOST_SHARES: Mapping[str, tuple[float, float]] = {
    "none": (1.47, 0.72),
    "full": (2.5, 1.7),
    "offload": (2.5, 1.7),
    "selective": (6.3, 2.7),
}
"""The host's time per operation of forward and backward passes in units of `launch_seconds`, by activation checkpointing:
saved tensors pass through hooks, and selective checkpointing asks Python at every operation. Measured by
`launcher.worker.calibrate.measure_host` on an EPYC CPU, torch 2.13, 2026-11-26; `offload` is taken as `full`."""


@dataclass(frozen=True)
class Rates:
    """What a device does per second."""

    source: str
    """Where the rates come from, for people."""
    is_calibrated: bool
    """Whether they were measured on the device itself."""
    is_synchronous: bool
    """True: an operation begins when the one before has ended (CPU). False: operations are queued (GPU)."""
    launch_seconds: float
    """Time of the host per operation, forward and backward, without checkpointing: Python, autograd, dispatch, launch."""
    host: tuple[HostRate, ...] = ()
    """Measured times of the host; they come before `HOST_SHARES`."""
    matrix_flops: Mapping[str, float] = field(default_factory=dict)
    """Rate of large matrix products by dtype; measured ones come before it."""
    multiprocessors: int = 0
    """Units that work on one tile of a product each; 0: unknown."""
    attention_efficiency: float = 1.0
    """Share of the matrix rate that attention reaches."""
    bytes_per_second: float = 0.0
    """Rate of passes over memory; measured ones come before it."""
    host_link_bytes_per_second: float = 0.0
    """Between host and device, one direction; 0: unknown."""
    matrix: tuple[MatrixRate, ...] = ()
    """Measured products."""
    attention: tuple[AttentionRate, ...] = ()
    """Measured attention."""
    passes: tuple[PassRate, ...] = ()
    """Measured passes."""


def host_seconds(rates: Rates, checkpointing: str) -> tuple[float, float]:
    """The host's time per operation of a forward and of a backward pass.

    Args:
        rates: The device's rates.
        checkpointing: Activation checkpointing, by its name in a plan.
    """
    for rate in rates.host:
        if rate.checkpointing == checkpointing:
            return rate.forward_seconds, rate.backward_seconds
    forward, backward = HOST_SHARES[checkpointing]
    return rates.launch_seconds * forward, rates.launch_seconds * backward


@dataclass(frozen=True)
class Calibration:
    """Rates measured on one device, and for what they hold."""

    device: str
    """The maker's name of the device."""
    threads: int
    """Threads of a matrix product; 0 on a GPU."""
    versions: Mapping[str, str]
    """Libraries that ran."""
    measured: str
    """When, ISO 8601."""
    seconds: float
    """How long it took."""
    rates: Rates
    """What was measured."""


def published_rates(hardware: HardwareSpec) -> Rates | None:
    """The rates that follow from the facts of a device's file; None where a fact is missing."""
    facts = hardware.matrix_flops
    known = {name: getattr(facts, name) for name in ("bf16", "fp16", "fp32") if getattr(facts, name)}
    needed = (hardware.matrix_efficiency, hardware.bandwidth_efficiency, hardware.launch_seconds)
    bandwidth = hardware.memory_bandwidth_bytes_per_second * hardware.bandwidth_efficiency
    if hardware.kind is DeviceKind.CPU or not known or not all(needed) or not bandwidth:
        return None
    return Rates(
        source=f"published facts of {hardware.name}",
        is_calibrated=False,
        is_synchronous=False,
        launch_seconds=hardware.launch_seconds,
        matrix_flops={name: rate * hardware.matrix_efficiency for name, rate in known.items()},
        multiprocessors=hardware.multiprocessors,
        attention_efficiency=hardware.attention_efficiency / hardware.matrix_efficiency,
        bytes_per_second=bandwidth,
        host_link_bytes_per_second=hardware.host_link_bytes_per_second,
    )
