"""Checks of single loosely typed values, as JSON and protobuf give them.

Each check returns the typed value or raises InvalidRequestError with one sentence that names
the field, the value and what was expected.
"""

import math
from collections.abc import Sequence

from serving.errors import InvalidRequestError

_SHOWN_CHARACTERS = 64


def shown(value: object) -> str:
    """The value as an error message shows it: short, printable, always valid UTF-8."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)} elements"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = ascii(value)
    if len(text) > _SHOWN_CHARACTERS:
        return f"{text[:_SHOWN_CHARACTERS]}... ({type(value).__name__})"
    return text


def whole_number(value: object, parameter: str, lowest: int, highest: int | None = None) -> int:
    """An integer in [lowest, highest]. A boolean, a string or 1.5 is none; 3.0 is 3, as in JSON.

    Raises InvalidRequestError.
    """
    span = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(
            f"{parameter} is {shown(value)}; expected an integer {span}.", parameter
        )
    if value < lowest or (highest is not None and value > highest):
        raise InvalidRequestError(
            f"{parameter} is {shown(value)}; expected an integer {span}.", parameter
        )
    return value


def real_number(
    value: object, parameter: str, lowest: float, highest: float, *, above: bool = False
) -> float:
    """A finite number in [lowest, highest], or in (lowest, highest] with `above`.

    Raises InvalidRequestError.
    """
    span = (
        f"{'above' if above else 'from'} {lowest:g} {'and at most' if above else 'to'} {highest:g}"
    )
    problem = InvalidRequestError(
        f"{parameter} is {shown(value)}; expected a number {span}.", parameter
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem
    if isinstance(value, float) and not math.isfinite(value):
        raise problem
    if value < lowest or value > highest or (above and value == lowest):
        raise problem
    return float(value)


def truth(value: object, parameter: str) -> bool:
    """True or false; no number or string stands for one. Raises InvalidRequestError."""
    if not isinstance(value, bool):
        raise InvalidRequestError(
            f"{parameter} is {shown(value)}; expected true or false.", parameter
        )
    return value


def unicode_text(value: object, parameter: str) -> str:
    """A string that UTF-8 can express; bytes are decoded. Raises InvalidRequestError.

    JSON's escapes can spell half a surrogate pair, which is no character and no token.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"{parameter} is not valid UTF-8: byte {error.start} cannot be decoded.", parameter
            ) from error
    if not isinstance(value, str):
        raise InvalidRequestError(f"{parameter} is {shown(value)}; expected a string.", parameter)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{parameter} is not valid Unicode: character {error.start} is half of a surrogate "
            "pair; send the whole character.",
            parameter,
        ) from error
    return value


def sequence(value: object, parameter: str, of: str, longest: int) -> Sequence[object]:
    """A list of at most `longest` elements (`of` says of what). Raises InvalidRequestError."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidRequestError(
            f"{parameter} is {shown(value)}; expected a list of {of}.", parameter
        )
    if len(value) > longest:
        raise InvalidRequestError(
            f"{parameter} has {len(value)} elements; expected at most {longest}.", parameter
        )
    return value
