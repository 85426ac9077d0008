"""Proves that modules import only what their layer may, heavy libraries have one door each, and nothing grows huge.

    nouns  <  workload  <  planner/ | run/ | worker/ | report/  <  config
        <  contradictions  <  planning  <  reconciliation, recovery  <  workflow  <  publish  <  advice  <  cli

The four folders meet through nouns and through files in a run directory, never by importing each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "launcher"
NOUNS = {
    "architecture",
    "checkpoints",
    "cluster",
    "cluster_limits",
    "data_lengths",
    "documents",
    "domain",
    "engine_config",
    "engine_limits",
    "explanation",
    "errors",
    "hardware",
    "job",
    "job_limits",
    "reading",
    "knob_limits",
    "leak",
    "libraries",
    "memory",
    "optimisation",
    "model",
    "nvme",
    "plan",
    "rates",
    "redaction",
    "resume_limits",
    "stored_secrets",
    "run_paths",
    "run_record",
    "run_status",
    "spellings",
    "step_time",
    "units",
    "whatif",
}
FOLDERS = {"planner", "report", "run", "worker"}
MAY_IMPORT: dict[str, set[str]] = {
    "nouns": {"nouns"},
    "workload": {"nouns", "workload"},
    "planner": {"nouns", "workload", "planner"},
    "report": {"nouns", "report"},
    "run": {"nouns", "run"},
    "worker": {"nouns", "workload", "worker"},
    "overrides": {"nouns"},
    "config": {"nouns", "overrides"},
    "contradictions": {"nouns", "planner", "run", "config"},
    "planning": {"nouns", "planner", "run", "config", "contradictions"},
    "length_choice": {"nouns", "planner", "report", "run"},
    "reconciliation": {"nouns", "planner", "run", "planning"},
    "recovery": {"nouns", "planner", "run", "planning"},
    "resume_plan": {"nouns", "planner", "run", "config", "planning", "recovery"},
    "workflow": {
        "nouns",
        "planner",
        "report",
        "run",
        "config",
        "planning",
        "length_choice",
        "reconciliation",
        "recovery",
        "resume_plan",
    },
    "sweep": {"nouns", "config"},
    "comparison": {"nouns", "config"},
    "publish": {"nouns", "planner", "report", "run", "config", "planning", "workflow"},
    "advice": {
        "nouns",
        "planner",
        "report",
        "run",
        "planning",
        "length_choice",
        "workflow",
        "publish",
        "sweep",
    },
    "history": {"nouns", "planner", "report", "run", "planning", "workflow"},
    "next_plan": {"nouns", "report", "run", "recovery", "workflow"},
    "cli": {
        "nouns",
        "config",
        "contradictions",
        "overrides",
        "workflow",
        "advice",
        "history",
        "sweep",
        "comparison",
        "terminal",
    },
    "terminal": set(),
}
"""Layer of the importing module: layers it may import."""
DOORS: dict[str, set[str]] = {
    "torch": {
        "workload",
        "callbacks",
        "classification",
        "engines",
        "merge",
        "trainers",
        "optimizers",
        "regions",
        "vision",
        "planner.tape",
        "planner.trace",
        "planner.fast_fake",
        "planner.worst_case",
        "planner.attention_twin",
        "planner.attribution",
        "planner.checkpoint",
        "planner.cuda_twin",
        "planner.fake_deepspeed",
        "planner.fake_nvme",
        "planner.fake_offload",
        "planner.fake_world",
        "planner.replica",
        "planner.generation",
        "planner.gloo_twin",
        "planner.kept_logits",
        "planner.kernel_twins",
        "planner.liger_twin",
        "planner.materialize",
        "planner.operations",
        "planner.quantized",
        "planner.quiet",
        "planner.recorder",
        "planner.rehearsal",
        "planner.stand_ins",
        "worker",
    },
    "hydra": {"comparison", "config", "overrides", "sweep"},
    "omegaconf": {"config"},
    "rich": {"report.layout", "terminal"},
    "subprocess": {"run"},
}
"""Library: modules or folders that may import it."""
DOORS["transformers"] = DOORS["peft"] = DOORS["trl"] = DOORS["datasets"] = DOORS["torch"] | {"planner.depth"}
WORKLOAD = {
    "workload",
    "callbacks",
    "classification",
    "engines",
    "loading",
    "merge",
    "optimizers",
    "regions",
    "trainers",
    "vision",
}
"""What is traced and run."""
STANDARD_NOUNS = {"errors", "units"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
HOMELESS = {"utils", "util", "common", "helpers", "helper", "misc", "types"}


@dataclass(frozen=True)
class Import:
    """One import statement."""

    target: str
    """Dotted name of a module: of ours without `launcher.`, of a library in full."""
    is_ours: bool
    line: int
    is_typing_only: bool
    is_inside_function: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `launcher.`."""
    return {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for file in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """All imports of a module, those inside functions and `if TYPE_CHECKING` included."""
    yield from _imports_below(tree, typing_only=False, inside=False)


def _imports_below(node: ast.AST, *, typing_only: bool, inside: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield _import(alias.name, child.lineno, typing_only, inside)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                is_module = full.removeprefix("launcher.") in MODULES
                yield _import(full if is_module else str(child.module), child.lineno, typing_only, inside)
        else:
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_below(child, typing_only=typing_only or guarded, inside=inside or function)


def _import(name: str, line: int, typing_only: bool, inside: bool) -> Import:
    is_ours = name == "launcher" or name.startswith("launcher.")
    return Import(name.removeprefix("launcher."), is_ours, line, typing_only, inside)


IMPORTS = {name: tuple(imports_of(tree)) for name, tree in TREES.items()}


def layer(module: str) -> str:
    """The layer of one of our modules."""
    top = module.split(".")[0]
    return "nouns" if top in NOUNS else "workload" if top in WORKLOAD else top


def is_behind(module: str, doors: set[str]) -> bool:
    """Whether a module is one of the doors, or lies in a folder that is one."""
    return module in doors or module.split(".")[0] in doors


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a graph; empty when there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = visit(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := visit(node, []))), [])


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) >= 35
    known = (
        NOUNS
        | FOLDERS
        | WORKLOAD
        | {
            "config",
            "contradictions",
            "planning",
            "length_choice",
            "reconciliation",
            "recovery",
            "workflow",
            "publish",
        }
        | {
            "overrides",
            "resume_plan",
            "sweep",
            "comparison",
            "advice",
            "history",
            "next_plan",
            "terminal",
            "cli",
            "__init__",
        }
    )
    assert {name.split(".")[0] for name in MODULES} == known


