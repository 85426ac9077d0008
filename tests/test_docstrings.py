"""Proves that public functions name the errors they raise, and that the nouns can't be changed once they are made.

What is checked is what can be read off the source: an error that a function raises itself, by a statement of its own.
Errors of the functions that it calls are theirs to name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layering import TREES

Function = ast.FunctionDef | ast.AsyncFunctionDef
ANY_ERROR = "Raises:"
"""What a docstring must have where the class of the error is chosen at run time."""


def own_raises(node: ast.AST) -> Iterator[ast.Raise]:
    """The raise statements of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            yield child
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield from own_raises(child)


def public_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods whose names, and whose classes' names, start without an underscore."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public_functions(child, f"{prefix}{child.name}.")
            else:
                yield prefix + child.name, child


def makers_of_errors() -> dict[str, str]:
    """Functions that return an error to be raised, each with the class that it is annotated to return."""
    return {
        function.name: function.returns.id
        for tree in TREES.values()
        for function in ast.walk(tree)
        if isinstance(function, Function) and isinstance(function.returns, ast.Name)
    }


def raised(statement: ast.Raise, makers: dict[str, str]) -> str | None:
    """The name of the error that a statement makes; None where it raises one that is there already."""
    if not isinstance(statement.exc, ast.Call):
        return None
    made = statement.exc.func
    if isinstance(made, ast.Name):
        return makers.get(made.id, made.id)
    return made.attr if isinstance(made, ast.Attribute) else ANY_ERROR


def errors_of(function: Function, makers: dict[str, str]) -> list[str]:
    """The errors that a function makes and raises itself."""
    return sorted({error for item in own_raises(function) if (error := raised(item, makers))})


def unnamed_errors(tree: ast.Module, makers: dict[str, str]) -> list[str]:
    """Public functions of a module with the errors that they raise and do not name."""
    return [
        f"{name} raises {error}"
        for name, function in public_functions(tree)
        for error in errors_of(function, makers)
        if error not in (ast.get_docstring(function) or "")
    ]


@pytest.fixture(scope="module")
def makers() -> dict[str, str]:
    return makers_of_errors()


def test_public_functions_name_the_errors_they_raise(makers: dict[str, str]) -> None:
    assert {makers["unreadable_model"], makers["refusal"]} == {"DataError", "ConfigError"}
    raising = [
        name
        for tree in TREES.values()
        for name, function in public_functions(tree)
        if errors_of(function, makers)
    ]
    assert len(raising) > 50
    found = {module: unnamed_errors(tree, makers) for module, tree in TREES.items()}
    assert {module: errors for module, errors in found.items() if errors} == {}


def test_nouns_are_frozen() -> None:
    """All modules right inside the package: nothing that the folders pass to each other changes on the way."""
    decorators = {
        f"{module}.{node.name}": ast.unparse(decorator)
        for module, tree in TREES.items()
        if "." not in module
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if "dataclass" in ast.unparse(decorator)
    }
    assert len(decorators) > 50
    assert {name: text for name, text in decorators.items() if "frozen=True" not in text} == {}


# the checks can fail


def test_an_error_that_no_docstring_names_is_found() -> None:
    tree = ast.parse(
        "def named():\n    '''Raises DataError.'''\n    raise DataError('x')\n"
        "def unnamed():\n    '''Text.'''\n    if x:\n        raise DataError('x') from y\n"
        "def made():\n    raise wrong_data()\n"
        "def chosen():\n    raise ERRORS[kind]('x')\n"
        "def passes_on():\n    try:\n        f()\n    except E as failure:\n        raise failure\n"
        "def _private():\n    raise DataError('x')\n"
        "class Reader:\n    def read(self):\n        raise errors.DataError('x')\n"
        "def outer():\n    def inner():\n        raise DataError('x')\n"
    )
    assert unnamed_errors(tree, {"wrong_data": "ConfigError"}) == [
        "unnamed raises DataError",
        "made raises ConfigError",
        f"chosen raises {ANY_ERROR}",
        "Reader.read raises DataError",
    ]
