"""A worker ends as it stands: what was to be done at the end is, and no thread is met by half an interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

POOL = """
import atexit, time
from concurrent.futures import ThreadPoolExecutor

atexit.register(print, "at the end")
pool = ThreadPoolExecutor(1)  # its thread waits for more, and would for ever
pool.submit(lambda: (time.sleep(0.2), print("the thread")))
"""
DAEMON = """
import builtins, threading, time

class Slow:  # the interpreter takes this apart late, and with it the time of the thread
    def __del__(self):
        print("taken apart")

def work():
    while True:
        time.sleep(0.01)

builtins.slow = Slow()
threading.Thread(target=work, daemon=True).start()
"""
LEAVE = "from launcher.worker.__main__ import leave; leave(7)"


@pytest.mark.parametrize(("program", "said"), [(POOL, "the thread\nat the end\n"), (DAEMON, "")])
def test_a_worker_leaves_with_its_exit_code_when_all_is_done(program: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program + LEAVE], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, said, "")
