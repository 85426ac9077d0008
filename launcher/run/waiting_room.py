"""Out of memory on several machines: the others wait while machine 0 makes the next plan, and begin again together.

They have said goodbye to each other by then (`meeting.py`), so they all know that it was memory. Whoever waits notices
within seconds when machine 0 is gone.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from launcher.cluster import Node
from launcher.errors import LaunchError
from launcher.run.channel import Line, Message, call, listen, stop_listening
from launcher.run.meeting import order_digest

GATHER_SECONDS: Final = 60.0
"""How long machine 0 waits for the others before it plans, and they for its port to be open."""
SEEN_SECONDS: Final = 120.0
"""How long a machine may take to see a file that another one has written: NFS keeps attributes for up to 60 s (`acregmax`
and `acdirmax` of nfs(5))."""
POLL_SECONDS: Final = 0.5


class WaitingRoom:
    """Machine 0's side.

    Args:
        node: This machine.
        num_nodes: How many there are; one alone waits for nobody.
    """

    def __init__(self, node: Node, num_nodes: int) -> None:
        self._changed = threading.Condition()
        self._lines: dict[int, Line] = {}
        self._listener: socket.socket | None = None
        self.missing = ""
        """Why no next plan would help: machines that don't wait; empty: all do."""
        if num_nodes > 1:
            self._gather(node, num_nodes)

    def call_back(self, order: Path) -> None:
        """Tells all who wait which order they begin with; without, they are told that there is none when this closes."""
        if self._listener is not None:  # whoever is told may call at once, and means the next meeting
            stop_listening(self._listener)
        self._dismiss(order_digest(order))

    def close(self) -> None:
        """Sends home who still waits."""
        self._dismiss("")
        if self._listener is not None:
            stop_listening(self._listener)
        if self._lines:
            time.sleep(0.1)  # what was sent should arrive before the connection is gone
        for line in self._lines.values():
            line.close()

    def _gather(self, node: Node, num_nodes: int) -> None:
        try:
            self._listener = listen(node.control_port, node.address)
        except LaunchError as failure:
            self.missing = failure.message
            return
        threading.Thread(target=self._accept, args=(self._listener, node.secret), daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: len(self._lines) == num_nodes - 1, GATHER_SECONDS)
            missing = [str(number) for number in range(1, num_nodes) if number not in self._lines]
        if missing:
            self.missing = f"nodes {', '.join(missing)} do not wait for a next plan ({GATHER_SECONDS:.0f} s)"

    def _accept(self, listener: socket.socket, secret: str) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                connection, _ = listener.accept()
                Line(connection, self._heard, self._lost, secret).start()

    def _heard(self, line: Line, message: Message) -> None:
        if "waiting" not in message:
            line.close()
            return
        line.node = int(message["waiting"])
        with self._changed:
            self._lines[line.node] = line
            self._changed.notify_all()

    def _lost(self, line: Line, why: str) -> None:
        """Whoever is gone is missed when the machines meet again."""

    def _dismiss(self, digest: str) -> None:
        for line in self._lines.values():
            line.send({"next": digest})


@contextmanager
def waiting_room(node: Node, num_nodes: int) -> Iterator[WaitingRoom]:
    """The other machines of a run that ended for want of memory, while machine 0 makes its next plan."""
    room = WaitingRoom(node, num_nodes)
    try:
        yield room
    finally:
        room.close()


def is_called_back(node: Node, order: Path) -> bool:
    """Waits while machine 0 plans; whether there is a next order, which this machine sees then.

    Args:
        node: This machine, another than machine 0.
        order: Where the order lies in the run directory.

    Raises:
        LaunchError: When machine 0 doesn't plan, goes away meanwhile, or its order can't be seen here.
    """
    answered, answers = threading.Event(), [""]
    who = f"node {node.rank} on host {socket.gethostname()}"

    def heard(line: Line, message: Message) -> None:
        answers.append(str(message["next"]))
        answered.set()

    line = Line(call(node, who, GATHER_SECONDS), heard, lambda line, why: answered.set())
    line.start()
    line.send({"waiting": node.rank})
    answered.wait()
    line.close()
    if len(answers) == 1:
        raise LaunchError(f"{who} waited for the next plan, and node 0 is gone")
    digest = answers[1]
    return bool(digest) and _sees(order, digest, who)


def _sees(order: Path, digest: str, who: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while order_digest(order) != digest:
        if time.monotonic() > deadline:
            raise LaunchError(f"{who} has not seen the next plan in `{order}` within {SEEN_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    return True
