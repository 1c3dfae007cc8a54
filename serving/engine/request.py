"""What a request is to the engine: prompt, emitted tokens, sampling parameters."""

import enum
from dataclasses import dataclass


class Priority(enum.IntEnum):
    """Scheduling class; a smaller number goes first. Interactive work is HIGH, batch work LOW."""

    HIGH = 0
    LOW = 1


class FinishReason(enum.Enum):
    """Why a request ended. Every accepted request ends in exactly one of these."""

    STOP = "stop"  # a stop token (or, at the gateway, a stop string)
    LENGTH = "length"  # max_tokens or the model's length limit
    CANCELLED = "cancelled"  # by the client
    FAILED = "failed"  # `detail` says why
    DEADLINE = "deadline"  # the request's own deadline passed


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    The draw of the token at position p uses fold_in(key(seed), p) and nothing else, so it does
    not depend on batch, replica, migration or restart. Values are validated at the gateway
    (`serving.api.validation`); the engine trusts them.
    """

    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # uint32
    logprobs: int | None = None  # None: none; n >= 0: the chosen token's and the n best
    max_tokens: int = 16  # counts emitted tokens over all attempts
    min_tokens: int = 0  # stop tokens are masked out before this many
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # the model's own end tokens do not stop; stop_token_ids do


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One attempt at a generation, as a worker receives it.

    `emitted` are tokens that earlier attempts delivered: context here, never emitted again.
    The token with index i is the i-th generated token counted over all attempts; the first one
    of this attempt has index len(emitted).
    """

    request_id: str
    attempt: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    emitted: tuple[int, ...] = ()
    priority: Priority = Priority.HIGH
    deadline: float | None = None  # on the clock passed to the core as `now`, seconds


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one emitted token, of the model's own distribution (temperature 1)."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


@dataclass(slots=True, unsafe_hash=True)
class RequestOutput:
    """A run of tokens of one request, and its end if it ended.

    tokens[j] has index start_index + j. `logprobs` is empty or as long as `tokens`.
    `retriable`: a FAILED end that was the replica's fault, so another attempt may succeed.

    A value like the others: nobody changes it. It is not frozen only because one is made per
    running request and step, and a frozen dataclass takes six times as long to make.
    """

    request_id: str
    attempt: int
    start_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    detail: str = ""  # for FAILED and DEADLINE: a sentence
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    retriable: bool = False
