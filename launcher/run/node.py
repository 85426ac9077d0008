"""One machine's part of a run on several: meets the others, runs the workers, ends them when another machine fails.

Machine 0's part is done by `launch` itself, the others run
`python -m launcher.run.node <run directory> --rank <node> --address <of node 0> --port <port>`; where a cluster chose the
machines, all of them run that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil

from launcher.checkpoints import set_torn_aside
from launcher.cluster import Cluster, Node
from launcher.documents import read_document, write_document
from launcher.errors import Interrupted, LauncherError, LaunchError, WorkerOutOfMemory
from launcher.plan import Plan
from launcher.redaction import redacted
from launcher.run.another_plan import BILL, has_another_plan, plan_anew
from launcher.run.disk import rehearsed_bytes, require_disk
from launcher.run.endings import raise_for_outcome, read_outcome
from launcher.run.meeting import Alone, Hello, MainMeeting, Meeting, NodeMeeting, NotOfThisRun, order_digest
from launcher.run.ranks import redact_rank_logs
from launcher.run.rehearse import MARK, discard_results, is_due
from launcher.run.render import worker_command, worker_environment
from launcher.run.secret import with_secret
from launcher.run.supervise import SAVE_GRACE_SECONDS, Ending, supervise
from launcher.run.swap import remove_swapped, require_drive, require_swapping
from launcher.run_paths import RunPaths
from launcher.run_record import Status, WorkerOrder, WorkerOutcome
from launcher.run_status import NodeFailure
from launcher.stored_secrets import known_secrets

COMPARED: Final = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes")
"""Libraries that must be the same on every machine: they decide what is computed, or what is sent."""
PATIENCE_SECONDS: Final = 300.0
"""How long a machine waits that can't read in the run directory how long to wait."""


def run_node(
    paths: RunPaths,
    order: WorkerOrder,
    node: Node,
    show: Callable[[str], None],
    grace_seconds: float = SAVE_GRACE_SECONDS,
    rehearsed: Callable[[], None] = lambda: None,
) -> WorkerOutcome:
    """Runs one machine's workers from the meeting with the other machines to the common end; first their rehearsal.

    Args:
        paths: The run directory, in a folder that all machines share.
        order: What the workers do.
        node: This machine.
        show: Called with every line that the workers report; only rank 0 does.
        grace_seconds: How long interrupted workers may take to save.
        rehearsed: Called when a rehearsal has ended well.

    Raises:
        NotOfThisRun: When the run has another process as this machine.
        LauncherError: When machines don't meet, or the run ended without an outcome.
        WorkerOutOfMemory: When it did for want of memory, on whichever machine.
    """
    meeting = meet(paths, order, node)
    # all see the same now: machine 0 has looked through the checkpoints before
    acts = (paths.rehearsal, paths) if is_due(paths) else (paths,)
    failure: LauncherError | None = LaunchError(f"node {node.rank} on host {socket.gethostname()} was ended")
    try:
        for act in acts:  # what a launcher left that was killed
            remove_swapped(order.plan, act, _ranks_of(node, order.plan))
        require_drive(order.plan, order.job.hardware, order.predicted.nvme)
        require_swapping(
            order.plan, order.predicted.nvme, worker_environment(order.job.hardware, os.environ, order.plan)
        )
        for act in acts:
            task = order if act == paths else read_document(act.worker, WorkerOrder)
            shown = show if act == paths else lambda line: show(MARK + line)
            ending = _supervised(act, task, node, meeting, shown, grace_seconds)
            failure = _failure(act, task, ending)
            if act == paths or failure or ending.exit_code or ending.interrupted:
                break
            meeting.gather_again(float(order.job.launch.connect_seconds))
            if node.rank == 0:
                rehearsed()
                needed_bytes = rehearsed_bytes(act, order.job.training)
                discard_results(act)
                require_disk(paths.root, needed_bytes)
    except LauncherError as problem:
        failure = problem
        raise
    finally:
        meeting.leave("" if failure is None else failure.message, isinstance(failure, WorkerOutOfMemory))
    lost = meeting.reason_to_stop() if ending.exit_code or ending.stopped_because else ""
    ending = replace(ending, stopped_because=ending.stopped_because or lost)
    try:
        return read_outcome(paths, order.plan, ending) if act == paths else _bad_rehearsal(act, task, ending)
    except LaunchError as failure:
        if meeting.lacks_memory():
            raise WorkerOutOfMemory(failure.message, failure.hint) from failure
        raise


