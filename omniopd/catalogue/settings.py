"""A component's settings, read from the fields of its `Config`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from omniopd.objective import Objective


@dataclass(frozen=True, slots=True)
class Option:
    """A setting by its dotted name. `default` is YAML, `allowed` says in words what it may be."""

    name: str
    default: str
    allowed: str
    description: str


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
