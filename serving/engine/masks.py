"""Logit masks: which tokens may be drawn, one bit each."""

from collections.abc import Collection

import numpy as np

from serving.engine.plan import UInt32


def mask_without(vocab_size: int, forbidden: Collection[int]) -> UInt32:
    """All tokens but the forbidden ones: uint32 [ceil(vocab / 32)], bit i % 32 of word i // 32.

    Ids outside the vocabulary are ignored: they can never be drawn anyway.
    """
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[:vocab_size] = 1
    allowed[[token for token in sorted(forbidden) if 0 <= token < vocab_size]] = 0
    words = np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
    words.setflags(write=False)
    return words
