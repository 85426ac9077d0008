"""Where the launcher keeps what it made once: weights, traces, rates."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

CACHE_NAME = "launcher"
"""Its folder below the user's cache."""


def cache_folder(name: str) -> Path:
    """A folder under the user's cache."""
    return user_cache_path(CACHE_NAME) / name
