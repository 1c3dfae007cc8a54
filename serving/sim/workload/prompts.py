"""Token ids of a workload's prompts, made when asked for."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from serving.engine.plan import Int32
from serving.sim.workload.draws import whole
from serving.sim.workload.requests import Workload, WorkloadRequest

UInt64 = npt.NDArray[np.uint64]

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a number that is counted up, and spread.
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_HIGH = np.uint64(32)
_ALL = (1 << 64) - 1


class Prompts(Sequence[Int32]):
    """The prompt of each request, int32 [tokens], out of `vocab_size` ids.

    The same workload, seed and place give the same prompt, whatever was asked for before. Pieces of
    prefixes with equal numbers have equal tokens; all other tokens are random, so nothing else is
    found in a prefix cache. Tokens are a hash of their place rather than drawn in turn, since a
    NumPy generator for each piece of 512 tokens would take most of the time.
    """

    def __init__(self, workload: Workload, vocab_size: int, seed: int) -> None:
        """Raises ConfigurationError if vocab_size or seed is out of range."""
        whole("vocab_size", vocab_size, most=1 << 31)
        whole("seed", seed, least=0)
        self._requests = workload.requests
        self._piece = workload.prefix_tokens
        self._vocab = np.uint64(vocab_size)
        own, shared = _spread(np.arange(2, dtype=np.uint64) + np.uint64(2 * seed & _ALL)).tolist()
        self._own_key = np.uint64(own)
        self._shared_key = np.uint64(shared)

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> Int32: ...
    @overload
    def __getitem__(self, index: slice) -> list[Int32]: ...
    def __getitem__(self, index: int | slice) -> Int32 | list[Int32]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._tokens(place, self._requests[place])

    def _tokens(self, place: int, request: WorkloadRequest) -> Int32:
        shared = min(len(request.prefix) * self._piece, request.prompt)
        starts = np.empty(request.prompt, np.uint64)
        steps = np.arange(request.prompt, dtype=np.uint64)
        if shared:
            numbers = np.array(request.prefix, np.uint64)
            keys = _spread(_spread(numbers) ^ self._shared_key)
            starts[:shared] = np.repeat(keys, self._piece)[:shared]
            steps[:shared] %= np.uint64(self._piece)
        starts[shared:] = _spread(_spread(np.array([place], np.uint64)) ^ self._own_key)
        high = _spread(starts + steps * np.uint64(_STEP)) >> _HIGH
        # The high half of the product is even over the vocabulary, with no division.
        return (high * self._vocab >> _HIGH).astype(np.int32)


def _spread(values: UInt64) -> UInt64:
    """Numbers far from each other for numbers next to each other; arithmetic wraps, as it must."""
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])
