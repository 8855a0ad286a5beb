"""The code behind a component's formulas, as its files have it."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

UNQUOTED = {"__init__", "describe", "cautions", "lacking", "load_state_dict", "state_dict"}  # no formula is in these
PURE = ("omniopd.losses", "omniopd.measures", "omniopd.groups", "omniopd.credit", "omniopd.alignment", "omniopd.boundary",
        "omniopd.targets", "omniopd.branches", "omniopd.verification")  # fmt: skip
"""Where functions live that several methods call."""


@dataclass(frozen=True, slots=True)
class Code:
    """A function or a hook. `place` is its file, or its module where that is not ours; `source` is empty for what is only
    called."""

    name: str
    place: str
    words: str
    source: str = ""


def hooks_of(component: type) -> Iterator[Code]:
    """The class's own methods in the order of its file."""
    for name, found in vars(component).items():
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        if inspect.isfunction(function) and name not in UNQUOTED:
            yield _code(function, f"{component.__name__}.{name}")


def functions_of(module: Any, own: bool) -> Iterator[Code]:
    """Functions that a module defines, or that it has from ours."""
    for name, found in vars(module).items():
        if not (inspect.isfunction(found) or inspect.isclass(found)):
            continue
        home = found.__module__
        if own and home == module.__name__ and inspect.isfunction(found):
            yield _code(found, name)
        elif not own and home != module.__name__ and home.startswith(PURE):
            yield Code(name, place_of(home), first_line(found.__doc__))


def _code(function: Any, name: str) -> Code:
    return Code(
        name,
        place_of(function.__module__),
        first_line(function.__doc__),
        textwrap.dedent(inspect.getsource(function)).strip(),
    )


def place_of(module: str) -> str:
    """The file of a module of ours, relative to the repository; another's name as it is."""
    if not module.startswith("omniopd."):
        return module
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if hasattr(importlib.import_module(module), "__path__") else f"{path}.py"


def lines_of(place: str) -> int:
    """How many lines the file of a module of ours has."""
    module = importlib.import_module(place.removesuffix(".py").replace("/", "."))
    return len(inspect.getsource(module).splitlines())


def first_line(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n")[0].rstrip(".")
