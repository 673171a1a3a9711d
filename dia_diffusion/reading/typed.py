"""Type-checked dataclasses from JSON with values of any type."""

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], values: Any) -> T:
    """A dataclass from a JSON object with its fields.

    Raises:
        ValueError: not an object, or a field is missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__} instead of an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown key {unknown[0]!r}")
    hints = get_type_hints(kind)
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{name} is missing")
        elif not fits(values[name], hints[name]):
            raise ValueError(f"{name} is of type {type(values[name]).__name__}")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type. Whole numbers count as floats, booleans aren't numbers, numbers must fit 64 bits."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (types.UnionType, Union):
        return any(fits(value, part) for part in parts)
    if origin is Any:
        return True
    if origin is Literal:
        return value in parts
    if origin is int or (origin is float and isinstance(value, int)):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    if origin is dict and parts:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is list and parts:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is tuple and parts[1:] == (...,):
        return isinstance(value, tuple) and all(fits(item, parts[0]) for item in value)
    if origin is tuple and parts:
        alike = isinstance(value, tuple) and len(value) == len(parts)
        return alike and all(fits(item, part) for item, part in zip(value, parts, strict=True))
    return isinstance(value, origin)
