"""The fixed work an engine is measured with: works (a) to (d), and tiny ones to try the tool."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PROMPT_SEED = 1  # of the token ids; what they are does not matter, only that none repeat


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `output_tokens` are forced, whatever the model says."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class TimedJob:
    """A request that comes `at_s` seconds after the start."""

    at_s: float
    job: Job


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output tokens of requests that all come at once."""

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(p + o for p, o in zip(self.prompts, self.outputs, strict=True))

    def jobs(self, vocab_size: int) -> list[Job]:
        """The requests, with random prompts out of the whole vocabulary."""
        random = np.random.default_rng(_PROMPT_SEED)
        return [
            Job(tuple(random.integers(0, vocab_size, prompt).tolist()), output)
            for prompt, output in zip(self.prompts, self.outputs, strict=True)
        ]


def alike(count: int, prompt: int, output: int) -> Lengths:
    """`count` requests of the same lengths."""
    return Lengths((prompt,) * count, (output,) * count)


@dataclass(frozen=True, slots=True)
class Mix:
    """Log-normal lengths as chats have them; most_*: where they are cut off, the least is 4."""

    count: int
    most_in: int
    most_out: int

    def lengths(self) -> Lengths:
        """In = clip(lognormal(5.0, 1.1)), out = clip(lognormal(5.2, 0.9)), of default_rng(0)."""
        random = np.random.default_rng(0)
        prompts = np.clip(random.lognormal(5.0, 1.1, self.count), 4, self.most_in)
        outputs = np.clip(random.lognormal(5.2, 0.9, self.count), 4, self.most_out)
        return Lengths(_whole(prompts), _whole(outputs))


def _whole(lengths: npt.NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(length) for length in lengths)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything measured.

    (a) decode: each of `batches` prompts of `context` tokens, once with `long` and once with
        `short` output tokens; a step is the difference over long - short. profiled: batches whose
        steps are traced.
    (b) prefill: one prompt of each of `prompts` tokens, one output token; `many` such prompts of
        `many_tokens`.
    (c) offline: requests, prompt, output. (d) mix.
    """

    batches: tuple[int, ...]
    context: int
    long: int
    short: int
    profiled: tuple[int, ...]
    prompts: tuple[int, ...]
    many: int
    many_tokens: int
    offline: tuple[int, int, int]
    mix: Mix


FULL = Sizes(
    batches=(1, 8, 32, 64, 128, 256),
    context=1024,
    long=128,
    short=16,
    profiled=(1, 32, 128, 256),
    prompts=(1024, 4096, 16384),
    many=32,
    many_tokens=2048,
    offline=(512, 1024, 256),
    mix=Mix(512, 4096, 1024),
)

SMOKE = Sizes(
    batches=(1, 4),
    context=24,
    long=16,
    short=4,
    profiled=(4,),
    prompts=(16, 40),
    many=3,
    many_tokens=20,
    offline=(6, 24, 8),
    mix=Mix(8, 96, 24),
)
