"""One small mechanism by which teachers, their rules, methods, parts, signals, score functions, tasks and samplers are
found by name.

A config names a component by the registry's tag: `type` for teachers, tasks and samplers, `name` for the rest.

A built-in component is one file in its package that says `@TEACHERS.register("name")`. Another package adds its own by
an entry point of the same group, without touching ours:

    [project.entry-points."omniopd.scores"]
    mine = "my_package:MyScore"
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from omniopd.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: list[str]) -> str:
    """The hint that ends an error about an unknown word: the nearest known one, and all of them."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean '{close[0]}'? " if close else "") + "known: " + ", ".join(sorted(known))


class Registry(Generic[T]):
    """Names to components of one kind. Built-ins are found by importing `package`, others by entry point `group`."""

    def __init__(self, kind: str, package: str, tag: str) -> None:
        self.kind, self.package, self.tag, self.group = kind, package, tag, f"omniopd.{kind}s"
        self._found: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a component to give it its name.

        Raises:
            ConfigError: the name is taken by another component.
        """

        def add(component: T) -> T:
            if self._found.setdefault(name, component) is not component:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; rename one of the two")
            return component

        return add

    def get(self, name: str) -> T:
        """The component of that name.

        Raises:
            ConfigError: no such name, or the package that offers it can't be imported.
        """
        self._discover()
        if name in self._found:
            return self._found[name]
        for point in entry_points(group=self.group, name=name):
            try:
                return point.load()
            except Exception as error:  # a stranger's import can fail in any way
                raise ConfigError(f"{self.kind} '{name}': entry point {point.value} fails to load: {error}") from error
        raise ConfigError(f"unknown {self.kind} '{name}'; {nearest(name, self.names())}")

    def build(self, config: Any, *context: Any) -> Any:
        """The component that a validated config names, made from that config. A plain function serves as it is."""
        component: Any = self.get(getattr(config, self.tag))
        return component(config, *context) if isinstance(component, type) else component

    def names(self) -> list[str]:
        """Every known name, built-in or not."""
        self._discover()
        return sorted({*self._found, *(point.name for point in entry_points(group=self.group))})

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


TEACHERS: Registry[Any] = Registry("teacher", "teachers", "type")
RULES: Registry[Any] = Registry("rule", "teachers.rules", "name")
METHODS: Registry[Any] = Registry("method", "omniopd.methods", "name")
PARTS: Registry[Any] = Registry("part", "omniopd.parts", "name")
SIGNALS: Registry[Any] = Registry("signal", "omniopd.signals", "name")
SCORES: Registry[Any] = Registry("score", "omniopd.scores", "name")
TASKS: Registry[Any] = Registry("task", "evals.tasks", "type")
SAMPLERS: Registry[Any] = Registry("sampler", "students.samplers", "type")
