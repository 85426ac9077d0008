"""Optimizer states on NVMe: what a plan says of it, what is refused, and real ranks that swap."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load_job
from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError, LaunchError
from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Checkpointing, Engine, JobSpec, Method, OffloadDevice, Optimizer
from launcher.memory import MemoryEstimate, Phase, PhasePeak
from launcher.nvme import NvmeEstimate
from launcher.plan import Plan
from launcher.planner.communication import lacks_drive_rate, with_drive
from launcher.planner.depth import DepthMismatch, extended_swapping
from launcher.planner.forecast import Forecaster
from launcher.planner.relief import smallest_change
from launcher.planner.swapping import Swapping
from launcher.planner.trace_cache import TraceCache
from launcher.planner.tracer import Tracer
from launcher.planning import plan_job, resolve
from launcher.report.documents import plan_document
from launcher.report.tables import plan_text
from launcher.run import node, swap
from launcher.run.launch import prepare_run
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from launcher.step_time import StepTime
from scripts.accuracy_ranks import WITHIN, RankJob, compare, job_of, swapping_plan, write_model
from tests.tiny_job import tiny_order

NVME = {"offload_optimizer": True, "offload_device": OffloadDevice.NVME}
MIB = 1 << 20
DRIVE = HardwareSpec(name="a100_40g", kind=DeviceKind.CUDA, num_devices=2, nvme_path="/drive")


def swapping(*groups: int, files: tuple[int, ...] = ()) -> Swapping:
    """What DeepSpeed would do with groups of these sizes, each with one file but for what is given."""
    largest = -(-max(groups) // 1024) * 1024
    kept = tuple(-(-size // 1024) * 1024 for size in groups if size >= MIB)
    return Swapping(groups, 64 * MIB, MIB, (largest,) * 4, (*kept, *files))


def test_groups_of_a_layer_are_extended_layer_by_layer() -> None:
    """An embedding, three or four layers, and norms too small to be swapped."""
    low = swapping(4 * MIB, *3 * [2 * MIB], 3000)
    high = swapping(4 * MIB, *4 * [2 * MIB], 4000)
    whole = extended_swapping(low, high, 9.0)
    assert whole is not None and sorted(whole.groups_bytes) == sorted([4 * MIB, *12 * [2 * MIB], 12_000])
    assert whole.locked_bytes == 4 * (4 * MIB,) and sum(whole.files_bytes) == 28 * MIB


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (swapping(4 * MIB, MIB // 8), swapping(4 * MIB, MIB // 4), "from which on it is swapped"),
        (swapping(4 * MIB, MIB), swapping(4 * MIB, 2 * MIB), "buffers of 10485760 bytes do not grow"),
        (swapping(MIB + 600), swapping(2 * MIB + 1200), "do not grow"),
        (swapping(9 * MIB), swapping(18 * MIB), "at which it is closed"),
        (swapping(MIB, MIB // 2), swapping(MIB, MIB + MIB // 2), "1 and 2 pinned blocks"),
    ],
)
def test_what_is_not_linear_in_depth_is_not_extended(low: Swapping, high: Swapping, words: str) -> None:
    """Every layer is traced then: a group that grows to 1 MiB, beyond the largest, or by halves of a block."""
    with pytest.raises(DepthMismatch, match=words):
        extended_swapping(low, high, 9.0)


@pytest.mark.parametrize("kind", [DeviceKind.CUDA, pytest.param(DeviceKind.CPU, marks=pytest.mark.thorough)])
def test_few_layers_tell_of_all(kind: DeviceKind) -> None:
    """The files are all states, and gradients from 1 MiB on; the host has buffers for the largest group."""
    plan = swapping_plan(Method.FULL, num_devices=2)
    on_host = replace(plan, offload_device=OffloadDevice.CPU)
    job = job_of(plan, Path("nowhere"))
    job = replace(job, hardware=replace(job.hardware, kind=kind, memory_bytes=40 << 30))
    with Tracer(("deepspeed",)) as tracer:
        forecaster = Forecaster(job, tracer, TraceCache(None))
        found, kept = forecaster.estimate(plan, exact=True), forecaster.estimate(on_host, exact=True)
    assert found.nvme is not None and found.host is not None and kept.host is not None and kept.nvme is None
    hidden, inner, words, layers = 256, 688, 4096, 6
    matrices = layers * (2 * hidden * hidden + hidden * hidden + 3 * hidden * inner) + 2 * words * hidden
    half = 4 * matrices // 2
    gradients = 2 * 4 * words * hidden // 2  # of embedding and head; all others have less than 1 MiB
    assert found.nvme.file_bytes == 3 * half + gradients
    assert found.nvme.locked_bytes == 4 * 4 * words * hidden // 2
    assert found.host.pinned_bytes >= found.nvme.locked_bytes
    # states and their gradients leave the host, and buffers come
    less = kept.host.peak_bytes - found.host.peak_bytes
    if kind is DeviceKind.CPU:
        assert less == 4 * half - found.nvme.locked_bytes
    else:
        assert less > 3 * half - found.nvme.locked_bytes
        assert found.peak_allocated_bytes <= 1.01 * kept.peak_allocated_bytes


@pytest.mark.thorough
def test_a_drive_that_is_too_small_is_refused_by_how_much() -> None:
    words = (
        "recipe=smollm_lora",
        "method.name=full",
        "hardware=a100_40g",
        "hardware.nvme_path=/drive",
        "data.max_length=256",
        "training.global_batch_size=4",
        "model.architecture.vocab_size=2000",
        "planner.pin.offload_optimizer=true",
        "planner.pin.offload_parameters=false",
        "planner.pin.overlap_exchange=true",
        "planner.pin.offload_device=nvme",
        "planner.pin.micro_batch_size=2",
        "planner.pin.activation_checkpointing=full",
        "planner.pin.loss=chunked",
    )
    with Tracer(("deepspeed",)) as tracer:
        job = resolve(load_job(words), ())
        taken = plan_job(job, tracer)
        assert (
            taken.plan is not None and taken.plan.swaps and taken.plan.zero_stage == 3 and taken.step is None
        )
        assert taken.estimate is not None and taken.estimate.nvme is not None
        size = taken.estimate.nvme.file_bytes
        text = plan_text(job, taken, 0.0)
        assert "nvme      " in text and "hardware.nvme_bytes_per_second" in text and "on NVMe" in text
        assert plan_document(taken, {}, 0.0, "")["predicted"]["nvme_bytes"] == size
        small = resolve(load_job([*words, f"hardware.nvme_bytes={size - 4096}"]), ())
        refused = plan_job(small, tracer)
        assert refused.plan is None and refused.nearest is not None
        change = smallest_change(small, refused, Forecaster(small, tracer, TraceCache(None)))
        fast = resolve(load_job([*words, "hardware.nvme_bytes_per_second=2e9"]), ())
        timed = plan_job(fast, tracer)
    assert refused.nearest.is_nvme_short
    assert refused.nearest.short_by_bytes == 4096
    assert "4.00 KiB more than there is" in refused.nearest.reason
    assert "hardware.nvme_bytes" in change
    assert timed.step is not None and timed.step.communication_seconds >= 2 * size / 2e9


def test_a_step_waits_for_the_drive() -> None:
    step = StepTime(1.0, 0.0, 0.1, 1, 100, "", False)
    fast = HardwareSpec(nvme_bytes_per_second=1e9)
    assert with_drive(step, fast, 3 * 10**9).communication_seconds == pytest.approx(3.0)
    assert with_drive(step, HardwareSpec(), 3 * 10**9) == step == with_drive(step, fast, 0)
    job = JobSpec()
    pinned = replace(job, planner=replace(job.planner, pin=replace(job.planner.pin, **NVME)))  # type: ignore[arg-type]
    assert lacks_drive_rate(pinned) and not lacks_drive_rate(job)
    assert not lacks_drive_rate(replace(pinned, hardware=fast))


@pytest.mark.parametrize(
    ("stage", "changes", "save_steps", "words"),
    [
        (2, {}, None, "takes nvme for host memory"),
        (3, {"optimizer": Optimizer.SGD}, None, "never tried"),
        (3, {"method": Method.QLORA, "rank": 8}, None, "quantised weights"),
        (3, {}, 5, "AdamW's two states at zero"),
        (3, {"activation_checkpointing": Checkpointing.FULL}, None, ""),
    ],
)
def test_what_deepspeed_can_not_do_with_nvme_is_refused(
    stage: int, changes: dict[str, Any], save_steps: int | None, words: str, tmp_path: Path
) -> None:
    order = tiny_order(tmp_path, Engine.DEEPSPEED, stage)
    job = replace(order.job, hardware=replace(order.job.hardware, nvme_path="/drive"))
    job = replace(job, training=replace(job.training, save_steps=save_steps))
    reasons = engine_limits(
        job, replace(order.plan, **{**NVME, "optimizer": Optimizer.ADAMW_TORCH, **changes})
    )
    assert words in "; ".join(reasons) if words else reasons == ()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["planner.pin.offload_parameters=true", "hardware.nvme_path=/drive"], "is for optimizer states"),
        (["planner.pin.offload_optimizer=true"], "absolute path"),
        (["planner.pin.offload_optimizer=true", "hardware.nvme_path=drive"], "absolute path"),
    ],
)
def test_what_a_job_must_say_beside_nvme(words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(
            load_job(["recipe=llama_full", "hardware=a100_40g", "planner.pin.offload_device=nvme", *words]),
            (),
        )


def test_two_runs_on_one_drive_share_no_file(tmp_path: Path) -> None:
    """Nor do a run and its rehearsal; what a run left is removed, and nothing of another."""
    plan = swapping_plan(Method.FULL, num_devices=2)
    job = job_of(plan, tmp_path)
    job = replace(
        job,
        hardware=replace(job.hardware, nvme_path=str(tmp_path)),
        launch=replace(job.launch, rehearse=True),
    )
    predicted = MemoryEstimate((PhasePeak(Phase.LOAD, 0, {}),), {}, 0)
    runs = [RunPaths(tmp_path / name) for name in ("one", "two")]
    folders = []
    for paths in runs:
        prepare_run(paths, WorkerOrder(job, plan, predicted, job.model.path, ""), {})
        for part in (paths, paths.rehearsal):
            offload = json.loads(part.deepspeed_config.read_text())["zero_optimization"]["offload_optimizer"]
            assert Path(offload["nvme_path"]) == swap.swap_folder(job.hardware, part, socket.gethostname())
            folders.append(Path(offload["nvme_path"]))
    assert len(set(folders)) == 4 and all(folder.parent == tmp_path for folder in folders)
    assert folders[0] != swap.swap_folder(job.hardware, runs[0], "another host with a folder of that name")
    for folder in folders:
        (folder / "zero_stage_3").mkdir(parents=True)
    two_machines = replace(plan, num_nodes=2)
    swap.remove_swapped(replace(plan, offload_device=OffloadDevice.CPU), runs[0], range(2))
    for folder in folders:
        for rank in range(4):
            (folder / "zero_stage_3" / "optimizer" / f"rank{rank}").mkdir(parents=True)
    swap.remove_swapped(two_machines, runs[0], range(2))
    assert sorted(part.name for part in folders[0].rglob("rank*")) == ["rank2", "rank3"], "of another machine"
    assert [len(list(folder.rglob("rank*"))) for folder in folders[1:]] == [4, 4, 4]
    swap.remove_swapped(two_machines, runs[0], range(2, 4))
    swap.remove_swapped(plan, runs[1], range(2))
    assert [folder.exists() for folder in folders] == [False, True, False, True]


def test_a_run_does_not_start_without_its_drive(tmp_path: Path) -> None:
    plan, drive = swapping_plan(Method.FULL, num_devices=2), replace(DRIVE, nvme_path=str(tmp_path / "drive"))
    with pytest.raises(LaunchError, match="no folder on this machine"):
        swap.require_drive(plan, drive, None)
    (tmp_path / "drive").mkdir()
    free = shutil.disk_usage(tmp_path).free
    swap.require_drive(plan, drive, NvmeEstimate(free // 4, 0))
    with pytest.raises(LaunchError, match=rf"2 ranks swap {2 * free} bytes .* has \d+ bytes"):
        swap.require_drive(plan, drive, NvmeEstimate(free, 0))
    swap.require_drive(replace(plan, offload_device=OffloadDevice.CPU), replace(drive, nvme_path=""), None)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("raise SystemExit('no libaio.h')", "compiled or loaded here: no libaio.h"),
        ("raise SystemExit(3)", "ulimit -l"),
        ("import os; os.abort()", "ulimit -l"),
    ],
)
def test_a_run_does_not_start_where_nothing_can_be_swapped(
    probe: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = swapping_plan(Method.FULL, num_devices=2)
    monkeypatch.setattr(swap, "PROBE", probe)
    swap._probe.cache_clear()
    with pytest.raises(LaunchError, match=words):
        swap.require_swapping(plan, NvmeEstimate(1, 4096), {})
    swap.require_swapping(replace(plan, offload_device=OffloadDevice.CPU), None, {})
    swap._probe.cache_clear()


@pytest.mark.thorough
@pytest.mark.parametrize(("num_devices", "method"), [(1, Method.FULL), (2, Method.FULL), (1, Method.LORA)])
def test_each_rank_takes_what_was_predicted_and_learns_the_same(
    num_devices: int, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real files, through libaio, for which DeepSpeed compiles at its first use: minutes."""
    if shutil.which("c++") is None or not Path("/usr/include/libaio.h").exists():
        pytest.skip("no C++ compiler, or no headers of libaio")
    written: list[int] = []

    def weigh_and_remove(plan: Plan, paths: RunPaths, ranks: range) -> None:
        files = (file for file in tmp_path.glob("swap-*/**/*") if file.is_file() and plan.swaps)
        written.append(sum(file.stat().st_size for file in files))
        swap.remove_swapped(plan, paths, ranks)

    monkeypatch.setattr(node, "remove_swapped", weigh_and_remove)
    write_model(tmp_path)
    plan = swapping_plan(method, num_devices)
    result = compare(RankJob("job", plan), tmp_path)
    for phase in ("train_step", "optimizer_step", "save"):
        found = result["phases"][phase]
        assert max(found["measured_bytes"]) == pytest.approx(found["predicted_bytes"], rel=WITHIN), result
    assert all(abs(error) <= WITHIN for error in result["errors"]), result
    assert [size for size in written if size] == [num_devices * result["nvme_bytes"]], result
    assert not list(tmp_path.glob("swap-*"))
    on_host = compare(RankJob("job", replace(plan, offload_device=OffloadDevice.CPU)), tmp_path)
    assert result["last_loss"] == pytest.approx(on_host["last_loss"], abs=1e-3)
    if num_devices > 1:
        on_device = replace(plan, offload_optimizer=False, offload_device=OffloadDevice.CPU)
        kept = compare(RankJob("job", on_device), tmp_path)
        assert result["last_loss"] == pytest.approx(kept["last_loss"], abs=1e-3)
