"""The door to the training process: writes its run directory, has it run, and reads how it ended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from launcher.cluster import DEFAULT_PORT, Cluster, Node
from launcher.documents import sync_folder, to_json, write_text
from launcher.engine_config import deepspeed_text
from launcher.engine_limits import engine_limits
from launcher.errors import ConfigError, LauncherError, LaunchError
from launcher.hardware import DeviceKind
from launcher.job import Engine
from launcher.plan import Plan
from launcher.run.lock import end_orphans
from launcher.run.node import clear_leftovers, main_address, note_failure, run_node
from launcher.run.rehearse import rehearsal_order
from launcher.run.render import (
    accelerate_config,
    command_script,
    import_path,
    node_command,
    worker_command,
    worker_environment,
)
from launcher.run.slurm import batch_script
from launcher.run.swap import swap_folder
from launcher.run.task_files import skypilot_text, train_job_text
from launcher.run_paths import RunPaths
from launcher.run_record import WorkerOrder, WorkerOutcome

PRIVATE: Final = 0o700
"""A run directory is its user's alone, and so is a folder of runs that is made for it: examples, logs, weights and the
ledger lie there. A folder that is there already keeps its mode, which is how to share one."""


def prepare_run(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes a run directory: all of it or nothing.

    It is made under another name and renamed, for nobody but the user to enter. An empty folder that is there already
    (it may be a mount, or in a folder that can't be written) is filled instead, worker.json last.

    Raises:
        ConfigError: When the plan asks for what its engine can't do.
        LaunchError: When the directory exists and is not empty, or can't be written.
    """
    if limits := engine_limits(order.job, order.plan):
        raise ConfigError("; ".join(limits))
    root = paths.root
    partial = RunPaths(root.with_name(f".{root.name}.{os.getpid()}.partial"))
    try:
        if root.exists():
            _fill(paths, order, document)
        else:
            _make_private(root.parent)
            partial.root.mkdir(mode=PRIVATE)
            _write_run_files(partial, paths, order, document)
            partial.root.rename(root)
            sync_folder(root.parent)
    except OSError as failure:
        if failure.errno == errno.ENOTEMPTY:
            raise _in_use(root) from failure
        raise LaunchError(f"`{root}` can't be written: {failure}", "choose another `run_dir`") from failure
    finally:
        shutil.rmtree(partial.root, ignore_errors=True)


def _make_private(folder: Path) -> None:
    """Makes a folder and those above it that are missing, for nobody but the user to enter."""
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        with suppress(FileExistsError):  # another launch made it meanwhile
            missing.mkdir(mode=PRIVATE)


def discard_run(paths: RunPaths, keep_folder: bool) -> None:
    """Removes a run directory of which nothing is worth keeping; what can't be removed stays.

    Args:
        paths: The run directory; nobody works in it any more.
        keep_folder: Whether the folder itself was there before the run.
    """
    if not keep_folder:
        shutil.rmtree(paths.root, ignore_errors=True)
        return
    for entry in paths.root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


def _fill(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes a run directory into an empty folder; ENOTEMPTY, as of a rename, when it isn't, or another launch does."""
    if any(paths.root.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    try:
        paths.lock.touch(exist_ok=False)  # of two launches that found it empty one comes first
    except FileExistsError as failure:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY)) from failure
    try:
        _write_run_files(paths, paths, order, document)
    except BaseException:
        paths.lock.unlink()
        raise


def require_compiler(plan: Plan, kind: DeviceKind, variables: Mapping[str, str]) -> None:
    """Checks that DeepSpeed can compile its CPU Adam here, before anything is loaded.

    torch takes `CXX`, or `c++` (2.13, utils/cpp_extension.py, `get_cxx_compiler`).

    Args:
        plan: What is to run.
        kind: Of the devices; on a CPU nothing is compiled.
        variables: The environment.

    Raises:
        LaunchError: When there is no compiler.
    """
    compiler = variables.get("CXX") or "c++"
    compiles = plan.uses_offload and plan.engine is Engine.DEEPSPEED and kind is not DeviceKind.CPU
    if compiles and shutil.which(compiler, path=variables.get("PATH")) is None:
        raise LaunchError(
            f"the plan offloads, for which DeepSpeed compiles its CPU Adam, and there is no C++ compiler `{compiler}`",
            "install one (Debian: g++), name it in CXX, or planner.pin.offload_optimizer=false",
        )


