"""Machines that wait while machine 0 plans: real sockets on the loopback, a thread for each machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cluster import Node
from launcher.errors import LaunchError
from launcher.run import waiting_room as module
from launcher.run.meeting import Hello, MainMeeting, NodeMeeting
from launcher.run.waiting_room import is_called_back, waiting_room


@pytest.fixture
def port() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            number = int(first.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", number + 1)):
                    return number
            except OSError:
                continue


@pytest.fixture
def order(tmp_path: Path) -> Path:
    (tmp_path / "worker.json").write_text("the first order")
    return tmp_path / "worker.json"


class Waiting(threading.Thread):
    """One of the other machines."""

    def __init__(self, rank: int, port: int, order: Path) -> None:
        super().__init__(daemon=True)
        self._asked: Callable[[], bool] = lambda: is_called_back(Node(rank, "127.0.0.1", port), order)
        self.answer: bool | str = "none"
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._asked()
        except LaunchError as failure:
            self.answer = failure.message

    def wait(self) -> bool | str:
        self.join(timeout=60)
        return self.answer


def test_all_begin_with_the_next_order(port: int, order: Path) -> None:
    others = [Waiting(rank, port, order) for rank in (1, 2)]  # they may call before the room is open
    time.sleep(0.2)
    with waiting_room(Node(0, "127.0.0.1", port), 3) as room:
        assert room.missing == ""
        assert [other.answer for other in others] == ["none", "none"]
        order.write_text("the next order")
        room.call_back(order)
    assert [other.wait() for other in others] == [True, True]


def test_an_order_that_is_seen_late_is_waited_for(port: int, order: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "as machine 1 sees it"
    theirs.write_text("the first order")
    other = Waiting(1, port, theirs)
    with waiting_room(Node(0, "127.0.0.1", port), 2) as room:
        order.write_text("the next order")
        room.call_back(order)
    time.sleep(0.3)
    assert other.answer == "none"
    theirs.write_text("the next order")
    assert other.wait() is True


def test_without_a_next_order_all_go_home(port: int, order: Path) -> None:
    others = [Waiting(rank, port, order) for rank in (1, 2)]
    with pytest.raises(ValueError, match="can't be traced"), waiting_room(Node(0, "127.0.0.1", port), 3):
        raise ValueError("can't be traced")
    assert [other.wait() for other in others] == [False, False]


def test_machines_that_do_not_wait_are_named(port: int, order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 2.0)
    present = Waiting(2, port, order)
    with waiting_room(Node(0, "127.0.0.1", port), 4) as room:
        assert room.missing == "nodes 1, 3 do not wait for a next plan (2 s)"
    assert present.wait() is False
    answer = Waiting(1, port, order).wait()
    assert isinstance(answer, str) and "can't reach node 0" in answer


def test_who_waits_notices_that_machine_0_is_gone(port: int, order: Path) -> None:
    with socket.create_server(("127.0.0.1", port + 1)) as machine:
        other = Waiting(1, port, order)
        connection, _ = machine.accept()
        assert b'"waiting": 1' in connection.recv(100)
        connection.close()
    answer = other.wait()
    assert isinstance(answer, str) and "node 0 is gone" in answer


def test_a_port_in_use_is_named(port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        waiting_room(Node(0, "127.0.0.1", port), 2) as room,
    ):
        assert f"port {port + 1}" in room.missing


def test_one_machine_waits_for_nobody(order: Path) -> None:
    with waiting_room(Node(), 1) as room:
        assert room.missing == ""
        room.call_back(order)


def meetings(port: int) -> tuple[MainMeeting, NodeMeeting]:
    """Two machines that have met."""
    found: list[MainMeeting] = []
    node = Node(0, "127.0.0.1", port)
    main = threading.Thread(target=lambda: found.append(MainMeeting(node, 2, Hello(0, "a", {}, "x"), 20.0)))
    main.start()
    other = NodeMeeting(Node(1, "127.0.0.1", port), Hello(1, "b", {}, "x"), 20.0)
    main.join()
    return found[0], other


@pytest.mark.parametrize(
    ("main", "other"),
    [(("gloo lost a peer", False), ("no room", True)), (("no room", True), ("ended", False))],
)
def test_all_know_that_it_was_memory_whoever_says_so(
    port: int, order: Path, main: tuple[str, bool], other: tuple[str, bool]
) -> None:
    """Also who spoke first, and only felt that another was gone; the port is free for the waiting room at once."""
    first, second = meetings(port)
    leaving = threading.Thread(target=lambda: first.leave(*main))
    leaving.start()
    time.sleep(0.3)
    second.leave(*other)
    waiting = Waiting(1, port, order)
    leaving.join()
    assert first.lacks_memory() and second.lacks_memory()
    with waiting_room(Node(0, "127.0.0.1", port), 2) as room:
        assert room.missing == ""
    assert waiting.wait() is False


def test_other_failures_are_not_memory(port: int) -> None:
    first, second = meetings(port)
    leaving = threading.Thread(target=lambda: first.leave("", lacks_memory=False))
    leaving.start()
    second.leave("rank 1 was killed", lacks_memory=False)
    leaving.join()
    assert first.reason_to_stop() == "rank 1 was killed"
    assert not first.lacks_memory() and not second.lacks_memory()
