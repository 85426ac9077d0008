"""The door to Slurm: a batch script from the plan, its submission, and what Slurm says of the job afterwards.

The script asks for the plan's nodes with one task on each; `srun` starts there what `launch.cluster=manual` starts by
hand (`launcher.run.node`), and accelerate under it. Options as in sbatch and srun 22.05 to 25.05.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from launcher.cluster import SubmittedJob
from launcher.documents import write_document
from launcher.errors import LaunchError
from launcher.hardware import DeviceKind
from launcher.run.render import NODE_MODULE
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder
from launcher.units import MIB

REPORT: Final = ("-m", "launcher.cli", "action=status", "run_dir=.")
"""What the job runs last, in its run directory: predicted beside measured, and the record of the run."""
ASK_SECONDS: Final = 30
"""How long Slurm may take to answer a question."""
CONVENTIONAL_HEADROOM: Final = 0.05
"""Share of the memory that is asked for beyond the plan's where the planner's headroom was left to it."""
TRAP: Final = """\
# Slurm warns this script before the time is up; the launchers are told by signal TERM, and save a checkpoint
signalled=
trap 'signalled=yes; scancel --signal=TERM "$SLURM_JOB_ID" || :' USR1
trap 'signalled=yes' TERM
"""
WAIT: Final = """\
while :; do  # a signal ends `wait` early
    signalled= code=0
    wait "$!" || code=$?
    [ -n "$signalled" ] || break
