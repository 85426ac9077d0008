"""Calibration: a microbenchmark of this machine's device. Started by `launch action=calibrate`.

It measures what a training step is made of: matrix products (large ones, and thin ones as of LoRA), attention, passes
over memory, the host's time per operation. Every time is the shortest of several calls in several rounds, which lie half
a minute apart: on a shared machine that is what repeats.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.models import enable_selective_activation_checkpointing

from launcher.documents import write_document
from launcher.rates import AttentionRate, Calibration, HostRate, MatrixRate, PassRate, Rates
from launcher.run_record import WORKER_MARK

LIBRARIES = ("torch", "transformers", "peft")
ROUNDS = 3
"""How often everything is measured; a slow moment of the machine spoils one round of some measures, not all of them."""
SECONDS_PER_MEASURE = 0.04
"""Time after which a measure of one round stops."""
HOST_STEPS = 8
"""Steps in each round whose host time is taken."""
CHECKPOINTING = ("none", "full", "selective")
"""The kinds of activation checkpointing between which the host's time per operation differs."""
SIDES = (512, 2048)
THIN = 16
COLD_BYTES = 1 << 27
"""Second operands are taken in turn from so many bytes, more than caches hold, and so many bytes of results are kept: a
pass over the layers uses each weight once, and finds it in memory, not in a cache."""
MOST_COPIES = 64
MOST_QUEUED = 50
QUEUEING_SECONDS = 2e-3
BUSY_CYCLES = 10_000_000
"""A GPU is kept busy so long while calls queue up: 5 ms and more, at the clock of no more than 2 GHz that they have."""
TOKENS_ON_CPU = (64, 256, 512)
TOKENS_ON_GPU = (256, 2048, 8192)
PASS_BYTES_ON_CPU = (1 << 16, 1 << 20, 1 << 23, 1 << 25, 1 << 27)
PASS_BYTES_ON_GPU = (1 << 20, 1 << 24, 1 << 28)
ROW = 1024
"""Elements per row where a kernel works on rows."""
FREE = ("empty", "new_empty", "detach", "lift_fresh", "alias", "_unsafe_view", "_local_scalar_dense")
"""Operations that the planner does not count either, besides views."""
Report = Callable[[str], None]
Measure = TypeVar("Measure", MatrixRate, AttentionRate, PassRate, HostRate)


class Results:
    """The last results of a call, `COLD_BYTES` of them: in a training step an operation writes where nothing was of late,
    and where caches hold nothing."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Any, int]] = deque()
        self._num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the next result takes the place of an old one; of calls that give nothing, at once."""
        return self._num_bytes >= COLD_BYTES or not self._num_bytes

    def add(self, result: Any) -> None:
        """Keeps a result, a tensor or several."""
        tensors = result if isinstance(result, tuple) else (result,)
        num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self._kept.append((result, num_bytes))
        self._num_bytes += num_bytes
        while self._num_bytes > COLD_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.popleft()[1]


