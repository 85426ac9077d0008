"""Who is heard on the control port: machines of the run, on the interface by which they know machine 0."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import Node
from launcher.errors import LaunchError
from launcher.run.channel import LONGEST_LINE_BYTES, STRANGER, Line, Message, call, listen
from launcher.run.meeting import Hello, MainMeeting, NodeMeeting
from launcher.run.secret import with_secret

SECRET = "5e" * 32


def heard_from(send: Callable[[socket.socket], None], port: int) -> tuple[list[Message], str]:
    """What is heard of a caller, and why its connection ended."""
    messages: list[Message] = []
    ended, why = threading.Event(), [""]

    def end(line: Line, reason: str) -> None:
        why[0] = reason
        ended.set()

    with (
        listen(port, "127.0.0.1") as listener,
        socket.create_connection(("127.0.0.1", port)) as caller,
    ):
        line = Line(listener.accept()[0], lambda _, message: messages.append(message), end, SECRET).start()
        with suppress(OSError):  # who is not heard may have been left before all was said
            send(caller)
            caller.shutdown(socket.SHUT_WR)
        assert ended.wait(30)
        line.close()
    return messages, why[0]


@pytest.mark.parametrize(
    "said", [b"", b"\n", b"5e" * 31 + b"5f\n", b'{"hello": 1}\n', b"5e" * 32, b"x" * 9999]
)
def test_who_does_not_say_the_secret_is_not_heard(said: bytes, port: int) -> None:
    messages, why = heard_from(lambda caller: caller.sendall(said + b'{"ended": "now"}\n'), port)
    assert (messages, why) == ([], STRANGER)


def test_who_says_it_is_heard_up_to_a_line_that_does_not_end(port: int) -> None:
    def send(caller: socket.socket) -> None:
        caller.sendall(SECRET.encode() + b'\n{"arrived": true}\n{"beat": true}\n')
        caller.sendall(b"[" * (LONGEST_LINE_BYTES + 1))

    messages, why = heard_from(send, port)
    assert messages == [{"arrived": True}] and f"within {LONGEST_LINE_BYTES} bytes" in why


def test_strangers_neither_stop_a_meeting_nor_take_part(port: int) -> None:
    main, found = Node(0, "127.0.0.1", port, SECRET), []
    meeting = threading.Thread(
        target=lambda: found.append(MainMeeting(main, 2, Hello(0, "a", {}, "x"), 30.0))
    )
    meeting.start()
    stranger = call(replace(main, rank=1, secret="another"), "node 1", 30.0)
    hello = {"node": 1, "host": "evil", "versions": {}, "order_digest": "x"}
    stranger.sendall(json.dumps({"hello": hello}).encode() + b'\n{"ended": "stop", "lacks_memory": false}\n')
    with pytest.raises(LaunchError, match=STRANGER):
        NodeMeeting(replace(main, rank=1, secret=""), Hello(1, "b", {}, "x"), 30.0)
    assert not found, "nobody of the run has come yet"
    other = NodeMeeting(replace(main, rank=1), Hello(1, "b", {}, "x"), 30.0)
    meeting.join()
    stranger.close()
    assert found[0].reason_to_stop() == ""
    leaving = threading.Thread(target=lambda: found[0].leave("", lacks_memory=False))
    leaving.start()
    other.leave("", lacks_memory=False)
    leaving.join()


def test_a_machine_that_stays_away_is_missed_and_strangers_are_named(port: int) -> None:
    main = Node(0, "127.0.0.1", port, SECRET)
    caller = threading.Timer(0.5, lambda: call(replace(main, secret="another"), "node 1", 30.0))
    caller.start()
    with pytest.raises(
        LaunchError, match=r"nodes 1 did not report within 3 s; 127\.0\.0\.1 called, and saw another"
    ):
        MainMeeting(main, 2, Hello(0, "a", {}, "x"), 3.0)
    caller.join()


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        (
            "192.0.2.1",
            "everywhere",
        ),  # no interface of this machine has it: it is behind a router that translates
        ("no.such.name.invalid", "everywhere"),
        ("", "everywhere"),
    ],
)
def test_the_port_is_open_where_machine_0_is_known(address: str, bound: str, port: int) -> None:
    with listen(port, address) as listener:
        found = listener.getsockname()[0]
    assert found == bound if bound != "everywhere" else found in ("::", "0.0.0.0")


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "launcher.secret"
    assert with_secret(Node(), file, 0.0) == Node() and not file.exists(), "one machine alone needs none"
    late: list[Node] = []
    other = threading.Thread(target=lambda: late.append(with_secret(Node(1, "a", 1), file, 30.0)))
    other.start()
    time.sleep(0.2)
    first = with_secret(Node(0, "a", 1), file, 0.0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(first.secret) == 64
    assert with_secret(Node(0, "a", 1), file, 0.0) == first
    other.join()
    assert late[0].secret == first.secret and first.secret not in repr(first)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(LaunchError, match=r"node 1 has not seen .*within 0 s"):
        with_secret(Node(1, "a", 1), tmp_path / "elsewhere", 0.0)
    with pytest.raises(LaunchError, match="can't be written"):
        with_secret(Node(0, "a", 1), tmp_path / "nowhere" / "launcher.secret", 0.0)
    file.unlink()
    file.mkdir()
    with pytest.raises(LaunchError, match="can't be read"):
        with_secret(Node(0, "a", 1), file, 0.0)
