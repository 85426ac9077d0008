"""Calibration: which rates a plan gets, and a real (very short) measurement that comes back whole."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.documents import read_document, write_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind, HardwareSpec, MatrixFlops
from launcher.rates import AttentionRate, Calibration, HostRate, MatrixRate, PassRate, Rates, host_seconds
from launcher.run import calibrate
from launcher.run.calibrate import REFERENCE, calibration_file, device_name, device_rates, kept_calibration
from launcher.run.detect import DetectedDevice

KEPT = Calibration(
    device="a CPU, 2 threads",
    threads=2,
    versions={"torch": "2.13"},
    measured="2026-11-25T10:00:00+00:00",
    seconds=60.0,
    rates=Rates("", True, True, 1e-5, passes=(PassRate("light", "fp32", 1024, 1e9),)),
)
CARD = HardwareSpec(
    name="a100_40g",
    kind=DeviceKind.CUDA,
    product="NVIDIA A100-SXM4-40GB",
    matrix_flops=MatrixFlops(bf16=312e12),
    memory_bandwidth_bytes_per_second=1.5e12,
    matrix_efficiency=0.8,
    bandwidth_efficiency=0.8,
    attention_efficiency=0.5,
    launch_seconds=1e-5,
)
CPU = HardwareSpec(name="cpu", kind=DeviceKind.CPU)
CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\ncpu family\t: 25\nmodel\t\t: 1\n\nprocessor\t: 1\n"


def test_a_cpu_is_named_with_its_threads(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(CPUINFO)
    name = device_name((), {"OMP_NUM_THREADS": "3"}, tmp_path)
    assert name == "Some CPU @ 2 GHz, family 25 model 1, 3 threads"
    assert device_name((), {}, tmp_path) != device_name((), {"OMP_NUM_THREADS": "333"}, tmp_path)
    assert device_name((DetectedDevice("NVIDIA L4", 1),), {}, tmp_path) == "NVIDIA L4"
    assert calibration_file(tmp_path, name).name == "some-cpu-2-ghz-family-25-model-1-3-threads.json"


def test_an_own_calibration_comes_first_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "detect_cuda", lambda: ())
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = device_rates(CPU, tmp_path)
    assert before is not None and not before.is_calibrated
    assert "another CPU" in before.source
    write_document(calibration_file(tmp_path, device_name((), {})), KEPT)
    rates = device_rates(CPU, tmp_path)
    assert rates == replace(KEPT.rates, source="calibration of a CPU, 2 threads, 2026-11-25")
    facts = device_rates(CARD, tmp_path)  # planned for, and not here
    assert facts is not None and not facts.is_calibrated and facts.source == "published facts of a100_40g"


def test_a_card_takes_the_calibration_of_its_product_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = (DetectedDevice("NVIDIA A100-SXM4-40GB", 42_285_268_992),)
    monkeypatch.setattr(calibrate, "detect_cuda", lambda: here)
    write_document(calibration_file(tmp_path, device_name(here, {})), KEPT)
    rates = device_rates(CARD, tmp_path)
    assert rates is not None and rates.is_calibrated
    other = device_rates(replace(CARD, name="h100_80g", product="NVIDIA H100 80GB HBM3"), tmp_path)
    assert other is not None and not other.is_calibrated
    cpu = device_rates(CPU, tmp_path)
    assert cpu is not None and not cpu.is_calibrated
    assert device_rates(HardwareSpec(kind=DeviceKind.CUDA, product="unheard of"), tmp_path) is None


def test_what_another_version_wrote_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert kept_calibration(file) is None
    file.write_text(json.dumps({"device": "x"}))
    assert kept_calibration(file) is None


def test_the_reference_is_a_calibration() -> None:
    reference = read_document(REFERENCE, Calibration)
    assert reference.rates.is_synchronous
    assert {item.dtype for item in reference.rates.matrix} == {"fp32", "bf16"}
    assert reference.measured > "2026"


def test_a_calibration_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "detect_cuda", lambda: ())
    monkeypatch.setattr(calibrate, "WORKER", "launcher.worker.nothing")
    with pytest.raises(LaunchError, match="exit code 1"):
        calibrate.calibrate(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_of_several_rounds_counts() -> None:
    """Each speed by itself, and nothing else is mixed."""
    from launcher.worker.calibrate import fastest

    forward, backward = AttentionRate("fp32", 64, 5.0, 1.0), AttentionRate("fp32", 64, 4.0, 2.0)
    other = AttentionRate("fp32", 128, 1.0, 1.0)
    assert fastest([forward, other, backward]) == (AttentionRate("fp32", 64, 5.0, 2.0), other)
    assert fastest([HostRate("none", 3.0, 1.0, 2.0), HostRate("none", 2.0, 4.0, 1.0)]) == (
        HostRate("none", 2.0, 1.0, 1.0),
    )
    assert fastest([MatrixRate("fp32", 1, 2, 3, "nt", 7.0), MatrixRate("fp32", 1, 2, 3, "nn", 9.0)]) == (
        MatrixRate("fp32", 1, 2, 3, "nt", 7.0),
        MatrixRate("fp32", 1, 2, 3, "nn", 9.0),
    )


def test_a_measure_writes_where_no_cache_holds_anything() -> None:
    """As many results are kept as are more than caches hold, so that no later one takes the place of a recent one."""
    import torch

    from launcher.worker.calibrate import COLD_BYTES, Bench

    places: list[int] = []

    def call() -> torch.Tensor:
        result = torch.empty(1 << 20)
        places.append(result.data_ptr())
        return result

    Bench(torch.device("cpu")).seconds(call)
    apart = COLD_BYTES // (4 << 20)
    assert len(places) > 2 * apart
    for begin in range(len(places) - apart):
        assert len(set(places[begin : begin + apart])) == apart


def test_a_call_that_works_in_place_is_measured_too() -> None:
    import torch

    from launcher.worker.calibrate import Bench

    numbers = torch.zeros(1 << 10)

    def call() -> None:
        numbers.add_(1.0)

    assert Bench(torch.device("cpu")).seconds(call) > 0.0
    assert numbers[0] > 100


def test_a_gpus_own_time_counts_and_not_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda is stood in for: by a device whose calls take 3 us each, whatever the host takes to launch them."""
    import torch

    from launcher.worker.calibrate import MOST_QUEUED, Bench

    launched, log = [0], list[str]()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.after = 0

        def record(self) -> None:
            self.after = launched[0]
            log.append("record")

        def elapsed_time(self, end: Any) -> float:
            return 0.003 * float(end.after - self.after)  # milliseconds

    def call() -> torch.Tensor:
        launched[0] += 1
        return torch.empty(4)

    card = SimpleNamespace(
        Event=Event, _sleep=lambda cycles: log.append("busy"), synchronize=lambda: log.append("wait")
    )
    monkeypatch.setattr(torch, "cuda", card)
    assert Bench(torch.device("cuda")).seconds(call) == pytest.approx(3e-6)
    first = log.index("busy")
    assert log[first : first + 4] == ["busy", "record", "record", "wait"]
    assert launched[0] >= 2 + MOST_QUEUED


