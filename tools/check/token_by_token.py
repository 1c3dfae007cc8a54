"""A tiny model through the whole engine, each token against a plain recomputation.

Requests of mixed lengths, more of them than there are rows, prompts longer than a prefill call,
and fewer blocks than all rows can fill: so prompts are cut and packed, run beside decodes in mixed
calls, rows are reused, and requests are preempted and computed again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from lumen.config import ModelConfig
from lumen.random_weights import RandomWeights
from serving.engine.device import build_device_executor
from tools.bench.engine.engine import EngineSettings, InProcessEngine, executor_config
from tools.bench.engine.receipts import Receipt
from tools.bench.engine.works import Job
from tools.check.plain_model import PlainModel

_OUTPUT_TOKENS = 24
_PROMPTS = (1, 2, 15, 16, 17, 31, 33, 40, 64, 65, 100, 7, 90, 3)
"""Around the sizes of blocks and calls."""

SETTINGS = EngineSettings(
    model="", dtype="float32", max_model_len=128, num_rows=4, block_size=16,
    prefill_buckets=(32,), max_prefills=4, memory_fraction=0.9, num_blocks=16, step_tokens=None,
    decode_steps=1, pipeline_depth=2, compile_threads=8, mixed_calls=((32, 4),),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """tokens: compared. wrong: of them, other than the plain model's. first_wrong: (request, token)
    of the first one, None if all are equal. closest: the least by which the plain model's best
    logit led over its second, so how near two tokens came to changing places."""

    requests: int
    tokens: int
    wrong: int
    first_wrong: tuple[int, int] | None
    closest: float


def check(
    config: ModelConfig,
    name: str,
    decode_steps: Sequence[int],
    cache_dir: Path | None,
    devices: Sequence[jax.Device],
) -> dict[int, TokenCheck]:
    """Generate greedily, with each of these numbers of decode steps per plan, and compare."""
    source = RandomWeights(config, name)
    executor = build_device_executor(source, devices, executor_config(SETTINGS, cache_dir), None)
    random = np.random.default_rng(3)
    jobs = [
        Job(tuple(random.integers(0, config.vocab_size, length).tolist()), _OUTPUT_TOKENS)
        for length in _PROMPTS
    ]
    plain = PlainModel(source)
    found = {}
    for steps in decode_steps:
        engine = InProcessEngine(executor, dataclasses.replace(SETTINGS, decode_steps=steps))
        try:
            receipts = [engine.submit(job) for job in jobs]
            engine.drain()
        finally:
            engine.close()
        for receipt in receipts:
            receipt.check_whole()
        found[steps] = compared(receipts, plain)
    return found


def compared(receipts: Sequence[Receipt], plain: PlainModel) -> TokenCheck:
    """Every token against what the plain model says after the tokens before it.

    The plain model reads the engine's own tokens: as long as all are equal, these are its own.
    """
    wrong, tokens, first, closest = 0, 0, None, np.inf
    for number, receipt in enumerate(receipts):
        prompt = receipt.job.prompt
        text = np.array([*prompt, *receipt.tokens[:-1]], np.int32)
        logits = plain.logits(text)[len(prompt) - 1 :]
        differ = logits.argmax(axis=1) != np.array(receipt.tokens)
        wrong += int(differ.sum())
        tokens += len(receipt.tokens)
        if first is None and differ.any():
            first = (number, int(differ.argmax()))
        second, best = np.partition(logits, -2, axis=1)[:, -2:].T
        closest = min(closest, float((best - second).min()))
    return TokenCheck(len(receipts), tokens, wrong, first, closest)
