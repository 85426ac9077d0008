"""A Slurm cluster on this machine: munged, slurmctld and two slurmd, all of them the tests' own.

Needs Linux, root and Debian's packages slurmctld, slurmd, slurm-client and munge; says why where it can't be had.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
START_SECONDS = 60
CONFIGURATION = """\
ClusterName=launcher-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=60
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000
NodeName={host}-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Credentials expire soon, because a job that is queued again waits so long; the first node bears this machine's name, so
that it can be found by it."""


def why_no_slurm() -> str:
    """Why a cluster can't be had here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm's daemons are tested on Linux"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (packages slurmctld, slurmd, slurm-client, munge)"
    return ""


@contextmanager
def slurm_cluster() -> Iterator[Path]:
    """A running cluster with two nodes; the path is that of its slurm.conf, for `SLURM_CONF`."""
    root = Path(tempfile.mkdtemp(prefix="launcher-slurm-"))
    daemons: list[subprocess.Popen[bytes]] = []
    host = socket.gethostname().partition(".")[0]
    configuration = root / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, root=root, ports=free_ports(3)))
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    (root / "state").mkdir()
    key = root / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
    munged += [f"--{name}-file={root}/munge.{name}" for name in ("pid", "log", "seed")]
    slurmd = [["slurmd", "-D", "-N", name] for name in (host, f"{host}-b")]
    try:
        for command in (munged, ["slurmctld", "-D"], *slurmd):
            with (root / "daemons.out").open("ab") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
            if command is munged:
                wait_until((root / "munge.socket").exists, root)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_until(lambda: said(idle, environment) == "2", root)
        yield configuration
    finally:
        end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(root, ignore_errors=True)


def end_jobs(environment: dict[str, str]) -> None:
    """Ends what a failed test left; a job outlives the daemons."""
    deadline = time.monotonic() + START_SECONDS
    while said(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
        said(["scancel", "--full", "--signal=KILL", "--user=root"], environment)
        said(["scancel", "--user=root"], environment)
        time.sleep(0.5)


def said(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout.strip()


def wait_until(condition: object, root: Path) -> None:
    """Waits for a daemon, and shows what it said when it does not come."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():  # type: ignore[operator]
        logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in root.glob("*.log"))
        assert time.monotonic() < deadline, (root / "daemons.out").read_text(errors="replace") + logs
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody uses now."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
