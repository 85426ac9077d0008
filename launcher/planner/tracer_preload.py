"""Imported by the server process that forks the trace workers: loads the heavy libraries once."""

from launcher.planner.tracer import hide_unused_libraries

hide_unused_libraries()

from launcher.planner import trace  # noqa: E402  # after the unused libraries are hidden

__all__ = ["trace"]
