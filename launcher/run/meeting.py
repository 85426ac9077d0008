"""Several machines as one run: they wait for each other, compare what they have, and end together."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from launcher.cluster import Node
from launcher.errors import LaunchError
from launcher.run.channel import STRANGER, Line, Message, call, listen, stop_listening

GOODBYE_SECONDS: Final = 12.0
"""How long machine 0 waits after a bad end for the others to have ended: two signals, five seconds each
(supervise.py, `TERM_GRACE_SECONDS`), and a little."""


@dataclass(frozen=True)
class Hello:
    """What a machine says of itself."""

    node: int
    """Its number."""
    host: str
    """Its name."""
    versions: Mapping[str, str]
    """Its libraries' versions."""
    order_digest: str
    """Digest of the order that lies in its run directory; empty when it sees none."""


class NotOfThisRun(LaunchError):
    """This process is none of the run's machines, and the run goes on without it."""


class Meeting(Protocol):
    """One machine's side of the run."""

    def reason_to_stop(self) -> str:
        """Why the run has to end now; empty while it goes on."""

    def gather_again(self, seconds: float) -> None:
        """Waits until every machine has come so far, or until there is a reason to stop."""

    def leave(self, failure: str, lacks_memory: bool) -> None:
        """Says that this machine's part has ended, and why not well; empty: well. After a bad end all wait for all.

        Args:
            failure: Why it did not end well.
            lacks_memory: Whether that was for want of memory.
        """

    def lacks_memory(self) -> bool:
        """Whether any machine's part ended for want of memory; once it has been left, all machines say the same."""


class Alone:
    """The only machine's side: nobody to wait for, and nobody who stops it."""

    def reason_to_stop(self) -> str:
        """See `Meeting`."""
        return ""

    def gather_again(self, seconds: float) -> None:
        """See `Meeting`."""

    def leave(self, failure: str, lacks_memory: bool) -> None:
        """See `Meeting`."""

    def lacks_memory(self) -> bool:
        """See `Meeting`; who is alone knows."""
        return False


def order_digest(order: Path) -> str:
    """Digest of the order in a run directory, in hexadecimal; empty where there is none."""
    return hashlib.sha256(order.read_bytes()).hexdigest() if order.exists() else ""


def differences(first: Hello, other: Hello) -> str:
    """Why two machines can't train together; empty when they can."""
    who = f"node {other.node} on host {other.host}"
    if not other.order_digest:
        return f"{who} does not see the run directory; it must lie in a folder that all nodes share under one name"
    if other.order_digest != first.order_digest:
        return f"{who} sees another run in the run directory than node 0 on host {first.host}; is the folder shared?"
    unequal = [
        f"{name} {other.versions.get(name, 'none')} there and {first.versions.get(name, 'none')} here"
        for name in sorted({*first.versions, *other.versions})
        if first.versions.get(name) != other.versions.get(name)
    ]
    return (
        f"{who} has other libraries than node 0 on host {first.host}: {'; '.join(unequal)}" if unequal else ""
    )


def why_refused(hello: Hello, hosts: Mapping[int, str], num_nodes: int) -> str:
    """Why who says so is none of the run's machines; empty when it is.

    Args:
        hello: What it says.
        hosts: Names of the machines that are there, by number.
        num_nodes: How many there are to be.
    """
    if not 0 <= hello.node < num_nodes:
        return f"node {hello.node} on host {hello.host} is none of this run's, which has nodes 0 to {num_nodes - 1}"
    if hello.node in hosts:
        return (
            f"node {hello.node} on host {hello.host} is one too many: the run has a node {hello.node} already, "
            f"on host {hosts[hello.node]}"
        )
    return ""


