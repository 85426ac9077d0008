"""What is rendered is what was agreed on (tests/golden), and what accelerate, the shell and torch understand.

To accept new text: LAUNCHER_ACCEPT_GOLDEN=1 pytest tests/test_render.py, then read the difference in git.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.hardware import DeviceKind, HardwareSpec
from launcher.job import Attention, Checkpointing, Loss, Method, Optimizer, Precision
from launcher.plan import Plan
from launcher.run import render
from launcher.run_paths import RunPaths

GOLDEN = Path(__file__).parent / "golden"
ACCEPT = "LAUNCHER_ACCEPT_GOLDEN"
IS_ACCEPTED = bool(os.environ.get(ACCEPT))
"""Read now: the tests run in a clean environment."""
CPU = HardwareSpec(name="cpu", kind=DeviceKind.CPU)
CUDA = HardwareSpec(name="l4_24g", kind=DeviceKind.CUDA)
ROCM = HardwareSpec(name="mi300x_192g", kind=DeviceKind.ROCM)
ONE = Plan(
    method=Method.LORA,
    rank=16,
    max_length=512,
    micro_batch_size=2,
    gradient_accumulation_steps=4,
    activation_checkpointing=Checkpointing.FULL,
    attention=Attention.SDPA,
    loss=Loss.CHUNKED,
    optimizer=Optimizer.ADAMW_TORCH_FUSED,
    precision=Precision.BF16,
)
NASTY = 'it\'s a "run"\n$HOME `x` \\ ünï-日本 --flag'


RUN = RunPaths(Path("/home/me/my runs/1"))


def assert_golden(name: str, text: str) -> None:
    """Compares a text with a golden file; accepts it instead when the environment says so."""
    file = GOLDEN / name
    if IS_ACCEPTED:
        file.write_text(text, encoding="utf-8")
    agreed = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = difflib.unified_diff(agreed.splitlines(), text.splitlines(), "agreed", "rendered", lineterm="")
    difference = "\n".join(lines)
    assert text == agreed, f"golden/{name}:\n{difference}\n\nto accept: {ACCEPT}=1 pytest tests/"


def test_golden_accelerate_configs() -> None:
    assert_golden("accelerate_cpu.yaml", render.accelerate_config(CPU, ONE, RUN))
    assert_golden("accelerate_cuda.yaml", render.accelerate_config(CUDA, ONE, RUN))


def test_golden_command_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "package_root", lambda: "/home/me/launcher")
    command = render.worker_command(RUN, ONE, python="/usr/bin/python3")
    environment = render.worker_environment(CUDA, {})
    assert_golden("command_cuda.sh", render.command_script(command, environment, "/home/me"))
    environment = render.worker_environment(CPU, {"OMP_NUM_THREADS": "2"})
    assert_golden("command_cpu.sh", render.command_script(command, environment, "/home/me"))


# ------------------------------------------------------------------------------------------------- accelerate


def what_accelerate_makes_of_it(
    hardware: HardwareSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[argparse.Namespace, list[str], Mapping[str, str]]:
    """Arguments, command and environment that `accelerate launch` starts the worker with."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    paths = RunPaths(folder)
    folder.mkdir()
    paths.accelerate_config.write_text(render.accelerate_config(hardware, ONE, RUN), encoding="utf-8")
    for name, value in render.worker_environment(hardware, {}).items():
        monkeypatch.setenv(name, value)
    _, _, _, *rest = render.worker_command(paths, ONE)
    parser: Any = launch.launch_command_parser()
    checked: Any = launch._validate_launch_command
    arguments, _, _ = checked(parser.parse_args(rest))
    prepare: Any = prepare_simple_launcher_cmd_env
    command, environment = prepare(arguments)
    return arguments, command, environment


