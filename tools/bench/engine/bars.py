"""What to compare with: vLLM on one H200, and the floor and aim set for each line.

A 70B model over several GPUs has no peer: floor and aim are shares of what memory alone allows.
"""

from dataclasses import dataclass

MODEL = "random:llama-3.1-8b"
"""The only model the bars are of, in bfloat16."""

LARGE_MODEL = "random:llama-3.1-70b"
LARGE_DEVICES = 4
"""What the bars of the large model are of, in bfloat16; fewer devices are shown beside them."""

_LARGE_BATCH = 32
_LARGE_FLOOR = 0.5
_LARGE_AIM = 0.7
"""Of the speed that a step would have if weights and KV were all there is to it."""

SOURCE = (
    "vLLM 0.26.0 on one H200: random bf16 weights, 90 % of memory, FlashAttention 3, CUDA graphs, "
    "torch.compile, async scheduling, prefix caching off"
)


@dataclass(frozen=True, slots=True)
class Bar:
    """In the unit of its row. peer: vLLM's figure."""

    peer: float | None = None
    floor: float | None = None
    aim: float | None = None


NONE = Bar()

_DECODE_MS = {1: 4.92, 8: 5.27, 32: 6.38, 64: 7.67, 128: 10.67, 256: 17.71}
_DECODE_AIM_MS = {1: 3.96, 8: 4.47, 32: 5.42, 64: 6.6, 128: 9.0, 256: 15.1}
_PREFILL_MS = {1024: 27.9, 4096: 105.2, 16384: 489.9}

PREFILL_MANY = Bar(42_300.0, 42_300.0 / 0.98, 42_300.0 / 0.90)
OFFLINE = Bar(6_220.0, 1.05 * 6_220.0, 1.20 * 6_220.0)
MIX = Bar(9_930.0, 1.05 * 9_930.0, 1.20 * 9_930.0)
COLD_START = Bar(51.0, 35.0, 15.0)
WARM_START = Bar(29.1, 15.0, 6.0)
KV_CAPACITY = Bar(891_000.0, 880_000.0, 900_000.0)
INTERPRETER = Bar(None, 0.5)
"""Milliseconds per step: the bound that the executor seam was designed for, at batch 256."""


def decode(batch: int) -> Bar:
    """Milliseconds of a decode step at a context of 1,024."""
    peer = _DECODE_MS.get(batch)
    return NONE if peer is None else Bar(peer, 0.92 * peer, _DECODE_AIM_MS[batch])


def large_decode(batch: int, byte_floor_ms: float | None) -> Bar:
    """The same of the large model; byte_floor_ms: what memory alone takes."""
    if byte_floor_ms is None or batch != _LARGE_BATCH:
        return NONE
    return Bar(None, byte_floor_ms / _LARGE_FLOOR, byte_floor_ms / _LARGE_AIM)


def prefill(tokens: int) -> Bar:
    """Milliseconds of one prompt."""
    peer = _PREFILL_MS.get(tokens)
    return NONE if peer is None else Bar(peer, 0.98 * peer, 0.90 * peer)
