"""The random states of one process, to be put back."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch


def remembered_random_states() -> Callable[[], None]:
    """Keeps the states of all generators that a checkpoint has; what it returns puts them back.

    On a CPU they are bytes, because a tensor would be measured with those of the training.
    """
    python, numpy = random.getstate(), np.random.get_state()
    host = torch.get_rng_state().numpy().tobytes()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch.frombuffer(bytearray(host), dtype=torch.uint8))
        if device is not None:
            torch.cuda.set_rng_state(device)

    return put_back
