"""The hardware: what a device can hold and do. Facts come from `conf/hardware/`, each with its source there."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Gt, Le


class DeviceKind(StrEnum):
    """Family of the device; decides which kernels run and which meter measures."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    ROCM = "rocm"


@dataclass(frozen=True)
class MatrixFlops:
    """Dense matrix rates, floating-point operations per second; 0 where the hardware has none."""

    bf16: float = 0.0
    """bf16 inputs."""
    fp16: float = 0.0
    """fp16 inputs."""
    fp32: float = 0.0
    """fp32 inputs, without TF32."""
    tf32: float = 0.0
    """fp32 inputs rounded to TF32."""


CUDNN_FIRST = ("9", "10")
"""Generations on which torch takes cuDNN's attention first (`check_prefer_cudnn_attention`, torch 2.11 and later;
aten/native/transformers/cuda/sdp_utils.cpp): Hopper, and Blackwell of data centres."""


@dataclass(frozen=True)
class HardwareSpec:
    """One kind of device, and how many of it."""

    name: str = "auto"
    """Name of the file in conf/hardware."""
    kind: DeviceKind = DeviceKind.AUTO
    """`auto` reads this machine."""
    product: str = ""
    """The maker's name of the device."""
    memory_bytes: Annotated[int, Ge(0)] = 0
    """Usable bytes per device, as the driver reports them; 0: read this machine."""
    compute_capability: str = ""
    """CUDA compute capability or AMD architecture."""
    supports_bf16: bool = True
    """Whether bf16 matrix instructions exist."""
    supports_flash_attention: bool = False
    """Whether FlashAttention-2 kernels run."""
    matrix_flops: MatrixFlops = field(default_factory=MatrixFlops)
    """Dense matrix rates per second."""
    memory_bandwidth_bytes_per_second: Annotated[float, Ge(0)] = 0.0
    """Device memory bandwidth."""
    device_link_bytes_per_second: Annotated[float, Ge(0)] = 0.0
    """Between devices of one node, both directions together."""
    host_link_bytes_per_second: Annotated[float, Ge(0)] = 0.0
    """Between host and device, one direction."""
    network_bytes_per_second: Annotated[float, Ge(0)] = 0.0
    """Between nodes, per device, one direction."""
    host_memory_bytes: Annotated[int, Ge(0)] = 0
    """Host memory per device; 0: unknown."""
    nvme_path: str = ""
    """Folder on a local NVMe file system of every node, for `planner.pin.offload_device=nvme`; empty: none."""
    nvme_bytes: Annotated[int, Ge(0)] = 0
    """Bytes free there per device; 0: unknown, and a plan may take any number of them."""
    nvme_bytes_per_second: Annotated[float, Ge(0)] = 0.0
    """Between NVMe and host memory, per device, one direction, the slower of the two; 0: unknown, and a plan that swaps
    there has no step time."""
    num_devices: Annotated[int, Ge(1)] = 1
    """Devices per node."""
    num_nodes: Annotated[int, Ge(1)] = 1
    """Nodes."""
    context_bytes: Annotated[int, Ge(0)] = 0
    """What the runtime takes before the first tensor."""
    blas_workspace_bytes: Annotated[int, Ge(0)] = 0
    """One matrix-library workspace; a training process holds two, for the forward and the backward thread."""
    matrix_efficiency: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of `matrix_flops` that large matrix products reach; 0: unknown, and no step time is predicted."""
    attention_efficiency: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of `matrix_flops` that attention reaches, forward and backward together."""
    bandwidth_efficiency: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the memory bandwidth that passes over large tensors reach."""
    launch_seconds: Annotated[float, Ge(0)] = 0.0
    """Host time per operation of an eager training step."""
    multiprocessors: Annotated[int, Ge(0)] = 0
    """Streaming multiprocessors (compute units); 0: unknown."""
    price_per_hour: Annotated[float, Gt(0)] | None = None
    """US dollars per device and hour, yours to set; needed by `planner.objective=cost`."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each fact was published, by field name."""

    @property
    def world_size(self) -> int:
        """Devices over all nodes."""
        return self.num_devices * self.num_nodes

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether torch takes cuDNN's attention before its flash kernel."""
        return self.kind is DeviceKind.CUDA and self.compute_capability.partition(".")[0] in CUDNN_FIRST
