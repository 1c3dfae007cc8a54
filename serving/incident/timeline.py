"""Events and answers on one line each, for people."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np

_SPELLED = 4  # entries of a sequence that are written out


def brief(value: object) -> str:
    """An event or effect without its defaults, long sequences as their length."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [
            f"{field.name}={brief(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
            if not _is_default(field, getattr(value, field.name))
        ]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, np.ndarray):
        if value.size <= _SPELLED:
            return str(value.tolist())
        return f"<{'x'.join(map(str, value.shape))} numbers>"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Exception):
        return f"raised {type(value).__name__}: {value}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return f"<{len(value)} entries>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > _SPELLED:
            return f"<{len(value)}: {brief(value[0])}, ...>"
        return f"[{', '.join(brief(item) for item in value)}]"
    return repr(value)


def line(number: int, seconds: float, event: object, answer: Sequence[object] | Exception) -> str:
    """One event and what was answered. seconds: since the log's first event."""
    effects = answer if isinstance(answer, Exception) else list(answer)
    told = f"{number:>7} {seconds:12.6f}  {brief(event)}"
    if isinstance(effects, Exception):
        return f"{told}\n{'':>24}-> {brief(effects)}"
    return "\n".join([told, *(f"{'':>24}-> {brief(effect)}" for effect in effects)])


def apart(recorded: str, replayed: str, around: int = 120) -> tuple[str, str]:
    """Two answers as JSON from shortly before the place where they differ."""
    same = next(
        (
            index
            for index, (one, other) in enumerate(zip(recorded, replayed, strict=False))
            if one != other
        ),
        min(len(recorded), len(replayed)),
    )
    return _cut(recorded, same, around), _cut(replayed, same, around)


def _cut(text: str, at: int, around: int) -> str:
    begin, end = max(0, at - around), at + around
    return ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")


def _is_default(field: "dataclasses.Field[object]", value: object) -> bool:
    if isinstance(value, np.ndarray):
        return not value.size
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    default = field.default
    return (
        not isinstance(default, np.ndarray)
        and type(value) is type(default)
        and (value is default or (not dataclasses.is_dataclass(value) and value == default))
    )
