"""Answers in OpenAI's JSON shapes: whole responses, and the chunks of streams."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.api.http.call import Call
from serving.api.text import TextDelta, TextService, Usage
from serving.engine.request import FinishReason

Json = dict[str, object]

_LOWEST_LOGPROB = -9999.0  # OpenAI's word for "next to impossible"; JSON has no infinity

_FINISH = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",  # by gRPC Abort; OpenAI has no word for it
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished choice."""

    text: str
    deltas: tuple[TextDelta, ...]
    finish: FinishReason
    usage: Usage


class Shape(Protocol):
    """How one endpoint writes its answers."""

    def whole(self, call: Call, answers: Sequence[Answer]) -> Json:
        """The body of an answer that was not streamed."""
        ...

    def opening(self, call: Call) -> list[Json]:
        """Chunks sent before the first token."""
        ...

    def chunk(self, call: Call, index: int, delta: TextDelta) -> Json:
        """One delta of choice `index`."""
        ...

    def closing(self, call: Call, usages: Sequence[Usage]) -> list[Json]:
        """Chunks sent after the last token: the usage, if it was asked for."""
        ...


class CompletionShape:
    """text_completion objects."""

    def __init__(self, text: TextService) -> None:
        self._text = text

    def whole(self, call: Call, answers: Sequence[Answer]) -> Json:
        """See Shape."""
        choices = [
            self._choice(call, index, one.text, one.deltas, one.finish)
            for index, one in enumerate(answers)
        ]
        usage = usage_json([one.usage for one in answers])
        return {**_head(call, "text_completion"), "choices": choices, "usage": usage}

    def opening(self, call: Call) -> list[Json]:
        """See Shape."""
        return []

    def chunk(self, call: Call, index: int, delta: TextDelta) -> Json:
        """See Shape."""
        choice = self._choice(call, index, delta.text, (delta,), delta.finish)
        return {**_head(call, "text_completion"), "choices": [choice], **_no_usage(call)}

    def closing(self, call: Call, usages: Sequence[Usage]) -> list[Json]:
        """See Shape."""
        return _usage_chunks(call, "text_completion", usages)

    def _choice(
        self,
        call: Call,
        index: int,
        text: str,
        deltas: Sequence[TextDelta],
        finish: FinishReason | None,
    ) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(deltas) if call.wants_logprobs else None,
            "finish_reason": None if finish is None else _FINISH[finish],
        }

    def _logprobs(self, deltas: Sequence[TextDelta]) -> Json:
        tokens: list[str] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for delta in deltas:
            for token, offset, entry in zip(
                delta.tokens, delta.offsets, delta.logprobs, strict=True
            ):
                name = self._name(token)
                tokens.append(name)
                logprobs.append(_finite(entry.logprob))
                top: dict[str, float] = {}
                for other, logprob in entry.top:  # best first: of one name, the best stays
                    top.setdefault(self._name(other), _finite(logprob))
                top.setdefault(name, _finite(entry.logprob))
                tops.append(top)
                offsets.append(offset)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """The token's text, or its bytes spelled out where they are not whole characters."""
        raw = self._text.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)


class ChatShape:
    """chat.completion and chat.completion.chunk objects."""

    def __init__(self, text: TextService) -> None:
        self._text = text

    def whole(self, call: Call, answers: Sequence[Answer]) -> Json:
        """See Shape."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.deltas) if call.wants_logprobs else None,
                "finish_reason": _FINISH[one.finish],
            }
            for index, one in enumerate(answers)
        ]
        usage = usage_json([one.usage for one in answers])
        return {**_head(call, "chat.completion"), "choices": choices, "usage": usage}

    def opening(self, call: Call) -> list[Json]:
        """See Shape."""
        return [
            self._chunk(call, index, {"role": "assistant", "content": ""})
            for index in range(len(call.requests))
        ]

    def chunk(self, call: Call, index: int, delta: TextDelta) -> Json:
        """See Shape."""
        return self._chunk(
            call,
            index,
            {"content": delta.text} if delta.text or delta.finish is None else {},
            self._logprobs((delta,)) if call.wants_logprobs else None,
            None if delta.finish is None else _FINISH[delta.finish],
        )

    def closing(self, call: Call, usages: Sequence[Usage]) -> list[Json]:
        """See Shape."""
        return _usage_chunks(call, "chat.completion.chunk", usages)

    def _chunk(
        self,
        call: Call,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        finish: str | None = None,
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**_head(call, "chat.completion.chunk"), "choices": [choice], **_no_usage(call)}

    def _logprobs(self, deltas: Sequence[TextDelta]) -> Json:
        content = [
            {
                **self._entry(token, entry.logprob),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in entry.top],
            }
            for delta in deltas
            for token, entry in zip(delta.tokens, delta.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        return {
            "token": self._text.token_text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._text.token_bytes(token)),
        }


def usage_json(usages: Sequence[Usage]) -> Json:
    """Token counts of all choices together."""
    prompt = sum(one.prompt_tokens for one in usages)
    completion = sum(one.completion_tokens for one in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in usages)},
    }


def _head(call: Call, kind: str) -> Json:
    return {"id": call.response_id, "object": kind, "created": call.created, "model": call.model}


def _no_usage(call: Call) -> Json:
    return {"usage": None} if call.include_usage else {}


def _usage_chunks(call: Call, kind: str, usages: Sequence[Usage]) -> list[Json]:
    if not call.include_usage:
        return []
    return [{**_head(call, kind), "choices": [], "usage": usage_json(usages)}]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
