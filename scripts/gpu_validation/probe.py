"""What the device takes before any training, and which kernels torch chooses on it; in a bare process.

python -m scripts.gpu_validation.probe <machine.json>
"""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pynvml
import torch
from torch.nn.attention import SDPBackend

from launcher.documents import write_document
from launcher.worker.cuda_meter import CudaMeter
from scripts.gpu_validation.results import Machine

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "triton",
    "flash_attn",
)


def library_versions() -> dict[str, str]:
    """Versions of what is installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def read_machine() -> Machine:
    """Reads the device; of a machine without one, the software."""
    versions = library_versions()
    if not torch.cuda.is_available():
        return Machine(platform.machine(), "", 0, versions)
    meter = CudaMeter()
    torch.cuda.init()
    initialised = meter.held_bytes()
    matrix = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
    (matrix @ matrix).sum().item()
    context = meter.held_bytes() - torch.cuda.memory_reserved()
    if "bitsandbytes" in versions:
        importlib.import_module("bitsandbytes")
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        device=properties.name,
        driver=_driver(),
        memory_bytes=properties.total_memory,
        versions=versions | {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())},
        context_bytes=context,
        initialised_bytes=initialised,
        with_bitsandbytes_bytes=meter.held_bytes() - torch.cuda.memory_reserved(),
        attention_kernels=_attention_kernels("cuda"),
    )


def _driver() -> str:
    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _attention_kernels(device: str) -> dict[str, str]:
    """Which kernel `scaled_dot_product_attention` takes, by case; the tracer has to take the same."""
    half = torch.bfloat16
    return {
        "causal, 128 wide": _attention_kernel(device, half, 128, 8, masked=False),
        "causal, 128 wide, 4 queries a key": _attention_kernel(device, half, 128, 2, masked=False),
        "masked, 128 wide": _attention_kernel(device, half, 128, 8, masked=True),
        "causal, 256 wide": _attention_kernel(device, half, 256, 8, masked=False),
        "causal, 128 wide, fp32": _attention_kernel(device, torch.float32, 128, 8, masked=False),
    }


def _attention_kernel(device: str, dtype: torch.dtype, width: int, key_heads: int, *, masked: bool) -> str:
    query, key, value = (
        torch.randn(1, heads, 512, width, dtype=dtype, device=device, requires_grad=True)
        for heads in (8, key_heads, key_heads)
    )
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool, device=device).tril() if masked else None
    try:
        number = torch._fused_sdp_choice(
            query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=key_heads < 8
        )
    except (RuntimeError, TypeError) as failure:  # a private function: its signature may change
        return f"unknown: {failure}"[:100]
    return SDPBackend(number).name


def main(argv: list[str]) -> None:
    """Entry point."""
    write_document(Path(argv[1]), read_machine())


if __name__ == "__main__":
    main(sys.argv)