def test_a_real_measurement_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from launcher.worker import calibrate as worker

    for name, value in (
        ("SECONDS_PER_MEASURE", 1e-4),
        ("SIDES", (16, 32)),
        ("TOKENS_ON_CPU", (8,)),
        ("PASS_BYTES_ON_CPU", (1 << 14, 1 << 15)),
    ):
        monkeypatch.setattr(worker, name, value)
    lines: list[str] = []
    monkeypatch.setattr(worker, "_report", lines.append)
    assert worker.main(["", str(tmp_path / "kept.json"), "this CPU"]) == 0
    kept = read_document(tmp_path / "kept.json", Calibration)
    assert (kept.device, kept.threads) == ("this CPU", torch.get_num_threads())
    assert 1e-7 < kept.rates.launch_seconds < 1e-2
    hosts = {rate.checkpointing: rate for rate in kept.rates.host}
    assert hosts["none"].both_seconds == kept.rates.launch_seconds
    assert set(hosts) == {"none", "full", "selective"}
    for mode, rate in hosts.items():
        assert host_seconds(kept.rates, mode) == (rate.forward_seconds, rate.backward_seconds)
    assert all(item.flops_per_second > 1e5 for item in kept.rates.matrix)
    assert {item.layout for item in kept.rates.matrix} == {"nt", "nn", "tn"}
    assert {item.kind for item in kept.rates.passes} >= {"light", "heavy", "copy", "softmax", "optimizer"}
    assert len(lines) >= 5
    assert "torch" in sys.modules
