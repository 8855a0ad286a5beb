"""The base of every configuration model, fields that choose a component by its tag, and errors in one line."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, create_model
from pydantic_core import PydanticCustomError

from omniopd.registry import Registry, nearest


class Settings(BaseModel):
    """Immutable, and closed: an unknown key is an error. A component's `Config` class is one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def tagged(registry: Registry[Any], default: str | None = None) -> Any:
    """The annotation of a config field that holds one component of that registry.

    The value is `{tag: NAME, ...}` or just `NAME`, checked against the `Config` of the component registered as NAME. A
    component without a `Config` takes no settings but its name. Settings without a name belong to `default`.
    """
    return Annotated[SerializeAsAny[Settings], BeforeValidator(_chooser(registry, default))]


def _chooser(registry: Registry[Any], default: str | None) -> Callable[[Any], Any]:
    tag = registry.tag

    def choose(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, str):
            value = {tag: value}
        if isinstance(value, dict) and default is not None:
            value = {tag: default, **value}
        if not isinstance(value, dict) or not isinstance(value.get(tag), str):
            raise ValueError(f"needs '{tag}', one of: {', '.join(registry.names())}")
        component = registry.get(value[tag])
        model = getattr(component, "Config", None) or _only_named(tag)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            # A validator's exceptions lose the place of what they wrap: carry the finished sentence instead.
            raise PydanticCustomError("component", "{problem}", {"problem": first_problem(error, model)}) from None

    return choose


def _only_named(tag: str) -> type[Settings]:
    fields: dict[str, Any] = {tag: (str, ...)}
    return create_model("Named", __base__=Settings, **fields)


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong as one line: its dotted field, what was found and what would be right."""
    problems = error.errors()
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    field = ".".join(place)
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    match first["type"]:
        case "component":
            return f"{field}.{first['msg']}{rest}"
        case "extra_forbidden":
            message = f"unknown key '{place[-1]}'; {nearest(place[-1], _keys_at(place[:-1], model))}"
        case "missing":
            message = "is missing; it is required"
        case "value_error":
            message = str(first["msg"]).removeprefix("Value error, ")
        case _:
            message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"[:400]
    return f"{field}: {message}{rest}".removeprefix(": ")


def _keys_at(place: list[str], model: Any) -> list[str]:
    """The keys that are allowed at a dotted place of a model."""
    annotation: Any = model
    for part in place:
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
            continue
        holder = _model_of(annotation)
        field = holder.model_fields.get(part) if holder is not None else None
        annotation = field.annotation if field is not None else None
    found = _model_of(annotation)
    return list(found.model_fields) if found is not None else []


def _model_of(annotation: Any) -> Any:
    """The model of a field, or the one inside `Model | None`."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else [annotation]
    )
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
