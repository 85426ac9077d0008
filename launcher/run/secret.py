"""The secret of a run on several machines: who has it sees the run directory, and is heard by machine 0."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from launcher.cluster import Node
from launcher.documents import sync_folder
from launcher.errors import LaunchError

SECRET_BYTES: Final = 32
POLL_SECONDS: Final = 0.5


def with_secret(node: Node, file: Path, seconds: float) -> Node:
    """A machine with the secret of its run: machine 0 makes it where there is none, the others wait until they see it.
    One machine alone needs none.

    It is made by who runs, not by who prepares: pods may run as another user, and only its owner can read it.

    Args:
        node: The machine.
        file: Where the secret lies in the run directory.
        seconds: How long a machine waits for it; NFS may show a new file a minute later.

    Raises:
        LaunchError: When it can't be read or written, or isn't there by then.
    """
    if not node.address:
        return node
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := file.read_text(encoding="ascii"):
                return replace(node, secret=found)
        except FileNotFoundError as failure:
            if node.rank and time.monotonic() > deadline:
                raise LaunchError(
                    f"node {node.rank} has not seen `{file}`, by which the machines of a run know each other, within "
                    f"{seconds:.0f} s",
                    "the run directory must lie in a folder that all nodes share, and node 0 must have been started",
                ) from failure
        except OSError as failure:
            raise LaunchError(
                f"`{file}` can't be read: {failure}", "all nodes must run as the user that owns it"
            ) from failure
        if node.rank:
            time.sleep(POLL_SECONDS)
        else:
            _make(file)


def _make(file: Path) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(SECRET_BYTES))
            stream.flush()
            os.fsync(descriptor)
        partial.replace(file)
        sync_folder(file.parent)
    except OSError as failure:
        raise LaunchError(f"`{file}` can't be written: {failure}", "choose another `run_dir`") from failure
