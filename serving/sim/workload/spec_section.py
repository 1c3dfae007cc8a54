"""A dictionary that a person wrote: every key is known, every value of the right kind."""

from collections.abc import Mapping, Sequence

from serving.errors import ConfigurationError
from serving.sim.workload.source_file import shown

_PLACES = ("first", "second")


class Section:
    """One dictionary of a specification; `where` names it in errors, all ConfigurationError."""

    def __init__(self, where: str, content: object, allowed: Sequence[str]) -> None:
        """Raises ConfigurationError if it is no dictionary, or has a key that is not allowed."""
        if not isinstance(content, Mapping):
            raise ConfigurationError(
                f"{where}: found {shown(content)}; expected an object with {_listed(allowed)}."
            )
        for key in content:
            if key not in allowed:
                raise ConfigurationError(
                    f"{where}: unknown key {shown(key)}; allowed are {_listed(allowed)}."
                )
        self.where = where
        self._content = content
        self._allowed = allowed

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def get(self, key: str) -> object:
        """Whatever is there. Raises ConfigurationError if nothing is."""
        if key not in self._content:
            raise ConfigurationError(
                f"{self.where}: missing key {key!r}; allowed are {_listed(self._allowed)}."
            )
        return self._content[key]

    @property
    def keys(self) -> tuple[str, ...]:
        """What is there, in order."""
        return tuple(self._content)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; `default`, if there is one, where nothing is."""
        if default is not None and key not in self:
            return default
        value = self.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -1e300 < value < 1e300
        ):
            raise self.wrong(key, "a number")
        return float(value)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number that fits in 63 bits; `default`, if there is one, where nothing is."""
        if default is not None and key not in self:
            return default
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >> 63:
            raise self.wrong(key, "a whole number")
        return value

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a text")
        return value

    def pair(self, key: str) -> tuple[float, float]:
        """Two finite numbers."""
        value = self.get(key)
        if isinstance(value, list | tuple) and len(value) == 2:
            both = Section(f"{self.where}.{key}", dict(zip(_PLACES, value, strict=True)), _PLACES)
            return both.number(_PLACES[0]), both.number(_PLACES[1])
        raise self.wrong(key, "two numbers")

    def section(self, key: str, allowed: Sequence[str]) -> "Section":
        """A dictionary inside this one."""
        return Section(f"{self.where}.{key}", self.get(key), allowed)

    def named(self, key: str) -> "Section":
        """A dictionary inside this one in which names are free, but there is at least one."""
        value = self.get(key)
        if not isinstance(value, Mapping) or not value:
            raise self.wrong(key, "an object with at least one name")
        if not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "names that are texts")
        return Section(f"{self.where}.{key}", value, tuple(value))

    def wrong(self, key: str, expected: str) -> ConfigurationError:
        """The error about the value of a key."""
        return ConfigurationError(
            f"{self.where}.{key}: found {shown(self.get(key))}; expected {expected}."
        )


def choice(where: str, content: object, kinds: Sequence[str]) -> tuple[str, "Section"]:
    """A dictionary with exactly one key, which says what kind of thing its value is."""
    section = Section(where, content, kinds)
    present = [kind for kind in kinds if kind in section]
    if len(present) != 1:
        raise ConfigurationError(
            f"{where}: found {shown(content)}; expected an object with one of {_listed(kinds)}."
        )
    return present[0], section


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
