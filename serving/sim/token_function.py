"""A stand-in for a model: the next token as a deterministic function of the whole context."""

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from serving.engine.masks import mask_without
from serving.engine.plan import Int32, UInt32
from serving.engine.request import SamplingParams, TokenLogprobs


class TokenFunction:
    """Draws tokens by hashing the context, so one wrong token of context changes what follows.

    Greedy draws depend on context and model revision; others on the seed as well. About one draw
    in `eos_every` is an end token of the model (0: only by chance).
    """

    def __init__(
        self,
        model_revision: str,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        eos_every: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._eos_every = eos_every if eos_token_ids else 0
        self._start = crc32(model_revision.encode())

    def next_token(
        self, context: Int32, sampling: SamplingParams, mask: UInt32 | None = None
    ) -> int:
        """The token after `context`, int32 [tokens]; `mask` as in StepPlan.masks."""
        state = self._state(context, sampling)
        for attempt in range(64):
            token = self._draw(state, attempt)
            if mask is None or _allows(mask, token):
                return token
        allowed = [
            token for token in range(self.vocab_size) if mask is None or _allows(mask, token)
        ]
        return allowed[state % len(allowed)]

    def logprobs(self, context: Int32, sampling: SamplingParams, count: int) -> TokenLogprobs:
        """Made-up but reproducible log-probabilities of the draw after `context`."""
        state = self._state(context, sampling)
        ids: list[int] = []
        attempt = 0
        while len(ids) < count:
            token = self._draw(state, attempt)
            attempt += 1
            if token not in ids:
                ids.append(token)
        first = -float(state % 1024) / 256  # exact in float32
        top = tuple((token, first - place) for place, token in enumerate(ids))
        return TokenLogprobs(first, top)

    def reference_tokens(
        self, prompt: Sequence[int], count: int, sampling: SamplingParams
    ) -> tuple[int, ...]:
        """What an undisturbed run emits: up to `count` tokens, the stop token included."""
        own = sampling.stop_token_ids
        stops = frozenset(own if sampling.ignore_eos else own + self.eos_token_ids)
        mask = mask_without(self.vocab_size, stops) if stops else None
        context = np.empty(len(prompt) + count, np.int32)
        context[: len(prompt)] = prompt
        for index in range(count):
            end = len(prompt) + index
            masked = mask if index < sampling.min_tokens else None
            context[end] = self.next_token(context[:end], sampling, masked)
            if int(context[end]) in stops and index >= sampling.min_tokens:
                return tuple(context[len(prompt) : end + 1].tolist())
        return tuple(context[len(prompt) :].tolist())

    def _state(self, context: Int32, sampling: SamplingParams) -> int:
        state = crc32(np.ascontiguousarray(context, "<i4").data, self._start)
        if sampling.temperature > 0:
            state = crc32(sampling.seed.to_bytes(8, "little"), state)
        return state

    def _draw(self, state: int, attempt: int) -> int:
        value = _mix(state + 0x9E3779B9 * (attempt + 1))
        if self._eos_every and value % self._eos_every == 0:
            return self.eos_token_ids[value // self._eos_every % len(self.eos_token_ids)]
        return _mix(value) % self.vocab_size


def _mix(value: int) -> int:
    """Spread a number over 32 bits, since a CRC is linear in its input."""
    value &= 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value >> 16)


def _allows(mask: UInt32, token: int) -> bool:
    return bool(int(mask[token // 32]) >> (token % 32) & 1)
