"""A window of a recorded trace as jobs of the engine, played faster or slower."""

import itertools
from collections.abc import Iterator

import numpy as np

from serving.sim.workload import transforms
from serving.sim.workload.prompts import Prompts
from serving.sim.workload.requests import Workload
from serving.sim.workload.table import RequestTable
from tools.bench.engine.works import Job, TimedJob

_ORDER_SEED = 2
_PROMPT_SEED = 1  # of the prompts at their times; `endless` counts up from the next


def window(trace: Workload, start_s: float, seconds: float, max_tokens: int) -> Workload:
    """The requests that came within `seconds` from `start_s` on; times count from its start.

    max_tokens: of prompt and output; longer requests are left out, and counted. Raises ValueError
    if none is left.
    """
    found = transforms.fitting(transforms.window(trace, start_s, seconds), max_tokens)
    if not found.requests:
        raise ValueError(
            f"The trace has no request of at most {max_tokens} tokens between {start_s:g} and "
            f"{start_s + seconds:g} s."
        )
    return found


def mean_lengths(workload: Workload) -> tuple[float, float]:
    """Tokens of a prompt and of an output."""
    table = RequestTable.of(workload.requests)
    return float(table.prompt.mean()), float(table.output.mean())


def timed_jobs(workload: Workload, rate: float, vocab_size: int) -> list[TimedJob]:
    """The workload compressed or stretched in time to `rate` requests per second."""
    prompts = Prompts(workload, vocab_size, _PROMPT_SEED)
    return [
        TimedJob(one.at_s, Job(tuple(prompt.tolist()), one.output))
        for one, prompt in zip(transforms.at_rate(workload, rate).requests, prompts, strict=True)
    ]


def endless(workload: Workload, vocab_size: int) -> Iterator[Job]:
    """The requests in random order, over and over with other prompts, without their times."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(workload.requests)).tolist()
    for seed in itertools.count(_PROMPT_SEED + 1):
        prompts = Prompts(workload, vocab_size, seed)
        for place in order:
            yield Job(tuple(prompts[place].tolist()), workload.requests[place].output)
