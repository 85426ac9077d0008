"""Machines that wait while machine 0 plans: real sockets on the loopback, a thread for each machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cluster import Node
from launcher.documents import write_document
from launcher.errors import LaunchError
from launcher.job import Engine
from launcher.run import waiting_room as module
from launcher.run.channel import call
from launcher.run.meeting import Hello, MainMeeting, Meeting, NodeMeeting, NotOfThisRun
from launcher.run.waiting_room import is_called_back, waiting_room
from launcher.run_paths import RunPaths
from tests.tiny_job import tiny_order


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
        with connection.makefile("rb") as told:
            assert [told.readline(), told.readline()] == [
                b"\n",
                b'{"waiting": 1}\n',
            ]  # first the secret: none here
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


def main_meeting(port: int, num_nodes: int, secret: str = "") -> tuple[threading.Thread, list[MainMeeting]]:
    """Machine 0, which waits for the others, and where its meeting will be."""
    found: list[MainMeeting] = []
    node = Node(0, "127.0.0.1", port, secret)
    hello = Hello(0, "a", {}, "x")
    main = threading.Thread(target=lambda: found.append(MainMeeting(node, num_nodes, hello, 20.0)))
    main.start()
    call(node, "a test", 20.0).close()  # its port is open; who says nothing is nobody
    return main, found


def node_meeting(port: int, number: int, host: str, secret: str = "") -> NodeMeeting:
    """Another machine, once all are there."""
    return NodeMeeting(Node(number, "127.0.0.1", port, secret), Hello(number, host, {}, "x"), 20.0)


def meetings(port: int, secret: str = "") -> tuple[MainMeeting, NodeMeeting]:
    """Two machines that have met."""
    main, found = main_meeting(port, 2, secret)
    other = node_meeting(port, 1, "b", secret)
    main.join()
    return found[0], other


def side_by_side(*parts: Callable[[], object]) -> None:
    """Runs each in a thread of its own, to their ends."""
    threads = [threading.Thread(target=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


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


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "node 1 on host c is one too many: the run has a node 1 already, on host b"),
        (0, "node 0 on host c is one too many: the run has a node 0 already, on host a"),
        (3, "node 3 on host c is none of this run's, which has nodes 0 to 2"),
    ],
)
def test_a_second_process_for_a_node_is_sent_away_and_the_others_meet(
    number: int, words: str, port: int
) -> None:
    main, found = main_meeting(port, 3)
    others: list[NodeMeeting] = []
    first = threading.Thread(target=lambda: others.append(node_meeting(port, 1, "b")))
    first.start()
    time.sleep(1.0)
    with pytest.raises(NotOfThisRun) as refused:
        node_meeting(port, number, "c")
    assert refused.value.message == words and refused.value.exit_code == 6
    others.append(node_meeting(port, 2, "d"))
    main.join()
    first.join()
    parts: tuple[Meeting, ...] = (found[0], *others)
    side_by_side(*(lambda part=part: part.gather_again(20.0) for part in parts))
    side_by_side(*(lambda part=part: part.leave("", False) for part in parts))
    assert [part.reason_to_stop() for part in parts] == ["", "", ""]


def test_a_node_that_is_started_twice_leaves_nothing_in_the_run_directory(port: int, tmp_path: Path) -> None:
    """The command itself: how its process ends would else be read as the end of the node that works."""
    paths = RunPaths(tmp_path)
    write_document(paths.worker, tiny_order(tmp_path, Engine.DDP, num_devices=1, num_nodes=2))
    paths.secret.write_text("known")
    before = set(tmp_path.iterdir())
    first, second = meetings(port, "known")
    command = [sys.executable, "-m", "launcher.run.node", str(tmp_path), "--rank", "1"]
    again = subprocess.run(
        [*command, "--address", "127.0.0.1", "--port", str(port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert again.returncode == 6, again.stderr
    assert f"error: node 1 on host {socket.gethostname()} is one too many" in again.stderr
    assert "on host b" in again.stderr and "start each node once" in again.stderr
    assert set(tmp_path.iterdir()) == before
    side_by_side(lambda: first.leave("", False), lambda: second.leave("", False))
    assert first.reason_to_stop() == second.reason_to_stop() == ""


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_machine_that_left_while_another_waits_is_named(who: int, is_first: bool, port: int) -> None:
    """It ended well, so nobody failed: who waits for it would wait until the time is up."""
    parts = meetings(port)
    began = time.monotonic()
    delays = (0.0, 0.5) if is_first else (0.5, 0.0)

    def leave() -> None:
        time.sleep(delays[0])
        parts[who].leave("", lacks_memory=False)

    def wait() -> None:
        time.sleep(delays[1])
        parts[1 - who].gather_again(60.0)
        parts[1 - who].leave("ended", lacks_memory=False)

    side_by_side(leave, wait)
    words = f"nodes {who} on host {'ab'[who]} left after the rehearsal, and others wait for them"
    assert parts[1 - who].reason_to_stop() == words
    assert time.monotonic() - began < 20
