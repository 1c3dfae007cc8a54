"""What a model could have said: the judge of every token that a client sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.engine.executor import ExecutorLimits
from serving.engine.masks import mask_without
from serving.engine.request import FinishReason, SamplingParams, TokenLogprobs
from serving.sim.token_function import TokenFunction


@dataclass(frozen=True, slots=True)
class Numerics:
    """The made-up model of a run; see TokenFunction.

    drift: every engine that is ever started draws other tokens, as two devices may differ in
    the last bits. Then tokens of two attempts must never mix, and if they do it shows.
    """

    limits: ExecutorLimits
    eos_token_ids: tuple[int, ...]
    eos_every: int
    drift: bool

    @property
    def max_context_tokens(self) -> int:
        """Tokens of prompt and output of one request."""
        return min(self.limits.max_model_len, self.limits.num_blocks * self.limits.block_size)


class Oracle:
    """Knows how every engine draws, and whether a token follows from what came before."""

    def __init__(self, numerics: Numerics) -> None:
        self.numerics = numerics
        self._functions: dict[str, TokenFunction] = {}

    def started(self, engine: str) -> str:
        """From now on this engine draws tokens too; the model revision it computes with."""
        numerics = self.numerics
        revision = numerics.limits.model_revision
        if numerics.drift:
            revision = f"{revision}/{engine}"
        if revision not in self._functions:
            self._functions[revision] = TokenFunction(
                revision, numerics.limits.vocab_size, numerics.eos_token_ids, numerics.eos_every
            )
        return revision

    def explains(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        index: int,
        sampling: SamplingParams,
        logprobs: TokenLogprobs | None,
    ) -> bool:
        """Whether someone draws tokens[index] (with these logprobs) after all before it."""
        context = np.array([*prompt, *tokens[:index]], np.int32)
        mask = None
        if index < sampling.min_tokens:
            mask = mask_without(self.numerics.limits.vocab_size, self._stops(sampling))
        for function in self._functions.values():
            drawn = function.next_token(context, sampling, mask)
            if drawn == tokens[index] and (
                logprobs is None
                or function.logprobs(context, sampling, 0).logprob == logprobs.logprob
            ):
                return True
        return False

    def end(
        self, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams
    ) -> FinishReason | None:
        """How a request with these tokens ends if nothing happens to it; None: it goes on."""
        if len(tokens) > sampling.min_tokens and tokens[-1] in self._stops(sampling):
            return FinishReason.STOP
        room = self.numerics.max_context_tokens - len(prompt)
        return FinishReason.LENGTH if len(tokens) >= min(sampling.max_tokens, room) else None

    def reference(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...] | None:
        """What an undisturbed run emits; None if that depends on the engine."""
        if self.numerics.drift:
            return None
        (function,) = self._functions.values()
        room = self.numerics.max_context_tokens - len(prompt)
        return function.reference_tokens(prompt, min(sampling.max_tokens, room), sampling)

    def _stops(self, sampling: SamplingParams) -> frozenset[int]:
        own = sampling.stop_token_ids
        return frozenset(own if sampling.ignore_eos else own + self.numerics.eos_token_ids)
