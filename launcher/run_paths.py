"""Names of the files in a run directory: all that parent and child share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError


@dataclass(frozen=True)
class RunPaths:
    """One run directory."""

    root: Path
    """The directory itself."""

    @property
    def job(self) -> Path:
        """The job, as composed."""
        return self.root / "job.json"

    @property
    def plan(self) -> Path:
        """The plan document, as `output=json` prints it before the run."""
        return self.root / "plan.json"

    @property
    def worker(self) -> Path:
        """What the worker needs: job, plan, and where the weights lie."""
        return self.root / "worker.json"

    @property
    def rewriting(self) -> Path:
        """There while the run is given another order."""
        return self.root / "rewriting"

    @property
    def accelerate_config(self) -> Path:
        """Configuration file of `accelerate launch`."""
        return self.root / "accelerate.yaml"

    @property
    def deepspeed_config(self) -> Path:
        """Configuration file of DeepSpeed."""
        return self.root / "deepspeed.json"

    @property
    def logs(self) -> Path:
        """What each process printed, in torchrun's folders; written only with several processes."""
        return self.root / "logs"

    @property
    def command(self) -> Path:
        """The exact command, as a script that a person can run."""
        return self.root / "command.sh"

    @property
    def log(self) -> Path:
        """Everything the worker printed."""
        return self.root / "worker.log"

    def node_command(self, node: int) -> Path:
        """The command of one machine, as a script; of machine 0 it is `command`."""
        return self.command if node == 0 else self.root / f"command.node{node}.sh"

    def node_log(self, node: int) -> Path:
        """Everything that the workers of one machine printed; of machine 0 it is `log`."""
        return self.log if node == 0 else self.root / f"worker.node{node}.log"

    @property
    def batch_script(self) -> Path:
        """What sbatch is given, where the cluster is Slurm."""
        return self.root / "job.sbatch"

    @property
    def batch_log(self) -> Path:
        """What the batch script and the nodes' launchers printed."""
        return self.root / "slurm.log"

    @property
    def submitted(self) -> Path:
        """The job that a scheduler took."""
        return self.root / "submitted.json"

    @property
    def skypilot_task(self) -> Path:
        """Task file of SkyPilot."""
        return self.root / "skypilot.yaml"

    @property
    def train_job(self) -> Path:
        """TrainJob of Kubeflow."""
        return self.root / "trainjob.yaml"

    def failure(self, node: int) -> Path:
        """Why one machine's part did not end well, where its launcher could say."""
        return self.root / f"failure.node{node}.json"

    @property
    def generations(self) -> Path:
        """Generated text, one JSON object a line."""
        return self.root / "generations.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def record(self) -> Path:
        """The reconciled run record."""
        return self.root / "record.json"

    @property
    def checkpoints(self) -> Path:
        """Trainer output: checkpoints and event files."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained weights or adapter, with the tokenizer."""
        return self.root / "model"

    @property
    def merged(self) -> Path:
        """The model with its adapters merged into the weights, where the job asks for it."""
        return self.root / "merged"

    @property
    def rehearsal(self) -> RunPaths:
        """The rehearsal: a run directory of its own."""
        return RunPaths(self.root / "rehearsal")

    @property
    def findings(self) -> Path:
        """What a rehearsal showed, in the rehearsal's own directory."""
        return self.root / "findings.json"

    @property
    def lock(self) -> Path:
        """Held by the launcher that runs in the directory."""
        return self.root / "launcher.lock"

    @property
    def secret(self) -> Path:
        """What the machines of a run know each other by; its owner's alone."""
        return self.root / "launcher.secret"

    @property
    def replans(self) -> Path:
        """The plans that ran out of memory, and what was tried next."""
        return self.root / "replans.json"

    def phase(self, rank: int) -> Path:
        """The phase that one rank is in."""
        return self.root / f"worker.rank{rank}.phase"

    def measured(self, rank: int) -> Path:
        """What the meter saw on one rank."""
        return self.root / f"measured.rank{rank}.json"

    def timeline(self, rank: int) -> Path:
        """One optimizer step, as the meter saw it on one rank."""
        return self.root / f"timeline.rank{rank}.json"

    @property
    def plot(self) -> Path:
        """Picture of one optimizer step."""
        return self.root / "memory.png"

    def outcome(self, rank: int) -> Path:
        """How one rank ended."""
        return self.root / f"outcome.rank{rank}.json"

    def pid(self, rank: int) -> Path:
        """Process id of one rank."""
        return self.root / f"worker.rank{rank}.pid"

    def host(self, rank: int) -> Path:
        """Name of the machine that one rank runs on."""
        return self.root / f"worker.rank{rank}.host"


def run_of(key: str, root: Path) -> RunPaths:
    """The run directory that a key of the configuration names.

    Args:
        key: The key.
        root: The folder.

    Raises:
        ConfigError: When it is none.
    """
    paths = RunPaths(root)
    if not paths.worker.is_file():
        raise ConfigError(f"`{key}={root}` is not a run directory", "it must hold worker.json")
    return paths