class MainMeeting:
    """Machine 0's side: gathers the others, and passes on why to stop.

    Args:
        node: This machine.
        num_nodes: How many there are.
        hello: What it says of itself.
        seconds: How long it waits for the others.

    Raises:
        LaunchError: When a port is in use, a machine stays away, or two can't train together.
    """

    def __init__(self, node: Node, num_nodes: int, hello: Hello, seconds: float) -> None:
        self._hello = hello
        self._num_nodes = num_nodes
        self._changed = threading.Condition()
        self._hosts = {0: hello.host}
        self._lines: list[Line] = []
        self._ended: set[int] = set()
        self._arrived: set[int] = set()
        self._reason = ""
        self._lacks_memory = False
        self._secret = node.secret
        self._strangers: set[str] = set()
        listen(node.port).close()  # torchrun opens it later, and would fail less clearly
        self._listener = listen(node.control_port, node.address)
        threading.Thread(target=self._accept, daemon=True).start()
        self._gather(seconds)

    def reason_to_stop(self) -> str:
        """See `Meeting`."""
        return self._reason

    def gather_again(self, seconds: float) -> None:
        """See `Meeting`."""
        with self._changed:
            self._arrived.add(0)
        self._stop_if_waiting_is_in_vain()
        with self._changed:
            self._changed.wait_for(lambda: self._reason or len(self._arrived) == self._num_nodes, seconds)
            late = set(self._hosts) - self._arrived
            self._arrived.clear()
        if late and not self._reason:
            self._stop(
                f"nodes {self._named(late)} did not end their rehearsal within {seconds:.0f} s of node 0"
            )
        self._let_go()

    def leave(self, failure: str, lacks_memory: bool) -> None:
        """See `Meeting`; a good end waits for the others' as long as they take."""
        if failure:
            self._stop(failure)
        with self._changed:
            self._lacks_memory |= lacks_memory
            self._ended.add(0)
        self._stop_if_waiting_is_in_vain()
        with self._changed:
            self._changed.wait_for(lambda: self._reason or len(self._ended) == self._num_nodes)
            self._changed.wait_for(lambda: len(self._ended) == self._num_nodes, GOODBYE_SECONDS)
        stop_listening(self._listener)  # who calls from now on means another meeting
        for line in self._lines:
            line.send({"over": True, "lacks_memory": self._lacks_memory})
        time.sleep(0.1)  # what was sent should arrive before the connection is gone
        self._close()

    def lacks_memory(self) -> bool:
        """See `Meeting`."""
        return self._lacks_memory

    def _gather(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._reason or len(self._hosts) == self._num_nodes, seconds)
            missing = [str(number) for number in range(self._num_nodes) if number not in self._hosts]
        if not self._reason and missing:
            self._stop(f"nodes {', '.join(missing)} did not report within {seconds:.0f} s{self._who_else()}")
        if self._reason:
            time.sleep(0.1)
            self._close()
            raise LaunchError(self._reason, "each node runs the command that was printed for it")
        self._let_go()

    def _let_go(self) -> None:
        for line in self._lines:
            if line.node >= 0:  # who has not said which machine it is may yet be refused
                line.send({"go": True})

    def _accept(self) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                connection, _ = self._listener.accept()
                line = Line(connection, self._heard, self._lost, self._secret)
                self._lines.append(line)
                line.start()

    def _heard(self, line: Line, message: Message) -> None:
        if "hello" in message:
            self._greet(line, Hello(**message["hello"]))
        elif line.node < 0:
            return  # it was refused
        elif "arrived" in message:
            with self._changed:
                self._arrived.add(line.node)
                self._changed.notify_all()
            self._stop_if_waiting_is_in_vain()
        elif "ended" in message:
            if message["ended"]:
                self._stop(message["ended"])
            with self._changed:
                self._lacks_memory |= bool(message["lacks_memory"])
                self._ended.add(line.node)
                self._changed.notify_all()
            self._stop_if_waiting_is_in_vain()

    def _greet(self, line: Line, hello: Hello) -> None:
        """Takes a machine in; who can't be one of the run's is sent away, and the run goes on without it."""
        problem = differences(self._hello, hello)
        with self._changed:
            refusal = why_refused(hello, self._hosts, self._num_nodes)
            if not refusal:
                line.node = hello.node
                if problem:
                    self._stop(problem)
                self._hosts[hello.node] = hello.host
                self._changed.notify_all()
        if refusal:
            line.send({"refused": refusal})

    def _stop_if_waiting_is_in_vain(self) -> None:
        """Ends the run where machines wait for one that has left after its rehearsal."""
        with self._changed:
            gone = self._ended if self._arrived else set()
            problem = f"nodes {self._named(gone)} left after the rehearsal, and others wait for them"
        if gone:
            self._stop(problem)

    def _named(self, numbers: set[int]) -> str:
        return ", ".join(f"{number} on host {self._hosts[number]}" for number in sorted(numbers))

    def _who_else(self) -> str:
        found = ", ".join(sorted(self._strangers))
        return f"; {found} called, and saw another run directory or none: {STRANGER}" if found else ""

    def _lost(self, line: Line, why: str) -> None:
        if not line.is_known:
            self._strangers.add(line.peer)
        if line.node not in self._ended and line.node >= 0:
            self._stop(f"node {line.node} on host {self._hosts.get(line.node, '?')} is gone: {why}")
            with self._changed:
                self._ended.add(line.node)
                self._changed.notify_all()

    def _stop(self, reason: str) -> None:
        for line in self._lines:
            line.send({"stop": self._reason or reason})
        with self._changed:
            self._reason = self._reason or reason
            self._changed.notify_all()

    def _close(self) -> None:
        stop_listening(self._listener)
        for line in self._lines:
            line.close()


