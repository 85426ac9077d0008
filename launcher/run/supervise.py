"""Starts one process, follows it to its end, and leaves nothing of it running.

torchrun gives each of its workers a session of its own, so a process group is not enough: all that descends from the
process is known by its parents while these live, and ended with them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import psutil

from launcher.errors import LaunchError
from launcher.redaction import Redactor
from launcher.run_record import WORKER_MARK
from launcher.stored_secrets import known_secrets

SAVE_GRACE_SECONDS: Final = 120.0
"""How long an interrupted worker may take to finish its micro batch and save."""
TERM_GRACE_SECONDS: Final = 5.0
"""How long a process may take to end after SIGTERM, and the kernel after SIGKILL."""
REPEAT_SECONDS: Final = 0.5
"""Interrupts closer together than this count as one: wrappers pass on what the terminal also sent."""
POLL_SECONDS: Final = 0.2
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAMILY_SECONDS: Final = 1.0
"""How often the descendants are counted."""
KERNEL_COUNTERS: Final = Path("/proc/vmstat")
"""Where Linux counts, among other things, the processes that it ended for want of memory (since 4.13)."""
LAST_WORDS_SECONDS: Final = 1.0
"""How long output is still read when all processes have ended, should one have got away and go on writing."""
CHUNK_BYTES: Final = 1 << 16
LONGEST_LINE_BYTES: Final = 1 << 20
"""How much of an unfinished line is kept."""


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    exit_code: int
    """Its exit code; negative: the signal that ended it."""
    interrupted: bool
    """Whether it had been asked to stop."""
    log_begins_at: int
    """Offset in bytes at which its output begins in the log."""
    memory_kills: int = 0
    """Processes of this machine that the kernel ended meanwhile for want of memory."""
    stopped_because: str = ""
    """Why it was ended from outside (see `should_stop`); empty when it was not."""
    terminated: bool = False
    """Whether what asked it to stop first was SIGTERM, as schedulers send it."""


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    pid: Path,
    show: Callable[[str], None],
    grace_seconds: float = SAVE_GRACE_SECONDS,
    should_stop: Callable[[], str] = lambda: "",
    shields: bool = False,
) -> Ending:
    """Starts a command in a process group of its own, follows it, and ends all that came of it.

    The first interrupt, termination or hang-up asks the worker to save and stop; the second one ends it, and
    so does the end of the grace. However this function is left, nothing of it still runs.

    Args:
        command: The command line.
        environment: The whole environment.
        log: Where all output is appended, but for secrets (`known_secrets`).
        pid: File in which the worker, a descendant of the command, writes its process id.
        show: Called with every line that the worker marked as its own.
        grace_seconds: How long an interrupted worker may take.
        should_stop: Asked now and then whether to end it at once, and why; empty: no.
        shields: Whether a termination is this process's own affair: a scheduler sends it to every process of a job, and
            accelerate and the workers would end before they could save. They start with it blocked.

    Raises:
        LaunchError: When the command can't be started.
    """
    numbers: list[int] = []
    with log.open("ab") as stream, _interrupts(numbers) as interrupts:
        began_at, kills_before, reason = stream.tell(), memory_kills(), ""
        with _start(command, environment, shields) as child:
            redactor = Redactor(known_secrets(environment))
            relay, family = _Relay(child, stream, show, redactor), Family(child)
            try:
                reason = _follow(family, pid, relay, interrupts, grace_seconds, should_stop)
            finally:
                family.end()
            relay.finish()
    kills = memory_kills() - kills_before
    terminated = numbers[:1] == [signal.SIGTERM]
    return Ending(child.returncode, bool(interrupts), began_at, kills, reason, terminated)


def memory_kills() -> int:
    """Processes of this machine that the kernel has ended for want of memory since it started; 0 where it can't say."""
    with suppress(OSError):
        for line in KERNEL_COUNTERS.read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _start(command: Sequence[str], environment: Mapping[str, str], shields: bool) -> subprocess.Popen[bytes]:
    blocked = [signal.SIGTERM] if shields else []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # children inherit it
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    except OSError as failure:
        raise LaunchError(f"`{command[0]}` can't be started: {failure}") from failure
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Lets interrupts of this thread wait until what must not be cut through is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts(numbers: list[int]) -> Iterator[list[float]]:
    """Gathers the times of interrupts, instead of letting them cut through whatever is going on.

    Args:
        numbers: Gets the signals' numbers.
    """
    times: list[float] = []

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        if not times or now - times[-1] > REPEAT_SECONDS:
            times.append(now)
            numbers.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield times
        return
    previous = {number: signal.getsignal(number) for number in INTERRUPTS}
    heeded = [number for number in INTERRUPTS if previous[number] != signal.SIG_IGN]  # nohup ignores hang-ups
    try:
        for number in heeded:
            signal.signal(number, note)
        yield times
    finally:
        for number in heeded:
            signal.signal(number, previous[number] or signal.SIG_DFL)


