"""Every error a user can meet, each with its exit code.

LauncherError
├── PeakMoved              1   a recipe's peak is not what it was
├── ConfigError            2   the job description is wrong
├── UnsupportedByPlanner   2   the job is sound, but the planner can't follow an option of it
├── NoPlanFits             3   no plan fits the hardware
├── WorkerOutOfMemory      4   the training process ran out of memory
├── DataError              5   the training data or the weights can't be read
├── LaunchError            6   the process, the device or the run directory failed
└── Interrupted          130   the user stopped the run
    └── Terminated       143   a scheduler did
"""

from __future__ import annotations

from typing import ClassVar


class LauncherError(Exception):
    """Base of all errors that end with a message instead of a traceback.

    Args:
        message: What happened, with the value and the legal values.
        hint: What to do about it; empty when there is nothing to add.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both, so that the error survives the way out of a child process
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class PeakMoved(LauncherError):
    """Today's libraries predict, or measure, another peak than those of an earlier run."""


class ConfigError(LauncherError):
    """The job description has unknown keys, unknown choices or impossible values."""

    exit_code = 2


class UnsupportedByPlanner(LauncherError):
    """The planner can't predict an option of the job; names the operation or the option."""

    exit_code = 2


class NoPlanFits(LauncherError):
    """No plan in the search space fits the hardware."""

    exit_code = 3


class WorkerOutOfMemory(LauncherError):
    """The training process ran out of memory.

    Args:
        message: See `LauncherError`.
        hint: See `LauncherError`.
        rank: The rank that did.
    """

    exit_code = 4

    def __init__(self, message: str, hint: str = "", rank: int = 0) -> None:
        super().__init__(message, hint)
        self.args = (message, hint, rank)
        self.rank = rank


class DataError(LauncherError):
    """Training data, tokenizer or weights are missing or malformed."""

    exit_code = 5


class LaunchError(LauncherError):
    """The training process, the device or the run directory failed."""

    exit_code = 6


class Interrupted(LauncherError):
    """The user stopped the run; a checkpoint was saved if the training had begun."""

    exit_code = 130


class Terminated(Interrupted):
    """A scheduler, or somebody else, sent SIGTERM; a checkpoint was saved if the training had begun."""

    exit_code = 143
