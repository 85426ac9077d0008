"""Child processes that are forked from one that has imported what they need: the imports are made once.

They lie in a process group of their own, so that an interrupt of the terminal does not reach them, and nothing that one
of them started outlives the pool.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any


class ForkedPool:
    """Runs functions in child processes, as `ProcessPoolExecutor` does.

    Args:
        num_processes: How many work at a time.
        prepare: Runs once, before the first of them is forked; a function of a module, as all that is submitted.
        arguments: Its arguments.
    """

    def __init__(self, num_processes: int, prepare: Callable[..., object], *arguments: object) -> None:
        context = get_context("spawn")
        self._connection, far = context.Pipe()
        server = context.Process(target=_serve, args=(far, num_processes, prepare, arguments))
        server.start()
        far.close()
        self._number = 0
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._outbox: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._is_broken = False
        self._end = weakref.finalize(self, _end, server, self._outbox)  # at the end of the program too
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Runs a function with its arguments in one of the processes, in the order of asking.

        Its exceptions are the future's; `BrokenProcessPool` when a process died.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._is_broken:
                future.set_exception(BrokenProcessPool("a child process died"))
                return future
            self._number += 1
            self._waiting[self._number] = future
            self._outbox.put((self._number, function, arguments))
        return future

    def close(self) -> None:
        """Ends the processes; what they were asked for is cancelled."""
        with self._lock:
            self._is_broken = True
            for future in self._waiting.values():
                future.cancel()
            self._waiting.clear()
        self._end()

    def _write(self) -> None:
        while (question := self._outbox.get()) is not None:
            with suppress(OSError):  # the reader notices that nobody is there
                self._connection.send(question)

    def _read(self) -> None:
        while True:
            try:
                number, succeeded, answer = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._waiting.pop(number, None)
            if future is not None and succeeded:
                future.set_result(answer)
            elif future is not None:
                future.set_exception(answer)
        with self._lock:
            self._is_broken = True
            lost, self._waiting = self._waiting, {}
        for future in lost.values():
            future.set_exception(BrokenProcessPool("a child process died"))
        self._connection.close()


def _end(server: BaseProcess, outbox: SimpleQueue[tuple[Any, ...] | None]) -> None:
    outbox.put(None)
    try:
        os.killpg(server.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet, and no children
        server.kill()
    server.join()


def _serve(
    connection: Connection, num_processes: int, prepare: Callable[..., object], arguments: Sequence[object]
) -> None:
    """Imports, forks, and hands on questions and answers until the other end is closed."""
    os.setpgid(0, 0)
    prepare(*arguments)
    gc.freeze()  # what was imported stays, and stays shared
    idle: list[Connection] = []
    for _ in range(num_processes):
        near, far = get_context("fork").Pipe()
        get_context("fork").Process(target=_work, args=(far, [connection, near, *idle])).start()
        far.close()
        idle.append(near)
    questions: deque[bytes] = deque()
    busy: set[Connection] = set()
    with suppress(EOFError, OSError):  # the asker has gone, or a process died
        while True:
            for ready in wait([connection, *busy]):
                assert isinstance(ready, Connection)
                message = ready.recv_bytes()
                if ready is connection:
                    questions.append(message)
                else:
                    connection.send_bytes(message)
                    busy.remove(ready)
                    idle.append(ready)
            while idle and questions:
                worker = idle.pop()
                worker.send_bytes(questions.popleft())
                busy.add(worker)
    os.killpg(0, signal.SIGKILL)


def _work(connection: Connection, others: Sequence[Connection]) -> None:
    """Answers one question after another."""
    for other in others:
        other.close()
    while True:
        number, function, arguments = connection.recv()
        try:
            connection.send((number, True, function(*arguments)))
        except Exception as failure:  # the asker's to handle
            connection.send((number, False, failure))