@pytest.mark.parametrize("hardware", [CPU, CUDA])
def test_accelerates_own_parser_takes_the_file(hardware: HardwareSpec, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load: Any = load_config_from_file
    file = tmp_path / "accelerate.yaml"
    file.write_text(render.accelerate_config(hardware, ONE, RUN), encoding="utf-8")
    config = load(str(file))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == (1, 1, "NO")
    assert config.mixed_precision == "no"  # the text; a bare no would be False
    assert config.use_cpu is (hardware is CPU)

    file.write_text(file.read_text(encoding="utf-8") + "use_cpuu: true\n", encoding="utf-8")
    with pytest.raises(ValueError, match="use_cpuu"):  # so that the parser is known to check
        load(str(file))


@pytest.mark.parametrize("hardware", [CPU, CUDA])
def test_accelerate_starts_one_worker_as_meant(
    hardware: HardwareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / NASTY
    arguments, command, environment = what_accelerate_makes_of_it(hardware, folder, monkeypatch)
    assert not (arguments.multi_gpu or arguments.use_deepspeed or arguments.use_fsdp or arguments.tpu)
    assert command == [sys.executable, "-m", "launcher.worker", str(folder)]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment["ACCELERATE_USE_CPU"] == str(hardware is CPU)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("" if hardware is CPU else "0")
    if hardware is CPU:
        assert environment["OMP_NUM_THREADS"] == str(render.usable_cores())


@pytest.mark.parametrize(("flag", "expected"), [("bf16", "bf16"), ("fp16", "fp16"), ("", "no")])
def test_the_trainers_own_flags_decide_the_precision(
    flag: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate makes of the file
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=flag == "bf16", fp16=flag == "fp16"
    )
    assert arguments.mixed_precision == expected


# ------------------------------------------------------------------------------------------------ environment


def test_what_the_user_set_is_kept_and_repeated() -> None:
    set_by_user = {
        "OMP_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_DISABLE_TELEMETRY": "0",
    }
    assert set_by_user.items() <= render.worker_environment(CPU, set_by_user).items()


def test_only_additions_are_returned() -> None:
    assert "HOME" not in render.worker_environment(CPU, {"HOME": "/home/me", "HF_TOKEN": "secret"})
    assert "HF_TOKEN" not in render.worker_environment(CPU, {"HF_TOKEN": "secret"})


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_settings_are_the_users_if_there_are_any(name: str) -> None:
    both = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    environment = render.worker_environment(CUDA, {name: "max_split_size_mb:64"})
    assert {key: environment[key] for key in both & environment.keys()} == {name: "max_split_size_mb:64"}


def test_expandable_segments_are_for_cuda_only() -> None:
    assert render.worker_environment(CUDA, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in render.worker_environment(CPU, {})
    assert "PYTORCH_ALLOC_CONF" not in render.worker_environment(ROCM, {})


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "0"), ("", "0"), ("2", "2"), ("3,1", "3"), ("GPU-a1b2, GPU-c3d4", "GPU-a1b2")],
)
def test_one_device_is_in_sight_and_it_is_the_users_first(visible: str | None, expected: str) -> None:
    inherited = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment = render.worker_environment(CUDA, inherited)
    assert environment["CUDA_VISIBLE_DEVICES"] == expected
    assert ("CUDA_DEVICE_ORDER" in environment) is (not visible)


def test_a_worker_finds_this_package_from_elsewhere_and_no_strangers(tmp_path: Path) -> None:
    (tmp_path / "shlex.py").write_text("raise SystemExit('the wrong shlex')")
    lookup = "import launcher.run.render as found, shlex; print(found.__file__)"
    environment = {"PATH": os.environ["PATH"], **render.worker_environment(CPU, {"PYTHONPATH": "/nowhere"})}
    said = subprocess.run(
        [sys.executable, "-c", lookup],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(said.stdout.strip()) == Path(render.__file__).resolve()
    assert environment["PYTHONPATH"].endswith(os.pathsep + "/nowhere")


def test_an_installed_package_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "package_root", lambda: sysconfig.get_path("purelib"))
    assert "PYTHONPATH" not in render.worker_environment(CPU, {})


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_a_quota_limits_the_cores(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(quota + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert render.usable_cores(tmp_path) == expected


# ----------------------------------------------------------------------------------------------------- script


def test_the_shell_understands_the_script_whatever_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    program = "import os, sys; print([os.getcwd(), os.environ['NASTY'], sys.argv[1:]])"
    command = (sys.executable, "-c", program, str(folder), "", "*", NASTY)
    script = folder / "command.sh"
    script.write_text(
        render.command_script(command, {"NASTY": NASTY, "EMPTY": ""}, str(folder)), encoding="utf-8"
    )
    subprocess.run(["sh", "-n", str(script)], check=True)
    said = subprocess.run(["sh", str(script)], cwd="/", capture_output=True, text=True, check=True)
    assert said.stdout == f"{[str(folder), NASTY, [str(folder), '', '*', NASTY]]}\n"


def test_the_script_stops_when_its_folder_is_gone(tmp_path: Path) -> None:
    script = render.command_script(("echo", "ran"), {}, str(tmp_path / "gone"))
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "ran" not in said.stdout


def test_the_worker_command_keeps_paths_whole() -> None:
    paths = RunPaths(Path("/runs") / NASTY)
    command = render.worker_command(paths, ONE)
    assert command[0] == sys.executable
    assert str(paths.accelerate_config) in command
    assert command[-1] == str(paths.root)
