"""Where a run stands, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.run_status import RankProcess, RunStatus

RANKS_SHOWN = 16


def status_text(status: RunStatus) -> str:
    """A few lines."""
    lines = [f"run       {status.run_dir}", f"state     {status.state.value}"]
    if status.message:
        lines[-1] += f": {status.message.splitlines()[0]}"
        lines += status.message.splitlines()[1:]
    if status.job is not None:
        where = f" on {status.job.cluster}" if status.job.cluster else ""
        lines.append(
            f"job       {status.job.job_id}{where}: Slurm says {status.slurm_state or 'nothing here'}"
        )
    if status.step:
        steps = f"{status.step}/{status.max_steps}" if status.max_steps else str(status.step)
        lines.append(f"step      {steps}" + (f", loss {status.loss:.4f}" if status.loss is not None else ""))
    if status.last_checkpoint:
        lines.append(f"saved     {status.last_checkpoint}")
    started = [rank for rank in status.ranks if rank.pid is not None]
    if not status.state.is_over:
        lines += [_rank_line(rank) for rank in started[:RANKS_SHOWN]]
        if len(started) > RANKS_SHOWN:
            lines.append(f"and {len(started) - RANKS_SHOWN} more ranks; `output=json` lists all")
    return "\n".join(lines)


def _rank_line(rank: RankProcess) -> str:
    alive = {True: "alive", False: "gone", None: "on another machine"}[rank.is_alive]
    return f"rank {rank.rank:<5}process {rank.pid} on {rank.host or 'an unknown host'}: {alive}"


def status_document(status: RunStatus) -> dict[str, Any]:
    """The same as plain values; what is not known is null."""
    return {
        "run_dir": status.run_dir,
        "cluster": status.cluster.value,
        "state": status.state.value,
        "message": status.message,
        "step": status.step,
        "max_steps": status.max_steps,
        "loss": status.loss,
        "last_checkpoint": status.last_checkpoint or None,
        "job_id": status.job.job_id if status.job else None,
        "slurm_cluster": (status.job.cluster or None) if status.job else None,
        "slurm_state": status.slurm_state or None,
        "ranks": [asdict(rank) for rank in status.ranks],
    }
