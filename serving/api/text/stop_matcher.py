"""Stop strings searched in text that arrives piece by piece."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through until a stop string is complete, and holds back what could become one.

    The stop string completed first ends the text; of several completed by the same character,
    the longest. That depends on the text alone, never on how it was cut into pieces. The search
    is that of Knuth, Morris and Pratt (1977), one automaton per stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._matched = [0] * len(stops)  # characters of each stop that the text now ends with
        self._first = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.match: str | None = None  # the stop string found

    def push(self, text: str) -> str:
        """Take more text; return what is certain not to belong to a stop string.

        After a match `match` is set, the returned text ends before it, and nothing may follow.
        """
        assert self.match is None, "the text ended at its stop string"
        if not self._held and self._first.isdisjoint(text):
            return text
        for position, character in enumerate(text):
            complete = self._advance(character)
            if complete is not None:
                self.match = complete
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: len(seen) - len(complete)]
        seen = self._held + text
        certain = len(seen) - max(self._matched, default=0)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """The text still held back: the text ended without completing a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        complete: str | None = None
        for which, stop in enumerate(self._stops):
            length = self._matched[which]
            while length and stop[length] != character:
                length = self._borders[which][length - 1]
            if stop[length] == character:
                length += 1
            self._matched[which] = length
            if length == len(stop) and (complete is None or length > len(complete)):
                complete = stop
        return complete


def _borders(pattern: str) -> list[int]:
    """borders[i]: length of the longest proper prefix of pattern[: i + 1] that also ends it."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[length] != pattern[position]:
            length = borders[length - 1]
        if pattern[length] == pattern[position]:
            length += 1
        borders[position] = length
    return borders