class Bench:
    """Measures calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._call_seconds = 0.0
        if not self.on_gpu:
            small = torch.zeros(16, device=device)
            self._call_seconds = self.seconds(lambda: small + small)
        self._pools: dict[torch.dtype, torch.Tensor] = {}

    def seconds(self, call: Callable[[], Any]) -> float:
        """The shortest time of a call whose results are kept; on a CPU less what a call on next to nothing takes."""
        if self.on_gpu:
            return self._device_seconds(call)
        kept = Results()
        kept.add(call())
        ends = time.perf_counter() + SECONDS_PER_MEASURE / 2
        while not kept.is_full and time.perf_counter() < ends:
            kept.add(call())
        began = time.perf_counter()
        kept.add(call())
        repeats = max(1, min(200, int(2e-3 / max(time.perf_counter() - began, 1e-7))))
        shortest, ends = float("inf"), time.perf_counter() + SECONDS_PER_MEASURE
        while shortest == float("inf") or time.perf_counter() < ends:
            began = time.perf_counter()
            for _ in range(repeats):
                kept.add(call())
            shortest = min(shortest, (time.perf_counter() - began) / repeats)
        return max(shortest - self._call_seconds, 0.1 * shortest)

    def _device_seconds(self, call: Callable[[], Any]) -> float:
        """A GPU's own time: calls queue up behind work that keeps it busy, so that it waits for none of them.

        By the host's clock a small kernel takes as long as the host needs to launch it, ten times what it takes in a step
        where the device is behind (H200, 2026-11-27).
        """
        kept = Results()
        kept.add(call())
        self.wait()
        began = time.perf_counter()
        kept.add(call())
        queueing = time.perf_counter() - began
        repeats = max(1, min(MOST_QUEUED, int(QUEUEING_SECONDS / max(queueing, 1e-7))))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        shortest, ends = float("inf"), time.perf_counter() + SECONDS_PER_MEASURE
        while shortest == float("inf") or time.perf_counter() < ends:
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            for _ in range(repeats):
                kept.add(call())
            end.record()
            self.wait()
            shortest = min(shortest, start.elapsed_time(end) * 1e-3 / repeats)
        return shortest

    def operands(
        self, dtype: torch.dtype, rows: int, columns: int, layout: str, copies: int
    ) -> list[torch.Tensor]:
        """Matrices of random numbers that lie one behind the other in memory, shape (rows, columns)."""
        size = rows * columns
        pool = self._pools.get(dtype)
        if pool is None or len(pool) < size * copies:
            count = max(size * copies, COLD_BYTES // dtype.itemsize)
            pool = self._pools[dtype] = torch.randn(count, device=self.device).to(dtype)
        pieces = [pool[number * size : (number + 1) * size] for number in range(copies)]
        if layout == "t":
            return [piece.view(columns, rows).t() for piece in pieces]
        return [piece.view(rows, columns) for piece in pieces]

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()


class _Count(TorchDispatchMode):
    """Counts operations that launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        if not is_view and not func._schema.name.rpartition("::")[2].startswith(FREE):
            self.total += 1
        return func(*args, **(kwargs or {}))


def shapes(tokens: Sequence[int]) -> Iterator[tuple[int, int, int, str]]:
    """Rows, inner side, columns and layout of the measured products.

    Layers multiply by a transposed matrix (`nt`), gradients of inputs by the matrix itself (`nn`), gradients of
    weights have a transposed first operand (`tn`); each with square, wide and thin matrices.
    """
    wide = 4 * SIDES[-1]
    matrices = [*((a, b) for a in SIDES for b in SIDES), (SIDES[0], wide), (wide, SIDES[0])]
    matrices += [pair for side in SIDES for pair in ((side, THIN), (THIN, side))]
    for count in tokens:
        for inner, columns in matrices:
            yield count, inner, columns, "nt"
            yield count, inner, columns, "nn"
        for rows, columns in ((SIDES[0], SIDES[-1]), (SIDES[0], THIN), (THIN, SIDES[0]), (THIN, SIDES[-1])):
            yield rows, count, columns, "tn"


