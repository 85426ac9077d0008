"""Counts the page-locked buffers through which DeepSpeed swaps to NVMe: its C++ makes them past torch's allocator.

The meter sees them as soon as training begins, when it looks at every tensor; here it hears of them while they are made,
which is loading (deepspeed 0.19.8, swap_tensor/utils.py, `SwapBufferManager`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from launcher.plan import Plan


@contextmanager
def swap_buffers_seen(plan: Plan, receive: Callable[[Iterable[torch.Tensor]], None]) -> Iterator[None]:
    """While it is open, buffers are shown as they are made.

    Args:
        plan: The plan; only one that swaps has any.
        receive: Is shown the buffers.
    """
    if not plan.swaps:
        yield
        return
    from deepspeed.runtime.swap_tensor import utils  # noqa: PLC0415  # seconds, for plans with DeepSpeed only

    original = utils.SwapBufferManager.__init__

    @wraps(original)
    def shown(manager: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, *args, **kwargs)
        receive(manager.all_buffers)

    utils.SwapBufferManager.__init__ = shown
    try:
        yield
    finally:
        utils.SwapBufferManager.__init__ = original