def test_modules_import_only_what_their_layer_may() -> None:
    offenders = [
        f"{name}:{found.line} imports {found.target}"
        for name, imports in IMPORTS.items()
        for found in imports
        if found.is_ours and layer(found.target) not in MAY_IMPORT.get(layer(name), set())
    ]
    assert offenders == []


def test_the_first_nouns_import_the_standard_library_only() -> None:
    for noun in STANDARD_NOUNS:
        assert not any(found.is_ours for found in IMPORTS[noun]), noun


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_their_doors(library: str) -> None:
    offenders = [
        f"{name}:{found.line}"
        for name, imports in IMPORTS.items()
        for found in imports
        if found.target.split(".")[0] == library
        and not found.is_typing_only
        and not is_behind(name, DOORS[library])
    ]
    assert offenders == []


@pytest.mark.parametrize("library", ["torch", "hydra", "omegaconf", "subprocess"])
def test_each_door_leads_somewhere(library: str) -> None:
    used = [name for name, imports in IMPORTS.items() if library in {i.target.split(".")[0] for i in imports}]
    assert used


def test_no_import_cycles() -> None:
    graph = {name: {found.target for found in imports if found.is_ours} for name, imports in IMPORTS.items()}
    assert cycle_in(graph) == []


def test_own_modules_are_imported_at_the_top() -> None:
    """But for one door: `--help` and configuration errors do not wait for the planner."""
    inside = [
        f"{name} imports {found.target}"
        for name, imports in IMPORTS.items()
        for found in imports
        if found.is_ours and found.is_inside_function
    ]
    # --help must not wait for the planner, nor a plan without a picture for the plotting library
    assert sorted(set(inside)) == [
        "advice imports report.plot",
        "cli imports advice",
        "cli imports history",
        "cli imports workflow",
        "publish imports report.html",
        "publish imports report.plot",
    ]


def test_folders_import_nothing_by_themselves() -> None:
    for name, imports in IMPORTS.items():
        if name.endswith("__init__"):
            assert imports == (), name


def test_files_stay_short() -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_stay_short() -> None:
    lengths = {
        f"{name}.{function.name}": (function.end_lineno or function.lineno) - function.lineno + 1
        for name, tree in TREES.items()
        for function in functions(tree)
    }
    assert len(lengths) > 200
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_every_function_has_a_home() -> None:
    assert not HOMELESS & {name.split(".")[-1] for name in MODULES}


# the checks can fail


def test_imports_are_seen_wherever_they_stand() -> None:
    tree = ast.parse(
        "import torch.nn as nn\n"
        "from launcher import job\n"
        "from launcher.planner.search import search\n"
        "def f():\n"
        "    from launcher.run import launch\n"
        "if TYPE_CHECKING:\n"
        "    import hydra\n"
    )
    found = list(imports_of(tree))
    assert [item.target for item in found] == ["torch.nn", "job", "planner.search", "run.launch", "hydra"]
    assert [item.is_ours for item in found] == [False, True, True, True, False]
    assert [item.is_inside_function for item in found] == [False, False, False, True, False]
    assert [item.is_typing_only for item in found] == [False, False, False, False, True]


def test_cycles_are_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_layers_and_doors_tell_modules_apart() -> None:
    assert layer("job") == "nouns" and layer("planner.search") == "planner"
    assert is_behind("worker.train", {"worker"}) and is_behind("planner.tape", {"planner.tape"})
    assert not is_behind("planner.search", {"planner.tape"})
