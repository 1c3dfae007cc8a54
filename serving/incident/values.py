"""Events as JSON and back, by the types of their fields.

A log may come from someone else's machine, so reading one makes values of the expected types or
raises ValueError, and never runs anything. A dataclass is a list: its class's name, then its
fields in order; an array [dtype, shape, numbers]; an enum its value. Numbers keep every bit.
"""

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np

from serving.engine.plan import StepResult

type Reader = Callable[[Any], Any]

_LEFT_OUT = {(StepResult, "extra")}
"""Timings of the machine that never decide anything."""


def encode(value: object) -> str:
    """JSON of an event or an answer. Raises TypeError for what no event holds."""
    return _ENCODER.encode(value)


def decode(kind: Any, text: str) -> Any:
    """The value of type `kind` (a class, a union or an alias of one) that `encode` made.

    Raises ValueError with a sentence if the text is of another type.
    """
    try:
        return reader(kind)(json.loads(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@functools.cache
def reader(kind: Any) -> Reader:
    """A function that checks parsed JSON and makes a value of this type of it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(origin, typing.TypeAliasType):  # numpy's NDArray is one
        return reader(origin.__value__[arguments])
    if origin is np.ndarray:
        return _array_reader(np.dtype(typing.get_args(arguments[1])[0]))
    if origin in (types.UnionType, typing.Union):
        return _union_reader(arguments)
    if origin is tuple:
        return _tuple_reader(arguments)
    if origin is Mapping:
        return _mapping_reader(*arguments)
    if kind in (bool, int, str, float, types.NoneType):
        return _plain_reader(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    if issubclass(kind, enum.Enum):
        return _enum_reader(kind)
    if issubclass(kind, tuple):
        return _named_tuple_reader(kind)
    raise TypeError(f"No event holds a {kind}.")


def _fields(kind: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(kind)]
    return [name for name in names if (kind, name) not in _LEFT_OUT]


@functools.cache
def _taken_apart(kind: Any) -> Callable[[Any], list[Any]]:
    names, name = _fields(kind), kind.__name__
    if not names:
        return lambda _: [name]
    get = attrgetter(*names)
    if len(names) == 1:
        return lambda value: [name, get(value)]
    return lambda value: [name, *get(value)]


def _simpler(value: Any) -> Any:
    """What json does not know by itself, in terms of what it knows."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return _taken_apart(kind)(value)
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.ravel().tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Exception):
        return [kind.__name__, str(value), sorted(vars(value).items())]
    raise TypeError(f"A {kind.__name__} is in an event, and the log cannot hold one.")


_ENCODER = json.JSONEncoder(default=_simpler, check_circular=False, separators=(",", ":"))


def _require(holds: bool, expected: str, value: Any) -> None:
    if not holds:
        shown = json.dumps(value)
        raise ValueError(f"{shown[:60]} stands where {expected} belongs")


def _plain_reader(kind: type) -> Reader:
    # Whole numbers in fields of type float were whole when the core saw them.
    accepted = (float, int) if kind is float else (kind,)

    def read(value: Any) -> Any:
        _require(type(value) in accepted, f"a {kind.__name__}", value)
        return value

    return read


def _enum_reader(kind: type[enum.Enum]) -> Reader:
    members = {member.value: member for member in kind}

    def read(value: Any) -> Any:
        known = type(value) in (int, str) and value in members
        _require(known, f"a {kind.__name__}", value)
        return members[value]

    return read


def _array_reader(dtype: np.dtype[Any]) -> Reader:
    kind = float if dtype.kind == "f" else int

    def read(value: Any) -> Any:
        _require(type(value) is list and len(value) == 3, "an array", value)
        spelled, shape, numbers = value
        _require(spelled == dtype.str, f"an array of {dtype}", spelled)
        _require(type(shape) is list and type(numbers) is list, "an array", value)
        _require(all(type(n) is int and n >= 0 for n in shape), "a shape", shape)
        _require(all(type(n) is kind for n in numbers), f"numbers of type {dtype}", numbers)
        try:
            return np.asarray(numbers, dtype).reshape(shape)
        except OverflowError as error:
            raise ValueError(f"a number is beyond {dtype}") from error

    return read


def _tuple_reader(arguments: tuple[Any, ...]) -> Reader:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        if arguments[0] is int:  # prompts and tokens: long, so checked at the speed of C
            return _integers
        each = reader(arguments[0])

        def read_all(value: Any) -> Any:
            _require(type(value) is list, "a list", value)
            return tuple([each(item) for item in value])

        return read_all
    parts = tuple(reader(argument) for argument in arguments)

    def read(value: Any) -> Any:
        _require(type(value) is list and len(value) == len(parts), f"{len(parts)} values", value)
        return tuple([part(item) for part, item in zip(parts, value, strict=True)])

    return read


def _integers(value: Any) -> tuple[int, ...]:
    _require(type(value) is list and set(map(type, value)) <= {int}, "a list of numbers", value)
    return tuple(value)


def _named_tuple_reader(kind: Any) -> Reader:
    whole = _tuple_reader(tuple(typing.get_type_hints(kind)[name] for name in kind._fields))
    return lambda value: kind(*whole(value))


def _mapping_reader(key: Any, item: Any) -> Reader:
    each = reader(item)

    def read(value: Any) -> Any:
        _require(key is int and type(value) is dict, "a table", value)
        _require(all(name.isdecimal() for name in value), "a table by number", value)
        return {int(name): each(one) for name, one in value.items()}

    return read


def _dataclass_reader(kind: Any) -> Reader:
    hints, names = typing.get_type_hints(kind), _fields(kind)
    parts = [(name, reader(hints[name])) for name in names]

    def read(value: Any) -> Any:
        _require(_named(value) == kind.__name__, f"a {kind.__name__}", value)
        _require(len(value) == len(parts) + 1, f"{len(parts)} fields of {kind.__name__}", value)
        return kind(**{name: part(one) for (name, part), one in zip(parts, value[1:], strict=True)})

    return read


def _union_reader(arguments: tuple[Any, ...]) -> Reader:
    classes = [one for one in arguments if isinstance(one, type) and dataclasses.is_dataclass(one)]
    named = {one.__name__: reader(one) for one in classes}
    rest = [one for one in arguments if one not in classes]
    optional = types.NoneType in rest
    others = [reader(one) for one in rest if one is not types.NoneType]
    if len(others) > 1 or (named and others):
        raise TypeError(f"No event holds a {arguments}.")
    expected = " or ".join(named) or "another value"

    def read(value: Any) -> Any:
        if value is None and optional:
            return None
        if others:
            return others[0](value)
        _require(_named(value) in named, expected, value)
        return named[value[0]](value)

    return read


def _named(value: Any) -> str | None:
    return value[0] if type(value) is list and value and type(value[0]) is str else None
