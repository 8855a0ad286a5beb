"""Methods and parts as plain data, read from their classes: words, slots, needs, options, the code behind the formulas."""

from __future__ import annotations

import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from omniopd.composition import compose
from omniopd.errors import ConfigError
from omniopd.method import Method, missing
from omniopd.objective import Objective
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
class Option:
    """A setting by its dotted name. `default` is YAML, `allowed` says in words what it may be."""

    name: str
    default: str
    allowed: str
    description: str


@dataclass(frozen=True, slots=True)
class Code:
    """A function or a hook. `place` is its file, or its module where that is not ours; `source` is empty for what is only
    called."""

    name: str
    place: str
    words: str
    source: str = ""


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


def entry(name: str) -> Entry:
    """The method of that name, or else the part.

    Raises:
        ConfigError: there is neither.
    """
    if name in METHODS.names():
        return _method(name)
    if name in PARTS.names():
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
        title=_first_line(component.__doc__),
        text=inspect.cleandoc(getattr(module, "__doc__", None) or component.__doc__ or ""),
        place=_place(component.__module__),
        options=tuple(options(component.Config)),
        neutral=component.neutral,
        hooks=tuple(_hooks(component)),
        functions=tuple(_functions(module, own=True)),
        called=tuple(_functions(module, own=False)),
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


def _first_line(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n")[0].rstrip(".")


# ------------------------------------------------------------------ options


def options(model: type[BaseModel], within: str = "") -> Iterator[Option]:
    """Every setting of a model, those of inner models by dotted names: its own first, what all methods share last."""
    own, shared = set(vars(model).get("__annotations__", ())), set(Objective.model_fields)
    for name in sorted(model.model_fields, key=lambda name: (name not in own) + (name not in own and name in shared)):
        field = model.model_fields[name]
        inner = field.annotation
        if name == "name" and not within:
            continue
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner.model_fields:
            default = field.get_default(call_default_factory=True)
            for option in options(inner, f"{within}{name}."):
                stated = getattr(default, option.name.rpartition(".")[2], None)
                yield Option(option.name, _yaml(stated), option.allowed, option.description)
        else:
            default = "required" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            yield Option(within + name, default, _allowed(field), _description(model, name))


def _description(model: type[BaseModel], name: str) -> str:
    """Of a setting whose default is another than in the base, that of the base."""
    fields = [getattr(one, "model_fields", {}).get(name) for one in model.__mro__]
    found = (field.description for field in fields if field is not None and field.description)
    return " ".join(next(found, "").split())


def _yaml(value: Any) -> str:
    return as_yaml(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


def as_yaml(value: Any) -> str:
    """Plain data on one line, as it may stand in a config."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _allowed(field: FieldInfo) -> str:
    """What the annotation and the bounds say, in words."""
    limits = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    found = [
        f"{words} {_bound(limit):g}"
        for limit in field.metadata
        for kind, words in limits.items()
        if type(limit) is kind
    ]
    return ", ".join([words for words in [_words(field.annotation), " and ".join(found)] if words])


def _bound(limit: Any) -> float:
    """The number of a bound."""
    return float(getattr(limit, type(limit).__name__.lower()))


def _words(annotation: Any) -> str:
    plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if annotation in plain:
        return plain[annotation]
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        each = [_words(one) for one in inside if one is not type(None)]
        return " | ".join([one for one in each if one] + ["null"] * (type(None) in inside))
    return "list" if origin in (list, tuple) else ""


# ------------------------------------------------------------------ code

UNQUOTED = {"__init__", "describe", "cautions", "lacking", "load_state_dict", "state_dict"}  # no formula is in these
PURE = ("omniopd.losses", "omniopd.measures", "omniopd.groups", "omniopd.credit", "omniopd.alignment", "omniopd.boundary",
        "omniopd.targets", "omniopd.branches", "omniopd.verification")  # fmt: skip
"""Where functions live that several methods call."""


def _hooks(component: type) -> Iterator[Code]:
    """The class's own methods in the order of its file."""
    for name, found in vars(component).items():
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        if inspect.isfunction(function) and name not in UNQUOTED:
            yield _code(function, f"{component.__name__}.{name}")


def _functions(module: Any, own: bool) -> Iterator[Code]:
    """Functions that a module defines, or that it has from ours."""
    for name, found in vars(module).items():
        if not (inspect.isfunction(found) or inspect.isclass(found)):
            continue
        home = found.__module__
        if own and home == module.__name__ and inspect.isfunction(found):
            yield _code(found, name)
        elif not own and home != module.__name__ and home.startswith(PURE):
            yield Code(name, _place(home), _first_line(found.__doc__))


def _code(function: Any, name: str) -> Code:
    return Code(
        name,
        _place(function.__module__),
        _first_line(function.__doc__),
        textwrap.dedent(inspect.getsource(function)).strip(),
    )


def _place(module: str) -> str:
    """The file of a module of ours, relative to the repository; another's name as it is."""
    if not module.startswith("omniopd."):
        return module
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if hasattr(importlib.import_module(module), "__path__") else f"{path}.py"
