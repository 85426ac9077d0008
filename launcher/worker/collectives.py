"""Lets go of a collective's tensors where the meter sees it.

gloo works in threads of its own, which hold a collective, and copies that C++ made for it, a moment longer than whoever
waits for it. Where that is the last hold, the memory is released in gloo's thread, and torch's profiler reports the
releases of profiled threads only (torch 2.13, c10/core/CPUAllocator.cpp, `ProfiledCPUMemoryReporter`;
ProcessGroupGloo.cpp, `runLoop`): the account would carry it to its end. So a wait for a collective ends when gloo's
threads have gone to sleep. That is microseconds away, or as far as a busy machine lets a thread lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Final

import torch

THREADS: Final = Path("/proc/self/task")
GLOO_NAME: Final = "pt_gloo_runloop"
"""What torch names the threads (torch 2.11 to 2.13); 15 letters, as many as the kernel keeps."""
LONGEST_SECONDS: Final = 0.05
"""How long a wait may last; a thread that the network keeps busy with another collective may not sleep at all."""
PAUSE_SECONDS: Final = 2e-5


@contextmanager
def settled_collectives() -> Iterator[None]:
    """Inside, Python's wait for a collective ends when gloo's threads sleep: what waits in C++ is not touched."""
    if not THREADS.exists():
        yield
        return
    work: Any = torch.distributed.Work
    wait = vars(work)["wait"]  # not getattr: what it gives would no longer be bound when it is put back
    work.wait = _settling(work.wait)
    try:
        yield
    finally:
        work.wait = wait


def _settling(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def wait(*arguments: Any, **named: Any) -> Any:
        done = call(*arguments, **named)
        end = time.monotonic() + LONGEST_SECONDS
        seen_asleep = 0
        while (
            seen_asleep < 2 and time.monotonic() < end
        ):  # asleep may be waiting for Python's lock: once is not enough
            time.sleep(PAUSE_SECONDS)
            seen_asleep = seen_asleep + 1 if gloo_sleeps() else 0
        return done

    return wait


def gloo_sleeps() -> bool:
    """Whether none of this process's gloo threads runs or could run, by the kernel's account."""
    for thread in THREADS.iterdir():
        with suppress(OSError):  # it may have ended
            _, _, rest = (thread / "stat").read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name == GLOO_NAME and fields[0] == "R":
                return False
    return True