def measure_matrices(bench: Bench, dtype: torch.dtype, name: str) -> Iterator[MatrixRate]:
    """Products of every shape and layout."""
    for rows, inner, columns, layout in shapes(TOKENS_ON_GPU if bench.on_gpu else TOKENS_ON_CPU):
        (left,) = bench.operands(dtype, rows, inner, layout[0], 1)
        num_bytes = inner * columns * dtype.itemsize
        copies = max(1, min(MOST_COPIES, COLD_BYTES // num_bytes))
        rights = cycle(bench.operands(dtype, inner, columns, layout[1], copies))
        seconds = bench.seconds(lambda left=left, rights=rights: torch.mm(left, next(rights)))  # type: ignore[misc]
        yield MatrixRate(name, rows, inner, columns, layout, 2.0 * rows * inner * columns / seconds)


def measure_attention(bench: Bench, dtype: torch.dtype, name: str) -> Iterator[AttentionRate]:
    """Causal attention of a head size of 64 (CPU) or 128, forward and backward."""
    heads, size = (32, 128) if bench.on_gpu else (8, 64)
    for length in (512, 2048, 8192) if bench.on_gpu else (64, 256, 1024):
        query, key, value = (
            torch.randn(1, heads, length, size, device=bench.device).to(dtype).requires_grad_()
            for _ in range(3)
        )

        def forward(query: Any = query, key: Any = key, value: Any = value) -> Any:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        output = forward()
        gradient = torch.ones_like(output)

        def backward(
            output: Any = output, inputs: Any = (query, key, value), gradient: Any = gradient
        ) -> Any:
            return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

        product = 2.0 * heads * length * length * size / 2
        yield AttentionRate(
            name, length, 2 * product / bench.seconds(forward), 5 * product / bench.seconds(backward)
        )


def measure_passes(bench: Bench, dtype: torch.dtype, name: str) -> Iterator[PassRate]:
    """One kernel for each kind of pass over memory, at sizes inside and outside of caches."""
    device = bench.device
    for num_bytes in PASS_BYTES_ON_GPU if bench.on_gpu else PASS_BYTES_ON_CPU:
        elements = num_bytes // dtype.itemsize
        third, half, eighth = (elements // parts // ROW * ROW or ROW for parts in (3, 2, 8))
        left, right = (torch.randn(third, device=device).to(dtype) for _ in range(2))
        one = torch.randn(half, device=device).to(dtype)
        rows = one[: half // ROW * ROW].view(-1, ROW)
        whole = torch.randn(max(elements // ROW, 1), ROW, device=device).to(dtype)
        index = torch.randint(0, len(rows), (len(rows),), device=device)
        state = [torch.zeros(eighth, device=device).to(dtype) for _ in range(4)]
        step = torch.ones((), device=device)
        calls: list[tuple[str, int, Callable[[], Any]]] = [
            ("fill", elements, lambda n=elements: torch.zeros(n, dtype=dtype, device=device)),  # type: ignore[misc]
            ("copy", 2 * half, one.clone),
            ("light", 3 * third, lambda a=left, b=right: a + b),  # type: ignore[misc]
            ("heavy", 2 * half, lambda x=one: functional.silu(x)),  # type: ignore[misc]
            ("softmax", 2 * rows.numel(), lambda x=rows: functional.log_softmax(x, -1)),  # type: ignore[misc]
            ("reduce", whole.numel(), lambda x=whole: x.mean(-1)),  # type: ignore[misc]
            ("gather", 2 * rows.numel(), lambda x=rows, i=index: functional.embedding(i, x)),  # type: ignore[misc]
            ("optimizer", 7 * eighth, lambda s=state, t=step: _adamw(s, t)),  # type: ignore[misc]
        ]
        for kind, moved, call in calls:
            size = moved * dtype.itemsize
            yield PassRate(kind, name, size, size / bench.seconds(call))


def _adamw(state: list[torch.Tensor], step: torch.Tensor) -> None:
    parameter, gradient, first, second = state
    torch._fused_adamw_(
        [parameter], [gradient], [first], [second], [], [step],
        lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def measure_host(bench: Bench, checkpointing: str) -> HostRate:
    """The host's time per operation of a training step with adapters on next to no data."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    base = AutoModelForCausalLM.from_config(config)
    if checkpointing == "selective":
        enable_selective_activation_checkpointing(base)
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapters).to(bench.device)
    model.train()
    if checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.zeros((1, 4), dtype=torch.int64, device=bench.device)

    def forward() -> Any:
        return model(input_ids=tokens, labels=tokens).loss

    forward().backward()
    with _Count() as forwards:
        loss = forward()
    with _Count() as backwards:
        loss.backward()
    shortest = [float("inf"), float("inf")]
    for _ in range(HOST_STEPS):
        times = [time.perf_counter()]
        loss = forward()
        bench.wait()
        times.append(time.perf_counter())
        loss.backward()
        bench.wait()
        times.append(time.perf_counter())
        shortest = [min(pair) for pair in zip(shortest, (b - a for a, b in pairwise(times)), strict=True)]
    both = sum(shortest) / (forwards.total + backwards.total)
    return HostRate(checkpointing, shortest[0] / forwards.total, shortest[1] / backwards.total, both)


def measure_link(bench: Bench) -> float:
    """Bytes per second between pinned host memory and the device, the slower direction; 0 on a CPU."""
    if not bench.on_gpu:
        return 0.0
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=bench.device)
    slower = max(bench.seconds(lambda: there.copy_(host)), bench.seconds(lambda: host.copy_(there)))
    return float(host.numel() / slower)


def fastest(measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """Of several measures of the same thing the highest speeds, fields named `..per_second`, and the shortest times."""
    found: dict[tuple[Any, ...], Measure] = {}
    for measure in measures:
        facts: dict[str, Any] = asdict(measure)
        results: list[str] = [key for key in facts if key.endswith(("per_second", "_seconds"))]
        place = (type(measure), *((key, value) for key, value in facts.items() if key not in results))
        known = asdict(found.get(place, measure))
        best = {key: (max if key.endswith("per_second") else min)(facts[key], known[key]) for key in results}
        found[place] = replace(measure, **best)
    return tuple(found.values())


def measure(device: torch.device, report: Report) -> Rates:
    """All rates of a device."""
    bench = Bench(device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        dtypes["fp16"] = torch.float16
    host: list[HostRate] = []
    matrix: list[MatrixRate] = []
    attention: list[AttentionRate] = []
    passes: list[PassRate] = []
    for number in range(ROUNDS):
        host += [measure_host(bench, checkpointing) for checkpointing in CHECKPOINTING]
        for name, dtype in dtypes.items():
            matrix += measure_matrices(bench, dtype, name)
            attention += measure_attention(bench, dtype, name)
            passes += measure_passes(bench, dtype, name)
        report(f"round {number + 1} of {ROUNDS}")
    host_rates = fastest(host)
    rates = Rates(
        source="calibration of this device",
        is_calibrated=True,
        is_synchronous=device.type == "cpu",
        launch_seconds=next(rate.both_seconds for rate in host_rates if rate.checkpointing == "none"),
        host=host_rates,
        host_link_bytes_per_second=measure_link(bench),
        matrix=fastest(matrix),
        attention=fastest(attention),
        passes=fastest(passes),
    )
    for line in _highest(rates, tuple(dtypes)):
        report(line)
    return rates


def _highest(rates: Rates, dtypes: Sequence[str]) -> Iterator[str]:
    """What was found, in a few lines."""
    yield f"host time per operation  {rates.launch_seconds * 1e6:.1f} us"
    for name in dtypes:
        flops = max(item.flops_per_second for item in rates.matrix if item.dtype == name)
        yield f"matrix products, {name}    up to {flops / 1e9:,.1f} GFLOPS"
        light = [item for item in rates.passes if item.dtype == name and item.kind == "light"]
        largest = max(light, key=lambda item: item.num_bytes)
        yield f"passes over memory, {name} {largest.bytes_per_second / 1e9:,.1f} GB/s"


def _report(line: str) -> None:
    sys.stderr.write(WORKER_MARK + line + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str]) -> int:
    """Entry point: `python -m launcher.worker.calibrate <file> <name of the device>`."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    rates = measure(device, _report)
    versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    calibration = Calibration(argv[2], threads, versions, measured, time.perf_counter() - began, rates)
    write_document(Path(argv[1]), calibration)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
