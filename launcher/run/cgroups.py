"""What the kernel's control groups allow this process, version 1 and 2: bytes of memory, and CPU time.

A group's limit holds for all groups below it, so the least limit of a process's own group and of those above it counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

MOUNT: Final = re.compile(
    r"\S+ \S+ \S+ (?P<group>\S+) (?P<folder>\S+) .*? - (?P<kind>cgroup2?) \S+ (?P<options>\S+)"
)
"""A mount of control groups in /proc/self/mountinfo: the group that its top shows, its folder, and its controllers."""
ESCAPED: Final = re.compile(r"\\([0-7]{3})")
"""How that file writes spaces and the like."""


@dataclass(frozen=True)
class _Hierarchy:
    """One tree of control groups, and where this process is in it."""

    version: int
    """1, one tree for each controller or few of them, or 2, one for all."""
    folder: Path
    """Where it is mounted."""
    group: PurePosixPath
    """This process's group, below the folder."""

    def folders(self) -> Iterator[Path]:
        """Folders of the process's group and of those above it, as far as they can be seen."""
        for group in (self.group, *self.group.parents):
            yield self.folder / group


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The memory that this process's control groups allow it; None where there is no limit.

    Args:
        root: Of the file system.
    """
    limits = [
        _number(folder / {1: "memory.limit_in_bytes", 2: "memory.max"}[tree.version])
        for tree in _hierarchies(root, "memory")
        for folder in tree.folders()
    ]
    # version 1 has no word for "no limit": it says the largest number of pages
    return min((limit for limit in limits if limit is not None), default=None)


def cpu_limit(root: Path = Path("/")) -> float | None:
    """The CPUs that this process's control groups let it keep busy, by their quotas; None where there is no limit.

    Args:
        root: Of the file system.
    """
    quota: dict[int, Callable[[Path], float | None]] = {1: _quota_of_version_1, 2: _quota_of_version_2}
    limits = [quota[tree.version](folder) for tree in _hierarchies(root, "cpu") for folder in tree.folders()]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_of_version_1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period else None


def _quota_of_version_2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _hierarchies(root: Path, controller: str) -> Iterator[_Hierarchy]:
    """The trees that may limit a controller: that of version 1 where there is one, and that of version 2."""
    groups = _own_groups(root)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        found = MOUNT.fullmatch(line)
        if found is None:
            continue
        version = 2 if found["kind"] == "cgroup2" else 1
        if version == 1 and controller not in found["options"].split(","):
            continue
        own = groups.get("" if version == 2 else controller)
        if own is not None:
            folder = root / _unescaped(found["folder"]).lstrip("/")
            yield _Hierarchy(version, folder, _below(own, _unescaped(found["group"])))


def _own_groups(root: Path) -> dict[str, str]:
    """This process's group in each tree, by controller; the tree of version 2 under no name."""
    groups: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        groups |= dict.fromkeys(controllers.split(","), group)
    return groups


def _below(group: str, top: str) -> PurePosixPath:
    """A group's path below the group that a mount shows at its top; empty where it can't be seen there.

    In a container the mount may show the container's own group only, and a group outside of a namespace begins with `..`.
    """
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(top):
        return PurePosixPath()
    return path.relative_to(top)


def _unescaped(name: str) -> str:
    return ESCAPED.sub(lambda code: chr(int(code[1], 8)), name)


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or a word for "no limit"."""
    text = _text(file)
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    """What a file of the kernel says; nothing where there is none, or none that this process may read."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""
