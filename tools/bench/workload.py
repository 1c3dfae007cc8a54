"""What to ask for, and when: prompts, output lengths and arrival times, all from one seed."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths in tokens, drawn evenly from low to high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "LengthRange":
        """Read "128" or "64:256". Raises ValueError saying what was expected."""
        try:
            parts = [int(part) for part in text.split(":")]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 2 or parts[0] < 1 or parts[-1] < parts[0]:
            raise ValueError(f"{text!r} is not a length; expected tokens as 128 or LOW:HIGH.")
        return cls(parts[0], parts[-1])

    def draw(self, random: np.random.Generator) -> int:
        """One length."""
        return int(random.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class Task:
    """One request to send: at `at_s` after the start (open loop), or when a stream is free."""

    prompt: tuple[int, ...]
    output_tokens: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """How requests are drawn.

    token_ids: range prompts are made of. Prompts are random, so none is found in a prefix cache.
    """

    prompt_len: LengthRange
    output_len: LengthRange
    token_ids: LengthRange
    seed: int

    def tasks(self, count: int, rate: float | None = None, salt: int = 0) -> list[Task]:
        """`count` requests; with a rate (per second) they arrive as a Poisson process.

        Another `salt` gives other requests of the same kind, for warming up or repeating.
        """
        random = np.random.default_rng((self.seed, salt))
        gaps = np.zeros(count) if rate is None else random.exponential(1.0 / rate, count)
        arrivals = np.cumsum(gaps) - gaps[:1].sum()  # the first one comes at once
        return [
            Task(self._prompt(random), self.output_len.draw(random), float(at)) for at in arrivals
        ]

    def _prompt(self, random: np.random.Generator) -> tuple[int, ...]:
        ids = random.integers(
            self.token_ids.low, self.token_ids.high + 1, self.prompt_len.draw(random)
        )
        return tuple(ids.tolist())
