"""Methods and parts as plain data, read from their classes: words, slots, needs, options, the code behind the formulas."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from pydantic import ValidationError

from omniopd.catalogue.settings import Option, options
from omniopd.catalogue.source import Code, first_line, functions_of, hooks_of, place_of
from omniopd.composition import compose
from omniopd.errors import ConfigError
from omniopd.method import Method, missing
from omniopd.part import Part
from omniopd.registry import METHODS, PARTS, nearest
from omniopd.types import Capabilities
from omniopd.unloaded import Unloaded

Kind = Literal["method", "part"]
TEXT_ONLY = Capabilities(answer=True, continuation="prefill")
SLOT_OF = {
    "before": "context",
    "writings": "sampling",
    "budget": "sampling",
    "ask": "audit",
    "again": "audit",
    "place": "signal",
    "read": "signal",
    "after": "schedule",
}
"""The slot that a hook of a method fills."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A method or a part.

    Attributes:
        title: what it is in a few words.
        text: the docstring of its module.
        place: the file of its code, or its module where that is not ours.
        base: the registered method that it extends, "" if none.
        slots: those that it fills; of a method that extends another, those in which it differs.
        needs: of its default settings.
        text_only: whether a teacher that returns only text will do: partly, if some of the method's parts do without more
            and may be joined with a method like `omniopd`.
        parts: those of a method's default settings, in the order in which they act, with the settings that it states.
        neutral: settings that change nothing; or a sentence that says why there are none. `plain` is what they come to.
        order: where a part acts.
        hooks, functions, called: the class's own hooks, the functions of its module, and those of other modules of ours.
    """

    kind: Kind
    name: str
    title: str
    text: str
    place: str
    base: str
    slots: tuple[str, ...]
    needs: tuple[str, ...]
    text_only: Literal["yes", "partly", "no"]
    paper: str
    options: tuple[Option, ...]
    parts: tuple[Mapping[str, Any], ...]
    neutral: Mapping[str, Any] | str
    plain: Mapping[str, Any]
    order: str
    refuses: Mapping[str, str]
    warns: Mapping[str, str]
    dense: bool
    hooks: tuple[Code, ...]
    functions: tuple[Code, ...]
    called: tuple[Code, ...]

    @property
    def ours(self) -> bool:
        """Whether it comes with this package."""
        return self.place.endswith(".py")


def entries(kind: Kind) -> list[Entry]:
    """All of a kind, by name.

    Raises:
        ConfigError: a package that offers one fails to load.
    """
    return [_method(name) if kind == "method" else _part(name) for name in _registry(kind).names()]


def entry(name: str, kind: Kind | None = None) -> Entry:
    """The method of that name, or else the part, which may be called as the method that it belongs to.

    Raises:
        ConfigError: there is neither.
    """
    if name in METHODS.names() and kind != "part":
        return _method(name)
    if name in PARTS.names() and kind != "method":
        return _part(name)
    known = nearest(name, [*METHODS.names(), *PARTS.names()])
    raise ConfigError(f"'{name}' is neither a method nor a part; {known}")


def _registry(kind: Kind) -> Any:
    return METHODS if kind == "method" else PARTS


def _method(name: str) -> Entry:
    component: type[Method] = METHODS.get(name)
    config = component.Config()
    method = compose(config, Unloaded(), 0)
    parts: list[Part] = getattr(method, "parts", [])
    registered = {METHODS.get(other): other for other in METHODS.names()}
    base = next((registered[one] for one in component.__mro__[1:] if one in registered), "")
    hooks = {hook for one in _until_base(component, registered) for hook in vars(one)}
    filled = [SLOT_OF[hook] for hook in SLOT_OF if hook in hooks]
    stated = {part.name: part.model_dump(mode="json", exclude_unset=True) for part in config.parts}
    lacks = missing(method.needs, TEXT_ONLY)
    some = any(not missing(part.needs, TEXT_ONLY) for part in parts)
    return _entry(
        "method",
        name,
        component,
        base=base,
        slots=_once([*filled, *(slot for part in parts for slot in part.slots)]),
        needs=tuple(sorted(method.needs)),
        text_only="yes" if not lacks else "partly" if some else "no",
        paper=component.paper,
        parts=tuple(stated[part.config.name] for part in parts),
        plain={} if isinstance(component.neutral, str) else component.plain,
    )


def _part(name: str) -> Entry:
    component: type[Part] = PARTS.get(name)
    needs = _part_needs(component)
    return _entry(
        "part",
        name,
        component,
        slots=component.slots,
        needs=tuple(sorted(needs)),
        text_only="no" if missing(needs, TEXT_ONLY) else "yes",
        order=component.place.name.lower(),
        refuses=component.refuses,
        warns=component.warns,
        dense=component.dense,
    )


def _entry(kind: Kind, name: str, component: Any, **known: Any) -> Entry:
    """What is read of both kinds alike."""
    module = inspect.getmodule(component)
    nothing: dict[str, Any] = {
        "base": "", "paper": "", "parts": (), "plain": {}, "order": "", "refuses": {}, "warns": {}, "dense": True
    }  # fmt: skip
    return Entry(
        kind=kind,
        name=name,
        title=first_line(component.__doc__),
        text=inspect.cleandoc(getattr(module, "__doc__", None) or component.__doc__ or ""),
        place=place_of(component.__module__),
        options=tuple(options(component.Config)),
        neutral=component.neutral,
        hooks=tuple(hooks_of(component)),
        functions=tuple(functions_of(module, own=True)),
        called=tuple(functions_of(module, own=False)),
        **(nothing | known),
    )


def _part_needs(component: type[Part]) -> frozenset[str]:
    """Of its default settings, as a part of plain distillation; what the class says where a setting has no default."""
    try:
        settings = component.Config()
    except ValidationError:
        return component.needs
    return component(settings, METHODS.get("opd").Config(), Unloaded(), 0).needs


def _until_base(component: type[Method], registered: Mapping[type, str]) -> Iterator[type]:
    """The classes whose hooks are the method's own: up to another method, or to what every method has."""
    yield component
    yield from takewhile(lambda one: one not in registered and one is not Method, component.__mro__[1:])


def _once(slots: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slots))