def _supervised(
    paths: RunPaths,
    order: WorkerOrder,
    node: Node,
    meeting: Meeting,
    show: Callable[[str], None],
    grace_seconds: float,
) -> Ending:
    """Runs this machine's workers of a run, or of its rehearsal."""
    environment = {**os.environ, **worker_environment(order.job.hardware, os.environ, order.plan)}
    environment |= _network_environment(node, environment)
    command = worker_command(paths, order.plan, node)
    pid = paths.pid(node.rank * order.plan.num_devices)
    is_slurm = order.job.launch.cluster is Cluster.SLURM
    stop = meeting.reason_to_stop
    try:
        return supervise(
            command, environment, paths.node_log(node.rank), pid, show, grace_seconds, stop, shields=is_slurm
        )
    finally:
        redact_rank_logs(paths, known_secrets(environment))
        remove_swapped(order.plan, paths, _ranks_of(node, order.plan))


def _ranks_of(node: Node, plan: Plan) -> range:
    return range(node.rank * plan.num_devices, (node.rank + 1) * plan.num_devices)


def _bad_rehearsal(paths: RunPaths, order: WorkerOrder, ending: Ending) -> WorkerOutcome:
    """How a rehearsal ended that did not end well: so does the run, before its first step."""
    try:
        outcome = read_outcome(paths, order.plan, ending)
    except LauncherError as failure:
        raise type(failure)(f"in the rehearsal: {failure.message}", failure.hint) from failure
    message = f"in the rehearsal: {outcome.message}"
    if outcome.status in (Status.INTERRUPTED, Status.TERMINATED):
        message = "stopped in the rehearsal, before the first step"
    elif outcome.status is Status.DONE:  # the workers were done, and what started them failed
        message = f"the rehearsal ended with exit code {ending.exit_code}; its log is `{paths.log}`"
        return replace(outcome, status=Status.FAILED, message=message, steps=0)
    return replace(outcome, message=message, steps=0)


def _failure(paths: RunPaths, order: WorkerOrder, ending: Ending) -> LauncherError | None:
    """Why this machine's part did not end well; None when it did, or when the run was interrupted."""
    if ending.exit_code == 0:
        return None
    try:
        raise_for_outcome(read_outcome(paths, order.plan, ending), paths, order.plan.world_size)
    except Interrupted:
        return None
    except LauncherError as failure:
        return failure
    return None


def meet(paths: RunPaths, order: WorkerOrder, node: Node) -> Meeting:
    """Waits for the other machines, and compares.

    Raises:
        LaunchError: When one stays away, or they can't train together.
    """
    if order.plan.num_nodes == 1:
        return Alone()
    hello, seconds = hello_of(node, paths.worker), float(order.job.launch.connect_seconds)
    node = with_secret(node, paths.secret, seconds)
    if node.rank == 0:
        return MainMeeting(node, order.plan.num_nodes, hello, seconds)
    return NodeMeeting(node, hello, seconds)


def hello_of(node: Node, order: Path) -> Hello:
    """What this machine says of itself."""
    return Hello(node.rank, socket.gethostname(), compared_versions(), order_digest(order))


def compared_versions() -> dict[str, str]:
    """Versions of what must be the same on every machine."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _network_environment(node: Node, environment: Mapping[str, str]) -> dict[str, str]:
    """The network interface for gloo and NCCL; gloo would take that of the machine's name: often the loopback.

    Processes of one machine alone meet on the loopback, where no other machine can reach them. Among several, NCCL
    finds its interfaces itself.
    """
    wanted = {} if node.address else {"NCCL_SOCKET_IFNAME": _interface_of("127.0.0.1")}
    wanted["GLOO_SOCKET_IFNAME"] = _interface_to(node) if node.address else _interface_of("127.0.0.1")
    return {name: interface for name, interface in wanted.items() if interface and name not in environment}


def _interface_to(node: Node) -> str:
    """The interface over which a machine reaches the main one; empty where none is known."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((node.address, node.port))  # sends nothing; the kernel chooses the way
        mine = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == mine for address in addresses) and not (
                node.rank == 0 and name == "lo"
            ):
                return str(name)
        return _interface_of(socket.gethostbyname(node.address))
    return ""


