"""A request inside the engine: its explicit state and everything the engine knows about it."""

import enum
from dataclasses import dataclass, field

from serving.engine.plan import NO_ROWS, Int32, UInt32
from serving.engine.request import EngineRequest, Priority, SamplingParams
from serving.errors import InternalError


class RequestState(enum.Enum):
    """Where a request stands.

    WAITING: has no row and no blocks; new, or preempted with its emitted tokens as context.
    PREFILLING: has a row and blocks; part of its context is not yet planned to be computed.
    DECODING: its whole context is computed or submitted; tokens come one by one.
    ENDED: its end was published; only work in flight may remain.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


_LEGAL_MOVES = frozenset(
    {
        (RequestState.WAITING, RequestState.PREFILLING),
        (RequestState.WAITING, RequestState.ENDED),
        (RequestState.PREFILLING, RequestState.DECODING),
        (RequestState.PREFILLING, RequestState.WAITING),
        (RequestState.PREFILLING, RequestState.ENDED),
        (RequestState.DECODING, RequestState.WAITING),
        (RequestState.DECODING, RequestState.ENDED),
    }
)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One attempt at a generation while the engine has it.

    arrival: position in the order of arrival; decides within a class.
    tokens: prompt and generated tokens, those of earlier attempts included.
    end_len: len(tokens) at which it ends for its length.
    check_len: len(tokens) at which more than the stop tokens must be looked at; 0: always.
    stops: tokens that end it. mask: forbids them; None if there are none or min_tokens is 0.
    cached_tokens: prompt tokens found in the prefix cache when it was first admitted.
    chain: prefix-cache keys of the whole blocks of `tokens`, as far as they were needed.
    row, blocks: what it holds while PREFILLING or DECODING. registered: the leading blocks that
        the prefix cache was told about. context, prefilled: what the prefill computes, int32
        [context tokens], and how much of it was planned.
    last_step: the last plan it took part in before it lost its row. waiting_tokens: its context
        when it began to wait. preemptions: how often it lost its row.
    published: the leading tokens that outputs already had. publish_at: len(tokens) at which the
        next output is due; both are kept where EngineConfig.publish_every is more than 1.
    """

    request_id: str
    attempt: int
    arrival: int
    priority: Priority
    sampling: SamplingParams
    deadline: float | None
    prompt_len: int
    tokens: list[int]
    end_len: int
    stops: frozenset[int]
    mask: UInt32 | None
    check_len: int
    state: RequestState = RequestState.WAITING
    cached_tokens: int = -1
    chain: list[bytes] = field(default_factory=list)
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    registered: int = 0
    context: Int32 = field(default_factory=lambda: NO_ROWS)
    prefilled: int = 0
    last_step: int = 0
    waiting_tokens: int = 0
    preemptions: int = 0
    published: int = 0
    publish_at: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Request id and attempt."""
        return (self.request_id, self.attempt)

    @property
    def generated(self) -> int:
        """Tokens generated over all attempts; the index of the next one."""
        return len(self.tokens) - self.prompt_len

    @property
    def order(self) -> tuple[int, int]:
        """Sorts by class, then by arrival: who goes first, and from the back who is preempted."""
        return (self.priority, self.arrival)

    def move(self, to: RequestState) -> None:
        """The one place where a request changes its state. Raises InternalError if illegal."""
        if (self.state, to) not in _LEGAL_MOVES:
            raise InternalError(
                f"Request {self.request_id} (attempt {self.attempt}) cannot go from "
                f"{self.state.value} to {to.value}."
            )
        if to is RequestState.WAITING:
            self.preemptions += 1
        elif to is RequestState.ENDED:
            self.check_len = 0
        self.state = to


def stop_tokens(request: EngineRequest, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """The tokens that end a request: its own, and the model's unless they are ignored."""
    own = request.sampling.stop_token_ids
    return frozenset(own if request.sampling.ignore_eos else own + eos_token_ids)
