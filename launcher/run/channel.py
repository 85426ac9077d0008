"""The wire between the launchers of several machines: one line of JSON per message, over TCP, to machine 0.

It carries who is there, whether all have the same libraries and the same run directory, that a machine still lives, and
why the run has to end. The processes that train have their own connections; these here stay quick when those hang.

Who calls says the run's secret first. Nothing else of it is read before that.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from launcher.cluster import Node
from launcher.errors import LaunchError

BEAT_SECONDS: Final = 2.0
"""How often each side says that it lives."""
SILENCE_SECONDS: Final = 15.0
"""Silence after which a machine counts as gone: seven beats lost, and half of the time in which all must have ended."""
RETRY_SECONDS: Final = 1.0
LONGEST_LINE_BYTES: Final = 1 << 20
"""A longer message is none: the longest ones quote the end of a log."""
LONGEST_SECRET_BYTES: Final = 256
STRANGER: Final = "it did not know the secret of this run"
"""Why a connection ended on which nobody of this run has called."""
Message = Mapping[str, Any]


class Line:
    """One connection, as messages.

    Args:
        connection: The connection; a thread reads it from `start` until it ends.
        on_message: Called with every message but beats, in that thread.
        on_end: Called once with why it ended, in that thread; `is_known` says whether it was of this run.
        secret: What the other end has to say first; None: this end has called.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_message: Callable[[Line, Message], None],
        on_end: Callable[[Line, str], None],
        secret: str | None = None,
    ) -> None:
        self._connection = connection
        self._on_message = on_message
        self._on_end = on_end
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._secret = secret
        self.is_known = secret is None
        """Whether the other end is of this run."""
        self.node = -1
        """Which machine is at the other end; -1 while it has not said so."""
        self.peer = _peer_of(connection)
        """Address of the other end; empty where it is gone already."""
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
            with self._connection.makefile("rb") as stream:
                self.is_known = self.is_known or self._is_told_secret(stream.readline(LONGEST_SECRET_BYTES))
                while self.is_known and (text := stream.readline(LONGEST_LINE_BYTES)):
                    if not text.endswith(b"\n"):
                        why = f"it sent a line that does not end within {LONGEST_LINE_BYTES} bytes"
                        break
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
            if not self.is_known:
                self.send({"stop": f"node 0 does not hear this machine: {STRANGER}; is the folder shared?"})
                self.close()
            self._on_end(self, why if self.is_known else STRANGER)

    def _is_told_secret(self, text: bytes) -> bool:
        return hmac.compare_digest(text, f"{self._secret}\n".encode())


def _peer_of(connection: socket.socket) -> str:
    with suppress(OSError):
        return str(connection.getpeername()[0]).removeprefix("::ffff:")
    return ""


def listen(port: int, address: str = "") -> socket.socket:
    """Opens the port where the others arrive.

    On the interface by which they know this machine, where the address tells which; else on all.

    Args:
        port: The port.
        address: Name or address by which the others know this machine; empty: all interfaces.

    Raises:
        LaunchError: When it is in use.
    """
    try:
        for host in _own_addresses(address):
            with suppress(_ElsewhereError):
                return _bound(host, port)
        return _bound("", port)
    except OSError as failure:
        raise LaunchError(
            f"port {port} on host {socket.gethostname()} can't be opened: {failure}",
            "choose another `launch.main_port`; a run takes that port and the next one",
        ) from failure


class _ElsewhereError(Exception):
    """An address is no interface's of this machine."""


def _bound(host: str, port: int) -> socket.socket:
    is_everywhere = not host and socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if is_everywhere or ":" in host else socket.AF_INET)
    if is_everywhere:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as failure:
        listener.close()
        if host and failure.errno == errno.EADDRNOTAVAIL:
            raise _ElsewhereError from failure
        raise
    return listener


def _own_addresses(name: str) -> list[str]:
    """Addresses that a name may have on this machine's interfaces, IPv4 first.

    A loopback counts only where it was asked for: many machines call themselves 127.0.1.1 (Debian's /etc/hosts), where
    the others find another address.
    """
    if not name:
        return []
    found: set[str] = set()
    with suppress(OSError, UnicodeError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    usable = [
        address
        for address in found
        if name in (address, "localhost") or not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    ]
    return sorted(usable, key=lambda address: (":" in address, address))


def stop_listening(listener: socket.socket) -> None:
    """Closes a port for good: Linux would give one more caller to a thread that waits in `accept`."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def call(node: Node, who: str, seconds: float) -> socket.socket:
    """Connects to machine 0, which may not be there yet, and says the run's secret.

    Raises:
        LaunchError: When it isn't by then.
    """
    deadline = time.monotonic() + seconds
    address, port = node.address, node.control_port
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=min(10.0, seconds))
            connection.sendall(f"{node.secret}\n".encode())
            return connection
        except OSError as failure:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise LaunchError(
                    f"{who} can't reach node 0 at {address}:{port} (tried for {seconds:.0f} s): {failure}",
                    "check `launch.main_address`, the firewall, and that node 0 was started",
                ) from failure
            time.sleep(RETRY_SECONDS)
