"""A token stream as text: incremental, ended by stop strings, the same however it was cut."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.api.text.stop_matcher import StopMatcher
from serving.cluster.generation import Delta, Gateway, GenerationRequest, TokenStream
from serving.engine.request import FinishReason, TokenLogprobs
from serving.errors import InternalError, InvalidRequestError, UnknownRequestError

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class Detokenizer(Protocol):
    """Tokens to text, one request's worth; never gives out part of a character."""

    def push(self, tokens: Sequence[int]) -> str:
        """Take more tokens; return the characters they complete."""
        ...

    def flush(self) -> str:
        """The end: what remains, with U+FFFD for bytes that never became a character."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts so far. cached_tokens: prompt tokens found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens and the text that became certain; the last delta of a stream has `finish` set.

    tokens[j] is generated token number start_index + j. Text may lag behind the tokens: an
    unfinished character and the possible beginning of a stop string are held back. Tokens of a
    stop string are here, its text is not.
    offsets[j]: characters of text generated before token start_index + j.
    """

    start_index: int
    tokens: tuple[int, ...]
    text: str
    usage: Usage
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    detail: str = ""
    stop: str | None = None  # the stop string that ended the text
    attempt: int = 0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return self.usage.cached_tokens


class TextStream:
    """One client's view of a request, in text. Iterate once; `aclose()` as for TokenStream.

    The text after token i is a function of tokens 0..i, so a stream resumed at token `skip`
    takes the tokens from 0 again, swallows what was delivered, and goes on with the same text.
    The first `min_tokens` tokens are not searched for stop strings.
    """

    def __init__(
        self,
        gateway: Gateway,
        stream: TokenStream,
        detokenizer: Detokenizer,
        silent_tokens: frozenset[int],
        skip: int = 0,
    ) -> None:
        """silent_tokens: those that end a text without belonging to it."""
        self._gateway = gateway
        self._stream = stream
        self._detokenizer = detokenizer
        self._silent = silent_tokens
        self._skip = skip
        self._matcher = StopMatcher(stream.request.stop)
        self._count = 0  # tokens taken
        self._characters = 0  # of text generated
        self._cached = 0

    @property
    def request(self) -> GenerationRequest:
        """What is being generated."""
        return self._stream.request

    async def aclose(self) -> None:
        """Let go of the stream; safe to call twice and after the end."""
        await self._stream.aclose()

    async def __aiter__(self) -> AsyncGenerator[TextDelta]:
        """Deltas until one has `finish`.

        Raises InvalidRequestError if the request ended before token `skip`.
        """
        async for delta in self._stream:
            made = self._take(delta)
            if made.stop is not None:
                await self._end_early()
            if made.finish in _COMPLETE and self._count < self._skip:
                raise InvalidRequestError(
                    f"from_index is {self._skip}; the request ended with {self._count} tokens.",
                    "from_index",
                )
            if made.finish is not None or self._count > self._skip:
                yield made
            if made.finish is not None:
                return
        raise InternalError(f"The stream of request {self.request.request_id} broke off.")

    def _take(self, delta: Delta) -> TextDelta:
        self._cached = max(self._cached, delta.cached_tokens)
        first = self._count
        finish = delta.finish
        text: list[str] = []
        offsets: list[int] = []
        for token in delta.tokens:
            offsets.append(self._characters)
            piece = self._matched(self._spelled(token))
            self._count += 1
            if self._count > self._skip:
                text.append(piece)
            if self._matcher.match is not None:
                finish = FinishReason.STOP
                break
        else:
            if finish is not None:
                text.append(self._matched(self._detokenizer.flush()))
                if self._matcher.match is None:
                    text.append(self._matcher.flush())
                else:
                    finish = FinishReason.STOP
        taken = self._count - first
        old = min(max(self._skip - first, 0), taken)
        return TextDelta(
            start_index=first + old,
            tokens=delta.tokens[old:taken],
            text="".join(text),
            usage=Usage(len(self.request.prompt), self._count, self._cached),
            offsets=tuple(offsets[old:]),
            logprobs=delta.logprobs[old:taken],
            finish=finish,
            detail="" if self._matcher.match is not None else delta.detail,
            stop=self._matcher.match,
            attempt=delta.attempt,
        )

    def _spelled(self, token: int) -> str:
        return "" if token in self._silent else self._detokenizer.push((token,))

    def _matched(self, text: str) -> str:
        self._characters += len(text)
        if self._count < self.request.sampling.min_tokens:
            return text
        return self._matcher.push(text)

    async def _end_early(self) -> None:
        """The text is complete: the engine need not go on, lease or not."""
        if self.request.resume_lease_s > 0:
            with contextlib.suppress(UnknownRequestError):  # it may have ended by itself
                await self._gateway.abort(self.request.request_id)
        await self._stream.aclose()
