"""The wire between the launchers of several machines: one line of JSON per message, over TCP, to machine 0.

It carries who is there, whether all have the same libraries and the same run directory, that a machine still lives, and
why the run has to end. The processes that train have their own connections; these here stay quick when those hang.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from launcher.errors import LaunchError

BEAT_SECONDS: Final = 2.0
"""How often each side says that it lives."""
SILENCE_SECONDS: Final = 15.0
"""Silence after which a machine counts as gone: seven beats lost, and half of the time in which all must have ended."""
RETRY_SECONDS: Final = 1.0
Message = Mapping[str, Any]


class Line:
    """One connection, as messages.

    Args:
        connection: The connection; a thread reads it from `start` until it ends.
        on_message: Called with every message but beats, in that thread.
        on_end: Called once with why it ended, in that thread.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_message: Callable[[Line, Message], None],
        on_end: Callable[[Line, str], None],
    ) -> None:
        self._connection = connection
        self._on_message = on_message
        self._on_end = on_end
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self.node = -1
        """Which machine is at the other end; -1 while it has not said so."""
        connection.settimeout(SILENCE_SECONDS)

    def start(self) -> Line:
        """Begins to read; not before whoever is called knows this line."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def send(self, message: Message) -> None:
        """Sends a message; one that can't be sent is noticed by the reader."""
        with suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Ends the connection."""
        self._is_closed.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat(self) -> None:
        while not self._is_closed.wait(BEAT_SECONDS):
            self.send({"beat": True})

    def _read(self) -> None:
        why = "it closed the connection"
        try:
            with self._connection.makefile("r", encoding="utf-8") as stream:
                for text in stream:
                    message = json.loads(text)
                    if "beat" not in message:
                        self._on_message(self, message)
        except TimeoutError:
            why = f"it was silent for {SILENCE_SECONDS:.0f} s"
        except (OSError, ValueError) as failure:
            why = str(failure)
        except (KeyError, TypeError) as failure:
            why = f"it sent what is no message of this version: {failure}"
        if not self._is_closed.is_set():
            self._on_end(self, why)


def listen(port: int) -> socket.socket:
    """Opens the port where the others arrive.

    Raises:
        LaunchError: When it is in use.
    """
    listener = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(1024)
    except OSError as failure:
        listener.close()
        raise LaunchError(
            f"port {port} on host {socket.gethostname()} can't be opened: {failure}",
            "choose another `launch.main_port`; a run takes that port and the next one",
        ) from failure
    return listener


def stop_listening(listener: socket.socket) -> None:
    """Closes a port for good: Linux would give one more caller to a thread that waits in `accept`."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def call(address: str, port: int, who: str, seconds: float) -> socket.socket:
    """Connects to machine 0, which may not be there yet.

    Raises:
        LaunchError: When it isn't by then.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=min(10.0, seconds))
        except OSError as failure:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise LaunchError(
                    f"{who} can't reach node 0 at {address}:{port} (tried for {seconds:.0f} s): {failure}",
                    "check `launch.main_address`, the firewall, and that node 0 was started",
                ) from failure
            time.sleep(RETRY_SECONDS)
