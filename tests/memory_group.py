"""Control groups with a memory limit, in which the kernel ends processes that take more."""

from __future__ import annotations

from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup")


def memory_group(name: str, limit_bytes: int) -> Path:
    """A control group with a memory limit; the test is skipped where it can't be had. Whoever makes it removes it."""
    v1 = (GROUPS / "memory").is_dir()
    group = GROUPS / ("memory" if v1 else "") / name
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
        if not v1:
            (group / "memory.swap.max").write_text("0")
    except OSError:
        pytest.skip("no control group with a memory limit can be made here: that needs root and Linux")
    return group