def _interface_of(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return str(name)
    return ""


def main_address(wanted: str) -> str:
    """Address under which the other machines reach this one.

    Args:
        wanted: The user's; empty: this machine's name, or, where that means the loopback, its address on the network.

    Raises:
        LaunchError: When the machine has no address that others could reach.
    """
    if wanted:
        return wanted
    with suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return socket.gethostname()
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        found: str = probe.getsockname()[0]
        return found
    raise LaunchError(
        f"host {socket.gethostname()} has no address that other nodes could reach",
        "give one with launch.main_address",
    )


def note_failure(paths: RunPaths, rank: int, failure: LauncherError) -> None:
    """Leaves why a machine's part did not end well; nothing where the run directory can't be written."""
    with suppress(OSError):
        if paths.root.is_dir():
            message = redacted(failure.message, known_secrets(os.environ))
            write_document(paths.failure(rank), NodeFailure(failure.exit_code, message))


def clear_leftovers(paths: RunPaths, plan: Plan, show: Callable[[str], None] = lambda line: None) -> None:
    """Removes what an earlier run in the same directory left of its end; the log of machine 0 is continued.

    Checkpoints that are not whole are set aside, and `show` is called with each.
    """
    for note in set_torn_aside(paths.checkpoints):
        show(note)
    if is_due(paths):
        clear_leftovers(paths.rehearsal, plan)
        discard_results(paths.rehearsal)
        paths.rehearsal.findings.unlink(missing_ok=True)
    ranks, nodes = range(plan.world_size), range(plan.num_nodes)
    of_ranks = (paths.outcome, paths.measured, paths.pid, paths.host, paths.phase)
    leftovers = [file(rank) for file in of_ranks for rank in ranks] + [paths.failure(node) for node in nodes]
    for leftover in (*leftovers, *(paths.node_log(node) for node in nodes if node)):
        leftover.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    """Entry point of a machine that `launch` does not run on; the exit code is the launcher's.

    Errors, such as LaunchError where the run directory is not shared, are shown here, and tell the other machines.
    """
    parser = argparse.ArgumentParser(description="One node's part of a run.")
    parser.add_argument("run_dir")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args(argv[1:])
    paths, node = RunPaths(Path(given.run_dir)), Node(given.rank, given.address, given.port)

    def show(line: str) -> None:
        sys.stderr.write(redacted(line, known_secrets(os.environ)) + "\n")

    replans_left: int | None = None
    while True:
        try:
            order = _order_of(paths, node)
            if replans_left is None:
                replans_left = order.job.launch.max_replans
            if order.plan.num_nodes == 1:
                node = Node(port=order.job.launch.main_port)
            if node.rank == 0:  # before the machines meet: none of the others has begun
                clear_leftovers(paths, order.plan, show)
            grace_seconds = float(order.job.launch.grace_seconds)
            outcome = run_node(paths, order, node, show, grace_seconds)
            raise_for_outcome(outcome, paths, order.plan.world_size)
        except LauncherError as failure:
            if not isinstance(failure, NotOfThisRun):  # the note would be taken for that of the node which is
                note_failure(paths, node.rank, failure)
            if isinstance(failure, WorkerOutOfMemory):
                goes_on = f"`launch resume={paths.root}` goes on, with a smaller plan if there is one"
                try:
                    if replans_left and has_another_plan(paths, order, node, show):
                        replans_left -= 1
                        continue
                    if not replans_left and node.rank == 0:
                        plan_anew(paths, order, node, show, BILL)
                    failure = WorkerOutOfMemory(failure.message, f"{failure.hint}; {goes_on}", failure.rank)
                except Interrupted as stop:  # that it was memory stays noted
                    failure = type(stop)(f"{stop.message}, after: {failure.message}", goes_on)
            show(f"error: {failure}")
            return failure.exit_code
        return 0


def _order_of(paths: RunPaths, node: Node) -> WorkerOrder:
    """The order in a run directory.

    Raises:
        LaunchError: When this machine does not see the directory; machine 0 is told.
    """
    if not paths.worker.exists():
        with suppress(LaunchError):  # it says the same, in machine 0's words
            NodeMeeting(node, hello_of(node, paths.worker), PATIENCE_SECONDS)
        raise LaunchError(
            f"`{paths.root}` is not there on host {socket.gethostname()}",
            "the run directory must lie in a folder that all nodes share under one name",
        )
    return read_document(paths.worker, WorkerOrder)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
