"""The built-in data: question and answer pairs about the standard library of the interpreter that runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PYTHON_DOCS: Final = "builtin:python_docs"
SHUFFLE_SEED: Final = 20_260
"""Fixed, so that neighbouring pairs come from different modules, and always in the same order."""
LONGEST_DOCSTRING: Final = 2_000
"""Characters of a docstring that are kept."""
LITERAL_TYPES: Final = (bool, int, float, complex, bytes)
"""Types of defaults, besides text, that are shown in a signature."""
SUBMODULES: Final = (
    "collections.abc",
    "concurrent.futures",
    "email.message",
    "http.client",
    "importlib.metadata",
    "importlib.resources",
    "logging.handlers",
    "os.path",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "xml.etree.ElementTree",
)
"""Documented modules inside packages; the top level is taken from the interpreter."""
NOT_IMPORTED: Final = frozenset(
    {
        "antigravity",
        "idlelib",
        "lib2to3",
        "readline",
        "rlcompleter",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
    }
)
"""Modules that open a browser or a window, print, or touch the terminal when they are imported."""


@dataclass(frozen=True)
class SourceRow:
    """One example as it was found."""

    where: str
    """File or data set, row counted from 1, and the line where lines count."""
    fields: Mapping[str, object]
    """The row's keys and values, unchecked."""


@dataclass(frozen=True)
class Elided:
    """Stands in a signature for a default that is not shown."""

    def __repr__(self) -> str:
        """The sign that Python's own stubs use."""
        return "..."


def rows_of_python_docs() -> Iterator[SourceRow]:
    """Question and answer pairs about the standard library of the interpreter that runs.

    The same Python on the same platform gives the same rows in the same order: about 3,700 in a second.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules say so when they are imported
        documented = sorted(_documented_objects())
    random.Random(SHUFFLE_SEED).shuffle(documented)
    for number, (name, signature, docstring) in enumerate(documented, start=1):
        question = f"What does `{name}` do in Python, and what is its signature?"
        answer = f"`{name}{signature}`\n\n{docstring}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield SourceRow(f"{PYTHON_DOCS}, row {number}", {"messages": turns})


def _documented_objects() -> Iterator[tuple[str, str, str]]:
    """Name, signature and docstring of public functions, classes and methods, each object once."""
    public_names = {name for name in sys.stdlib_module_names if not name.startswith("_")} - NOT_IMPORTED
    seen: dict[int, object] = {}  # by identity; the objects are kept, so that no id is used twice
    for module_name in sorted(public_names.union(SUBMODULES)):
        for name, member in _members_of(module_name):
            signature, docstring = _described(member)
            if docstring and id(member) not in seen:
                seen[id(member)] = member
                yield name, signature, docstring


def _members_of(module_name: str) -> Iterator[tuple[str, object]]:
    """Public functions and classes of a module, and the classes' own public methods, by qualified name."""
    members: Sequence[tuple[str, object]] = ()
    with contextlib.suppress(Exception):  # a module that this platform or build lacks fails in many ways
        if _is_standard(module_name):
            module = importlib.import_module(module_name)
            names = getattr(module, "__all__", None) or _own_names(module)
            members = [(name, getattr(module, name)) for name in sorted(names) if hasattr(module, name)]
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, member in members:
        if name.startswith("_") or not (inspect.isroutine(member) or inspect.isclass(member)):
            continue
        yield f"{prefix}{name}", member
        if inspect.isclass(member):
            for method_name, method in sorted(vars(member).items()):
                if inspect.isroutine(method) and not method_name.startswith("_"):
                    yield f"{prefix}{name}.{method_name}", method


def _own_names(module: object) -> list[str]:
    """Names that a module without `__all__` defines itself, as opposed to those it imported."""
    own = getattr(module, "__name__", "")
    return [name for name, member in vars(module).items() if getattr(member, "__module__", None) == own]


def _is_standard(module_name: str) -> bool:
    """Whether a name leads into the standard library, and not to a user's file of the same name."""
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    origin = Path(spec.origin).resolve()
    folders = {Path(os.__file__).parent.resolve(), Path(sysconfig.get_path("platstdlib")).resolve()}
    return "site-packages" not in origin.parts and not folders.isdisjoint(origin.parents)


def _described(member: object) -> tuple[str, str]:
    """Signature and cleaned docstring of a function, class or method; both empty when one is lacking."""
    documented = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
    docstring = documented.__doc__
    if not isinstance(docstring, str) or not docstring.strip() or not callable(documented):
        return "", ""
    try:
        signature = _portable(inspect.signature(documented))
    except (AttributeError, TypeError, ValueError):  # the first of Python 3.13.0, for select.epoll.register
        return "", ""
    cleaned = inspect.cleandoc(docstring)
    if len(cleaned) > LONGEST_DOCSTRING:
        cleaned = cleaned[:LONGEST_DOCSTRING].rpartition("\n")[0] or cleaned[:LONGEST_DOCSTRING]
    return signature, cleaned


def _portable(signature: inspect.Signature) -> str:
    """Writes a signature with `...` for each default that is no literal.

    Such defaults hold what belongs to one process or one machine: memory addresses, paths, and even the whole
    environment with its secrets, which no model may learn.
    """
    parameters = [
        parameter if _is_literal(parameter.default) else parameter.replace(default=Elided())
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters))


def _is_literal(default: object) -> bool:
    """Whether a default (or its absence) reads the same on every machine."""
    if type(default) is tuple:
        return all(map(_is_literal, default))
    if isinstance(default, str):
        return not Path(default).is_absolute()
    return default is None or default is inspect.Parameter.empty or type(default) in LITERAL_TYPES
