"""Doubles for tests of the front doors: a Gateway in memory and a tokenizer of bytes.

The gateway's tokens come from a function of the request.

It keeps the protocol's rules (leases, aborts, duplicate ids) and records what was asked of it.
"""

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from lumen.errors import TokenizerError
from serving.cluster.generation import Delta, GatewayInfo, GenerationRequest
from serving.engine.request import FinishReason, TokenLogprobs
from serving.errors import LumenError, RequestExistsError, UnknownRequestError
from serving.policy.snapshot import FleetSnapshot

Answer = Callable[[GenerationRequest], Sequence[int]]


@dataclass
class Running:
    """One request: the tokens it will give, in runs, and how it ends."""

    request: GenerationRequest
    tokens: tuple[int, ...]
    run: int
    finish: FinishReason
    detail: str = ""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0


class ScriptedStream:
    def __init__(self, gateway: "ScriptedGateway", running: Running, from_index: int) -> None:
        self.request = running.request
        self._gateway = gateway
        self._running = running
        self._next = from_index

    async def __aiter__(self) -> AsyncIterator[Delta]:
        running = self._running
        while True:
            if self._gateway.hold_at is not None and self._next >= self._gateway.hold_at:
                self._gateway.held.set()
                await running.aborted.wait()
            if running.aborted.is_set():
                yield Delta(self._next, (), finish=FinishReason.CANCELLED)
                return
            await asyncio.sleep(0)
            run = running.tokens[self._next : self._next + running.run]
            end = self._next + len(run)
            last = end == len(running.tokens)
            start, self._next = self._next, end
            running.sent = max(running.sent, end)
            yield Delta(
                start,
                run,
                logprobs=tuple(self._logprobs(one) for one in run)
                if self.request.sampling.logprobs is not None
                else (),
                finish=running.finish if last else None,
                detail=running.detail if last else "",
                cached_tokens=self._gateway.cached_tokens,
            )
            if last:
                return

    def _logprobs(self, token: int) -> TokenLogprobs:
        best = [(token, -0.5), (token + 1, -1.5), (token + 2, -2.5)]
        return TokenLogprobs(-0.5, tuple(best[: self.request.sampling.logprobs]))

    async def aclose(self) -> None:
        self._running.closed.set()
        if self.request.resume_lease_s == 0:
            self._running.aborted.set()


class ScriptedGateway:
    """answer: gives the tokens; cut at max_tokens. hold_at: streams wait before that token."""

    def __init__(self, answer: Answer, run: int = 1) -> None:
        self.answer = answer
        self.run = run
        self.finish = FinishReason.STOP
        self.detail = ""
        self.hold_at: int | None = None
        self.held = asyncio.Event()
        self.refusal: LumenError | None = None
        self.cached_tokens = 0
        self.ready = True
        self.draining = False
        self.fleet = FleetSnapshot((), ())
        self.submitted: list[GenerationRequest] = []
        self.running: dict[str, Running] = {}

    async def submit(self, request: GenerationRequest) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        if request.request_id in self.running:
            raise RequestExistsError(f"Request {request.request_id} is already in progress.")
        self.submitted.append(request)
        tokens = tuple(self.answer(request))
        cut = len(tokens) > request.sampling.max_tokens
        running = Running(
            request,
            tokens[: request.sampling.max_tokens],
            self.run,
            FinishReason.LENGTH if cut else self.finish,
            "" if cut else self.detail,
        )
        self.running[request.request_id] = running
        return ScriptedStream(self, running, 0)

    async def resume(self, request_id: str, from_index: int) -> ScriptedStream:
        return ScriptedStream(self, self._known(request_id), from_index)

    async def abort(self, request_id: str) -> None:
        self._known(request_id).aborted.set()

    async def drain(self) -> None:
        self.draining = True

    def info(self) -> GatewayInfo:
        return GatewayInfo(
            gateway_id="scripted",
            ready=self.ready,
            draining=self.draining,
            queued=3,
            running=2,
            max_queued_requests=8,
            workers=(),
            fleet=self.fleet,
        )

    async def until_held(self) -> None:
        """Wait until a stream waits at `hold_at`."""
        await self.held.wait()

    def forget_aborts(self, run: int) -> None:
        """Let every request be read again, in runs of that many tokens."""
        for running in self.running.values():
            running.aborted.clear()
            running.run = run

    def _known(self, request_id: str) -> Running:
        if request_id not in self.running:
            raise UnknownRequestError(f"No request {request_id} is known.")
        return self.running[request_id]


BOS, EOS = 256, 257
VOCABULARY = 320


class ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(bytes(one for one in tokens if one < 256))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Token n is byte n; 256 begins a text, 257 ends it, the rest of the vocabulary is silent."""

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(one for one in tokens if one < 256).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.has_chat_template:
            raise TokenizerError("This model has no chat template; use /v1/completions.")
        turns = "".join(f"<{one['role']}>{one['content']}\n" for one in messages)
        return turns + "<assistant>"

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def detokenizer(self) -> ByteDetokenizer:
        return ByteDetokenizer()


@pytest.fixture(scope="session")
def scripted_gateway() -> type[ScriptedGateway]:
    return ScriptedGateway


@pytest.fixture(scope="session")
def byte_tokenizer() -> type[ByteTokenizer]:
    return ByteTokenizer
