"""How long prompts and outputs are: distributions to draw them from."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serving.errors import ConfigurationError
from serving.sim.workload.draws import positive, whole
from serving.sim.workload.source_file import MOST_TOKENS
from serving.sim.workload.table import Tokens


class Lengths(Protocol):
    """A distribution of lengths."""

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """Tokens, int64 [count], at least 1 each."""
        ...


def _least_most(name: str, least: int, most: int) -> None:
    whole(f"least of {name}", least)
    whole(f"most of {name}", most, least, MOST_TOKENS)


@dataclass(frozen=True, slots=True)
class Fixed:
    """All the same: `tokens`."""

    tokens: int

    def __post_init__(self) -> None:
        _least_most("fixed length", self.tokens, self.tokens)

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """As in Lengths."""
        return np.full(count, self.tokens, np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each as likely as any other, from `least` to `most`, both included."""

    least: int
    most: int

    def __post_init__(self) -> None:
        _least_most("uniform lengths", self.least, self.most)

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """As in Lengths."""
        return random.integers(self.least, self.most + 1, count)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Half of them below `median`, their logarithms with a standard deviation of `sigma`.

    Rounded down, then cut off at `least` and `most`.
    """

    median: float
    sigma: float
    least: int = 1
    most: int = MOST_TOKENS

    def __post_init__(self) -> None:
        positive("median of log-normal lengths", self.median)
        positive("sigma of log-normal lengths", self.sigma)
        _least_most("log-normal lengths", self.least, self.most)

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """As in Lengths."""
        drawn = random.lognormal(math.log(self.median), self.sigma, count)
        return np.clip(drawn, self.least, self.most).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Zipf:
    """Lengths of the kind that Llumnix (OSDI'24) was evaluated with, after its public artifact.

    A rank from 1 to 2 * mean - 1 with a probability of rank ** -alpha, scaled so that the mean of
    what was drawn becomes `mean`, rounded up, and cut off at `most` (so the mean is a little off).
    """

    mean: int
    alpha: float
    most: int = 6144

    def __post_init__(self) -> None:
        whole("mean of lengths", self.mean)
        positive("alpha of lengths", self.alpha)
        _least_most("lengths", 1, self.most)

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """As in Lengths."""
        ranks = np.arange(1, 2 * self.mean, dtype=np.float64)
        upto = np.cumsum(ranks**-self.alpha)
        drawn = ranks[np.searchsorted(upto, random.random(count) * upto[-1], side="right")]
        scaled = np.ceil(drawn * (self.mean / drawn.mean()))
        lengths: Tokens = np.minimum(scaled, self.most).astype(np.int64)
        return lengths


LLUMNIX = {"S": Zipf(128, 2.0), "M": Zipf(256, 1.5), "L": Zipf(512, 1.15)}
"""Short, medium and long."""


def llumnix_mix(mix: str) -> tuple[Lengths, Lengths]:
    """(prompts, outputs) of a mix named as in the paper: "M-M", "S-L", "L-S"...

    Raises ConfigurationError if there is no such mix.
    """
    sizes = mix.split("-")
    if len(sizes) != 2 or any(size not in LLUMNIX for size in sizes):
        raise ConfigurationError(
            f"Llumnix has no mix {mix!r}; it is two of {', '.join(LLUMNIX)}, of prompts and of "
            "outputs, as M-M or S-L."
        )
    return LLUMNIX[sizes[0]], LLUMNIX[sizes[1]]
