"""Frozen dataclasses as JSON and back, to the last bit: fields by name, enums by member name.

A field that has its default is left out, so that a file shows what is peculiar about it.
"""

import enum
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from lumen.errors import LumenError

type Reader = Callable[[Any, str], Any]

_SPELLED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class LiteralError(LumenError):
    """A value cannot be read: what it belongs to, what it is and what was expected."""


def to_literal(value: Any) -> Any:
    """What json.dumps takes. Of dataclasses, enums, tuples, numbers, strings and None."""
    if is_dataclass(value):
        return {
            field.name: to_literal(getattr(value, field.name))
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        }
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple):
        return [to_literal(one) for one in value]
    return value


def from_literal(
    kind: Any, value: Any, where: str = "", readers: Mapping[Any, Reader] | None = None
) -> Any:
    """A value of type `kind` from what json.loads gave. `where`: the path to it, for errors.

    readers: of types that are written or limited in a way of their own: each takes what json.loads
    gave and `where`, wherever that type occurs.
    Raises LiteralError if it is of another type, or names a field that is not there.
    """
    return _read(readers or {}, kind, value, where)


def _read(readers: Mapping[Any, Reader], kind: Any, value: Any, where: str) -> Any:
    if kind in readers:
        return readers[kind](value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        # Only `X | None` occurs.
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (one for one in arguments if one is not types.NoneType)
        return _read(readers, kind, value, where)
    if origin is tuple:
        return _tuple(readers, arguments, value, where)
    if is_dataclass(kind):
        return _dataclass(readers, kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if not isinstance(value, str) or value not in kind.__members__:
            raise _wrong(where, value, "one of " + ", ".join(kind.__members__))
        return kind[value]
    if isinstance(kind, type) and issubclass(kind, tuple):
        return kind(*_tuple(readers, tuple(typing.get_type_hints(kind).values()), value, where))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _wrong(where, value, _SPELLED[kind])
    if value != value:
        raise _wrong(where, value, "a number")
    return value


def _tuple(
    readers: Mapping[Any, Reader], kinds: tuple[Any, ...], value: Any, where: str
) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _wrong(where, value, f"a list of {len(kinds)}")
    return tuple(
        _read(readers, kind, one, f"{where}[{place}]")
        for place, (kind, one) in enumerate(zip(kinds, value, strict=True))
    )


def _dataclass(readers: Mapping[Any, Reader], kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, f"the fields of {kind.__name__}")
    kinds = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(kinds))
    missing = sorted(f.name for f in fields(kind) if f.default is MISSING and f.name not in value)
    if unknown or missing:
        wrong = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise LiteralError(f"{where or 'The file'} has not the fields of {kind.__name__}; {wrong}.")
    prefix = f"{where}." if where else ""
    return kind(
        **{name: _read(readers, kinds[name], one, prefix + name) for name, one in value.items()}
    )


def _wrong(where: str, value: Any, expected: str) -> LiteralError:
    return LiteralError(f"{where or 'The file'} is {value!r}; it must be {expected}.")
