"""Silence while a trace runs: no words of the libraries, no collector that frees what reference counts would not."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers.utils.logging as transformers_logging
from datasets import disable_progress_bars


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries and the cyclic garbage collector, so that releases happen by reference count."""
    level = logging.root.manager.disable
    collecting = gc.isenabled()
    disable_progress_bars()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        gc.disable()
        gc.freeze()  # the loop collects garbage by itself; a large heap makes that slow
        try:
            yield
        finally:
            gc.unfreeze()
            logging.disable(level)
            if shows_progress:
                transformers_logging.enable_progress_bar()
            if collecting:
                gc.enable()
