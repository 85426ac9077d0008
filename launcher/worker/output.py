"""What a rank prints, without secrets, before anything keeps it.

The launcher strikes secrets out of what passes by it. torchrun's files of each rank's output do not, and the launcher
may be killed before it could look through them.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from launcher.redaction import Redactor


class RedactedFile(io.RawIOBase):
    """A file descriptor behind a `Redactor`.

    Args:
        descriptor: Where the text goes.
        secrets: As `launcher.redaction.secrets_of` gives them.
    """

    def __init__(self, descriptor: int, secrets: Mapping[str, str]) -> None:
        self._descriptor = descriptor
        self._redactor = Redactor(secrets)
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)  # a thread that held it is not there

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()  # threads print, and so do signal handlers in the middle of it

    def fileno(self) -> int:
        """The descriptor, for those who write past Python."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: Any) -> int:
        """Passes on what can be passed on now."""
        with self._lock:
            self._put(self._redactor.feed(bytes(text)))
        return len(text)

    def pass_on_rest(self) -> None:
        """Passes on what was held, when nothing comes after it."""
        with self._lock:
            self._put(self._redactor.rest())

    def _put(self, text: bytes) -> None:
        while text:
            text = text[os.write(self._descriptor, text) :]


@contextmanager
def redacted_output(secrets: Mapping[str, str]) -> Iterator[None]:
    """Lets nothing that Python prints meanwhile hold a secret.

    Each piece is written at once: a rank that is killed leaves all that it said.
    """
    before = sys.stdout, sys.stderr
    files = [RedactedFile(stream.fileno(), secrets) for stream in before]
    sys.stdout, sys.stderr = (
        # without a buffer, as Python itself does when it is told to be unbuffered (`-u`)
        io.TextIOWrapper(cast(Any, file), encoding=stream.encoding, errors=stream.errors, write_through=True)
        for file, stream in zip(files, before, strict=True)
    )
    try:
        yield
    finally:
        for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
            stream.flush()
            file.pass_on_rest()
        sys.stdout, sys.stderr = before