@dataclass
class _Relay:
    """Passes output on: all of it to the log, the worker's own lines to `show`."""

    child: subprocess.Popen[bytes]
    log: IO[bytes]
    show: Callable[[str], None]
    redactor: Redactor
    unfinished: bytes = b""
    is_open: bool = True

    def pump(self, seconds: float) -> bool:
        """Waits for output and passes it on; False when none came."""
        stream = self.child.stdout
        if stream is None or not self.is_open:
            time.sleep(seconds)
            return False
        if not select.select([stream], [], [], seconds)[0]:
            return False
        chunk = os.read(stream.fileno(), CHUNK_BYTES)
        self.is_open = bool(chunk)
        chunk = self.redactor.feed(chunk) if chunk else self.redactor.rest()
        with suppress(OSError):  # the disk is full: what the worker says of it must still be passed on
            self.log.write(chunk)
            self.log.flush()
        *lines, rest = (self.unfinished + chunk).split(b"\n")
        self.unfinished = rest[-LONGEST_LINE_BYTES:]
        for line in lines:
            # anywhere in the line: a progress bar leaves its own unfinished
            _, mark, report = line.decode("utf-8", errors="replace").rpartition(WORKER_MARK)
            if mark:
                self.show(report)
        return self.is_open

    def finish(self) -> None:
        """Passes on what is still in the pipe, without waiting for those who hold it open."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self.pump(0) and time.monotonic() < deadline:
            pass
        with suppress(OSError):
            self.log.write(self.redactor.rest())


class Family:
    """A child and all that descends from it, known even when a parent among them is gone.

    Args:
        child: The child; it leads a process group.
    """

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self._known: dict[int, psutil.Process] = {}
        self._counted_at = 0.0

    def count(self, at_once: bool = False) -> None:
        """Looks for new descendants, unless that was done a moment ago."""
        if not at_once and time.monotonic() < self._counted_at + FAMILY_SECONDS:
            return
        self._counted_at = time.monotonic()
        for root in (self.child.pid, *self._known):
            with suppress(psutil.Error):
                for process in psutil.Process(root).children(recursive=True):
                    self._known.setdefault(process.pid, process)

    def has(self, pid: int) -> bool:
        """Whether a process is of the family."""
        self.count(at_once=True)
        return pid == self.child.pid or (pid in self._known and self._known[pid].is_running())

    def interrupt(self) -> None:
        """Interrupts the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGINT)

    def end(self) -> None:
        """Ends every process of the family, gently at first; returns when none is left.

        Waits no longer than `TERM_GRACE_SECONDS` after each of the two signals: what is there then are processes
        that have ended and that nobody collects.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.count(at_once=True)
            if not self._signal(number):
                return
            deadline = time.monotonic() + TERM_GRACE_SECONDS
            while time.monotonic() < deadline:
                self.child.poll()
                if not self._signal(0):
                    return
                time.sleep(0.05)

    def _signal(self, number: int) -> bool:
        """Sends a signal to all; False when nobody was there."""
        found = False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, number)
            found = True
        for process in self._known.values():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    process.send_signal(number)
                    found = True
        return found


def _follow(
    family: Family,
    pid: Path,
    relay: _Relay,
    interrupts: list[float],
    grace: float,
    should_stop: Callable[[], str],
) -> str:
    """Relays the child's output until it ends, or has to be ended; returns why, when that came from outside."""
    asked = False
    while family.child.poll() is None:
        family.count()
        if interrupts and not asked:
            asked = True
            _ask_to_stop(family, pid)
        if len(interrupts) > 1 or (interrupts and time.monotonic() > interrupts[0] + grace):
            return ""
        if reason := should_stop():
            return reason
        try:
            relay.pump(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupts.append(time.monotonic())
    return ""


def _ask_to_stop(family: Family, pid: Path) -> None:
    """Interrupts the first worker, which tells the others; all of the group while it has no id yet."""
    with suppress(OSError, ValueError):
        worker = int(pid.read_text(encoding="ascii"))
        if family.has(worker):
            os.kill(worker, signal.SIGINT)
            return
    family.interrupt()