def require_unused(root: Path) -> None:
    """Checks that a run directory is not there or empty, before anything is planned; `prepare_run` has the last word.

    Raises:
        LaunchError: When it holds something.
    """
    with suppress(OSError):  # what is wrong with it, the attempt to write it says
        if any(root.iterdir()):
            raise _in_use(root)


def _in_use(root: Path) -> LaunchError:
    return LaunchError(
        f"`{root}` exists and is not empty",
        "choose another `run_dir`, or continue it with `resume=<run dir>`",
    )


def complete_run(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes anew what follows from a run's order and is not so: power may have gone while a run was rewritten.

    A rewriting that was interrupted is done again, for the order that is there: the old one, or the new one.

    Raises:
        LaunchError: When it can't be written.
    """
    if paths.rewriting.exists():
        rewrite_run(paths, order, document)
    texts = {paths.plan: _document_text(document), **_configurations(paths, paths, order)}
    try:
        for file, text in texts.items():
            if not file.is_file() or file.read_bytes() != text.encode():
                write_text(file, text)
    except OSError as failure:
        raise _unwritable(paths, failure) from failure


def rewrite_run(paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Gives a run directory another order; what was trained so far stays.

    The order comes last. `paths.rewriting` is there until all is written: see `complete_run`.

    Raises:
        LaunchError: When it can't be written.
    """
    scripts = {paths.node_command(node): text for node, text in _scripts(paths, order).items()}
    texts = _texts(paths, paths, order, document)
    try:
        write_text(paths.rewriting, "")
        shutil.rmtree(paths.rehearsal.root, ignore_errors=True)
        for stale in {paths.deepspeed_config, *paths.root.glob("command*.sh")} - {*scripts, *texts}:
            stale.unlink(missing_ok=True)
        for file, text in {**scripts, **texts}.items():
            write_text(file, text)
        for file in scripts:
            file.chmod(_executable(file.stat().st_mode))
        paths.rewriting.unlink()
    except OSError as failure:
        raise _unwritable(paths, failure) from failure


def _unwritable(paths: RunPaths, failure: OSError) -> LaunchError:
    return LaunchError(f"`{paths.root}` can't be written: {failure}", "see that its disk has room")


def _write_run_files(at: RunPaths, paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> None:
    """Writes the files of the run directory `paths` into the folder `at`; takes them back if one can't be."""
    texts = _texts(at, paths, order, document)
    scripts = {at.node_command(node): text for node, text in _scripts(paths, order).items()}
    try:
        for file, text in {**scripts, **texts}.items():
            write_text(file, text)
        for file in scripts:
            file.chmod(_executable(file.stat().st_mode))
    except BaseException:
        shutil.rmtree(at.rehearsal.root, ignore_errors=True)
        for file in (*texts, *scripts):
            file.unlink(missing_ok=True)
        raise


def _texts(at: RunPaths, paths: RunPaths, order: WorkerOrder, document: Mapping[str, Any]) -> dict[Path, str]:
    """Files of the folder `at` that follow from an order; the order itself comes last."""
    texts = {at.job: to_json(order.job) + "\n", at.plan: _document_text(document)}
    if order.job.launch.rehearse:
        rehearsed = rehearsal_order(order)
        texts |= _configurations(at.rehearsal, paths.rehearsal, rehearsed)
        texts[at.rehearsal.worker] = to_json(rehearsed) + "\n"
    texts |= _configurations(at, paths, order)
    cluster = order.job.launch.cluster
    if cluster is Cluster.SLURM:
        texts[at.batch_script] = batch_script(paths, order, import_path(os.environ), os.getcwd())
    elif cluster is Cluster.SKYPILOT:
        texts[at.skypilot_task] = skypilot_text(paths, order)
    elif cluster is Cluster.KUBERNETES:
        texts[at.train_job] = train_job_text(paths, order)
    return {**texts, at.worker: to_json(order) + "\n"}


def _document_text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _configurations(at: RunPaths, paths: RunPaths, order: WorkerOrder) -> dict[Path, str]:
    """Files of the folder `at` that accelerate and DeepSpeed read."""
    texts = {at.accelerate_config: accelerate_config(order.job.hardware, order.plan, paths)}
    if order.plan.engine is Engine.DEEPSPEED:
        folder = swap_folder(order.job.hardware, paths, socket.gethostname()) if order.plan.swaps else ""
        texts[at.deepspeed_config] = deepspeed_text(order.job, order.plan, str(folder))
    return texts


def _scripts(paths: RunPaths, order: WorkerOrder) -> dict[int, str]:
    """The command of each machine that is started by hand, as a script; of one machine alone what `launch` starts."""
    plan, folder = order.plan, os.getcwd()
    if order.job.launch.cluster.is_elsewhere:
        return {}  # the cluster says which machine is which
    if plan.num_nodes == 1:
        environment = worker_environment(order.job.hardware, os.environ, plan)
        return {0: command_script(worker_command(paths, plan), environment, folder)}
    return {
        node.rank: command_script(node_command(paths, node), import_path(os.environ), folder)
        for node in nodes_of(order)
    }


def nodes_of(order: WorkerOrder) -> tuple[Node, ...]:
    """The machines of a run whose node 0 is this one; one machine alone has no address.

    Raises:
        LaunchError: When the others could not reach this machine.
    """
    spec = order.job.launch
    if order.plan.num_nodes == 1:
        return (Node(port=spec.main_port),)
    address, port = main_address(spec.main_address), spec.main_port or DEFAULT_PORT
    return tuple(Node(rank, address, port) for rank in range(order.plan.num_nodes))


def _executable(mode: int) -> int:
    """Lets those run a file who may read it."""
    return mode | (mode & 0o444) >> 2


def launch_worker(
    paths: RunPaths,
    order: WorkerOrder,
    show: Callable[[str], None],
    grace_seconds: float | None = None,
    rehearsed: Callable[[], None] = lambda: None,
) -> WorkerOutcome:
    """Runs the worker of a prepared run to its end; why it failed is left in the run directory too.

    To be called by who holds the run directory (`sole_launcher`).

    Args:
        paths: The run directory.
        order: What the worker does.
        show: Called with every line that the worker reports.
        grace_seconds: How long an interrupted worker may take to save; None: as the job says.
        rehearsed: Called when a rehearsal has ended well.

    Raises:
        Interrupted: When it was stopped before it could say how it ended.
        LaunchError: When it ended without saying how.
    """
    grace = float(order.job.launch.grace_seconds) if grace_seconds is None else grace_seconds
    end_orphans(paths, order.plan.world_size, show)
    clear_leftovers(paths, order.plan, show)
    try:
        return _launch(paths, order, show, grace, rehearsed)
    except LauncherError as failure:
        note_failure(paths, 0, failure)
        raise


def _launch(
    paths: RunPaths,
    order: WorkerOrder,
    show: Callable[[str], None],
    grace_seconds: float,
    rehearsed: Callable[[], None],
) -> WorkerOutcome:
    first, *others = nodes_of(order)
    for node in others:
        show(f"node {node.rank}    sh {paths.node_command(node.rank)}")
    if others:
        show(f"waiting for {len(others)} nodes, at most {order.job.launch.connect_seconds} s")
    return run_node(paths, order, first, show, grace_seconds, rehearsed)
