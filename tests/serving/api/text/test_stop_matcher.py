"""The matcher against a search in the whole text, for any cut of it."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from serving.api.text import StopMatcher

FEW = "ab\u00e9"  # few characters, so that matches and near-matches are common


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first, and that stop string."""
    ends = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text) - len(stop) + 1)
        if text.startswith(stop, start)
    ]
    if not ends:
        return text, None
    _, start, stop = min(ends)
    return text[:start], stop


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(one % (len(text) + 1) for one in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    text=st.text(FEW, max_size=40),
    stops=st.lists(st.text(FEW, min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 99), max_size=12),
)
@example(text="aabaaab", stops=["aaab"], cuts=[3, 5])
@example(text="abab", stops=["abb", "ba"], cuts=[1, 2, 3])
@example(text="abaab", stops=["abaabb", "aab"], cuts=[4])
def test_equals_search_in_whole_text(text, stops, cuts):
    matcher = StopMatcher(stops)
    expected, stop = naive(text, stops)
    out = ""
    for piece in cut(text, cuts):
        out += matcher.push(piece)
        assert expected.startswith(out)  # nothing was given out too early
        if matcher.match is not None:
            break
    else:
        out += matcher.flush()
    assert (out, matcher.match) == (expected, stop)


@given(
    text=st.text(FEW, max_size=30),
    stops=st.lists(st.text(FEW, min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_holds_back_no_more_than_needed(text, stops):
    matcher = StopMatcher(stops)
    out = matcher.push(text)
    if matcher.match is None:
        held = text[len(out) :]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )
        assert len(held) == longest


def test_of_two_completed_by_one_character_the_longest_wins():
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xxab") == "xx"
    assert matcher.match == "ab"
