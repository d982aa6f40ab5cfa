"""Reads the fields of a dataclass from JSON, where tuples have become lists."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InvalidValue

Kind = TypeVar("Kind")


def from_fields(kind: type[Kind], values: object) -> Kind:
    """Make a dataclass of values by name; those that are missing keep their default.

    Raises:
        ValueError: a name that the class does not have, a value of another type, or one that the class refuses.
    """
    if not isinstance(values, Mapping):
        raise InvalidValue(f"there should be values by name, but there is {_shown(values)}")
    hints = get_type_hints(kind)
    known: dict[str, Any] = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            raise InvalidValue(f"there is no field '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
        if not _fits(value, hints[name]):
            raise InvalidValue(f"{name} is {_shown(value)}; it should be {_named(hints[name])}")
    try:
        return kind(**{name: _tuples(value) for name, value in values.items()})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InvalidValue(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value from JSON is of an annotated type; what is not known here fits."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = inside[:1] * len(value) if inside[1:] == (...,) else inside
        return len(each) == len(value) and all(map(_fits, value, each))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(part, inside[1]) for part in value.values())
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint or type(None))
    return True


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