class NodeMeeting:
    """Another machine's side: reports to machine 0, and listens to it.

    Args:
        node: This machine.
        hello: What it says of itself.
        seconds: How long it waits for machine 0, and for the others.

    Raises:
        NotOfThisRun: When machine 0 has another process under this number.
        LaunchError: When machine 0 can't be reached, or says that the run can't begin.
    """

    def __init__(self, node: Node, hello: Hello, seconds: float) -> None:
        self._may_go = threading.Event()
        self._is_over = threading.Event()
        self._reason = ""
        self._lacks_memory = False
        self._has_left = False
        self._is_refused = False
        who = f"node {hello.node} on host {hello.host}"
        self._line = Line(call(node, who, seconds), self._heard, self._lost)
        self._line.start()
        self._line.send({"hello": asdict(hello)})
        if not self._may_go.wait(seconds):
            self._reason = self._reason or f"the other nodes were not there within {seconds:.0f} s"
        if self._reason:
            self._line.close()
            if self._is_refused:
                raise NotOfThisRun(
                    self._reason, "start each node once, with the command that was printed for it"
                )
            raise LaunchError(self._reason)

    def reason_to_stop(self) -> str:
        """See `Meeting`."""
        return self._reason

    def gather_again(self, seconds: float) -> None:
        """See `Meeting`."""
        self._may_go.clear()
        if self._reason:
            return
        self._line.send({"arrived": True})
        if not self._may_go.wait(seconds):
            self._reason = (
                self._reason or f"the other nodes did not end their rehearsal within {seconds:.0f} s"
            )

    def leave(self, failure: str, lacks_memory: bool) -> None:
        """See `Meeting`."""
        self._has_left = True
        self._line.send({"ended": failure, "lacks_memory": lacks_memory})
        if failure or self._reason:
            self._is_over.wait(2 * GOODBYE_SECONDS)
        else:
            time.sleep(0.1)  # what was sent should arrive before the connection is gone
        self._line.close()

    def lacks_memory(self) -> bool:
        """See `Meeting`."""
        return self._lacks_memory

    def _heard(self, line: Line, message: Message) -> None:
        if "stop" in message:
            self._reason = self._reason or message["stop"]
        elif "refused" in message:
            self._is_refused = True
            self._reason = message["refused"]
        elif "over" in message:
            self._lacks_memory = bool(message["lacks_memory"])
            self._is_over.set()
        self._may_go.set()

    def _lost(self, line: Line, why: str) -> None:
        if not self._has_left:
            self._reason = self._reason or f"node 0 is gone: {why}"
        self._is_over.set()
        self._may_go.set()


def host_name() -> str:
    """Name of this machine."""
    return socket.gethostname()