done
"""
REQUEUE: Final = """\
# asked to stop (130, 143), and not by scancel, which would have ended the job: queued again it goes on from there
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && { [ "$code" -eq 130 ] || [ "$code" -eq 143 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
"""


def batch_script(
    paths: RunPaths,
    order: WorkerOrder,
    environment: Mapping[str, str],
    folder: str,
    python: str = sys.executable,
) -> str:
    """The script that sbatch is given.

    Nothing in it depends on quoting by sbatch: names were checked (`launcher.cluster_limits`), and paths stand in shell
    lines and in sbatch's arguments only.

    Args:
        paths: The run directory, which every node sees under the same name.
        order: What the workers do.
        environment: What the environment must have beyond the submitter's.
        folder: Where it runs; relative paths in the job are meant from here.
        python: Interpreter on the nodes.
    """
    spec, num_nodes, cpus = order.job.launch, order.plan.num_nodes, _cpus(order)
    python = spec.python or python
    address = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    # below the ports that Linux hands out by itself, and another one for the next job on the same node
    port = str(spec.main_port or "$((20000 + SLURM_JOB_ID % 6000 * 2))")
    step = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    step += [f"--cpus-per-task={cpus}"]  # srun doesn't take it from the job (since 22.05)
    step += ["--mpi=none", "--kill-on-bad-exit=0"]  # the launchers end each other, when they have saved
    starts = shlex.join([*step, "sh", "-c", 'exec "$@" --rank "$SLURM_NODEID"', "sh"])
    launcher = shlex.join([python, "-m", NODE_MODULE, str(paths.root)])
    lines = [
        "#!/bin/bash",
        "# Trains the job of this run directory under Slurm; `sbatch job.sbatch` submits it, as the launcher does.",
        *(f"#SBATCH {option}" for option in batch_options(paths, order)),
        "",
        "set -e",
        f"cd -- {shlex.quote(folder)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())),
        *spec.setup,
        "",
        f"address={shlex.quote(spec.main_address) if spec.main_address else address}",
        f"port={port}",
        TRAP + f"{starts} \\",
        f'    {launcher} --address "$address" --port "$port" &',
        WAIT + (REQUEUE if spec.requeue else ""),
        f"cd -- {shlex.quote(str(paths.root))}",
        f"{shlex.join([python, *REPORT])} || true",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def batch_options(paths: RunPaths, order: WorkerOrder) -> list[str]:
    """The job's options, the user's last: sbatch takes the last one of each kind."""
    spec, plan = order.job.launch, order.plan
    name = re.sub(r"[^\w.-]+", "-", paths.root.name, flags=re.ASCII).strip("-") or "run"
    options = [
        f"--job-name=launcher-{name}",
        f"--nodes={plan.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(order)}",
    ]
    if order.job.hardware.kind is not DeviceKind.CPU:
        options.append(f"--gres=gpu:{plan.num_devices}")
    if memory_bytes := node_memory_bytes(order):
        options.append(f"--mem={math.ceil(memory_bytes / MIB)}M")
    if spec.time_limit_minutes:
        options.append(f"--time={spec.time_limit_minutes}")
    options += [
        f"--{key}={value}"
        for key, value in (("partition", spec.partition), ("account", spec.account))
        if value
    ]
    return [
        *options,
        "--open-mode=append",
        f"--signal=B:USR1@{spec.grace_seconds}",
        "--requeue" if spec.requeue else "--no-requeue",
        *spec.options,
    ]


def _cpus(order: WorkerOrder) -> int:
    return order.job.launch.cpus_per_device * order.plan.num_devices


def node_memory_bytes(order: WorkerOrder) -> int:
    """Host memory of one node; 0 where the plan doesn't know it.

    Its training processes, one more with the same libraries (accelerate's own), and the planner's headroom for what no
    estimate holds: data, and the launcher.
    """
    host, headroom = order.predicted.host, order.job.planner.headroom
    if order.job.launch.memory_bytes or host is None or not host.process_bytes:
        return order.job.launch.memory_bytes
    share = CONVENTIONAL_HEADROOM if headroom == "auto" else headroom
    return math.ceil((host.peak_bytes * order.plan.num_devices + host.process_bytes) / (1 - share))


def submit_command(paths: RunPaths) -> tuple[str, ...]:
    """The command line that submits a prepared run."""
    output = f"--output={_literal_pattern(paths.batch_log)}"
    return ("sbatch", "--parsable", f"--chdir={paths.root}", output, str(paths.batch_script))


def _literal_pattern(path: Path) -> str:
    """A path in which sbatch finds no pattern: a backslash anywhere lets it leave `%` alone, else `%%` is a `%`."""
    text = str(path)
    return text.replace("\\", "\\\\") if "\\" in text else text.replace("%", "%%")


def submit(paths: RunPaths) -> SubmittedJob:
    """Submits a prepared run, and notes the job's number in the run directory.

    Raises:
        LaunchError: When there is no sbatch, or it refuses.
    """
    command = submit_command(paths)
    hint = f"the script is `{paths.batch_script}`; where Slurm is: {shlex.join(command)}"
    if shutil.which(command[0]) is None:
        raise LaunchError("`sbatch` is not on this machine", hint)
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as failure:
        raise LaunchError(f"`sbatch` can't be started: {failure}", hint) from failure
    found = re.fullmatch(r"(\d+)(?:;(\S+))?", said.stdout.strip())
    if said.returncode or found is None:
        words = (said.stderr or said.stdout).strip()
        raise LaunchError(f"sbatch did not take the job (exit code {said.returncode}): {words}", hint)
    job = SubmittedJob(found[1], found[2] or "")
    write_document(paths.submitted, job)
    return job


def slurm_state(job: SubmittedJob) -> str:
    """Slurm's own word for the state of a job, as `PENDING` or `CANCELLED`; empty where it can't be asked.

    squeue forgets a job some minutes after its end (MinJobAge); sacct doesn't, where the site keeps accounts.
    """
    clusters = [f"--clusters={job.cluster}"] if job.cluster else []
    squeue = ["squeue", *clusters, "--noheader", f"--jobs={job.job_id}", "--states=all", "--format=%T"]
    sacct = ["sacct", *clusters, "--noheader", "--allocations", "--parsable2", f"--jobs={job.job_id}"]
    return _said(squeue) or _said([*sacct, "--format=State"]).partition(" ")[0]  # "CANCELLED by 1000"


def _said(command: Sequence[str]) -> str:
    """The last line of what a command says; empty when it can't be had."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        said = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=ASK_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = said.stdout.strip().splitlines() if said.returncode == 0 else []
    own = [line.strip() for line in lines if not line.startswith("CLUSTER")]
    return own[-1] if own else ""
