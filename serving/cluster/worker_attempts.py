"""What a worker remembers of one attempt: its output until the gateway has it all."""

from dataclasses import dataclass, field

from serving.engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs

type AttemptKey = tuple[str, int]  # (request_id, attempt): unique inside a worker


@dataclass(slots=True)
class Attempt:
    """One attempt that this worker accepted; it runs until `finish` is set.

    tokens[j] has index start_index + j; next_index is that of the token to come. All of them are
    kept until the end is acknowledged, so that a gateway that missed a message can ask again.
    """

    gateway_id: str
    replica: int
    request: EngineRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    detail: str = ""
    cached_tokens: int = 0
    retriable: bool = False
    cancelling: bool = False
    next_index: int = field(init=False)

    def __post_init__(self) -> None:
        """Start behind what earlier attempts emitted."""
        self.next_index = self.start_index

    @property
    def key(self) -> AttemptKey:
        """How the worker's table and the engine name it."""
        return (self.request.request_id, self.request.attempt)

    @property
    def start_index(self) -> int:
        """Index of the first token of this attempt."""
        return len(self.request.emitted)

    def is_repeated_by(self, request: EngineRequest) -> bool:
        """The same submit again, and not another request that happens to be named alike."""
        mine = self.request
        return (mine.prompt, mine.emitted, mine.sampling) == (
            request.prompt,
            request.emitted,
            request.sampling,
        )

    def append(self, output: RequestOutput) -> bool:
        """Keep what the engine published; True if that was the end.

        An engine publishes without gaps and ends once.
        """
        assert self.finish is None
        assert output.start_index == self.next_index
        # One call per running request and step: what is rare costs one look.
        self.tokens.extend(output.tokens)
        self.next_index += len(output.tokens)
        if output.logprobs:
            self.logprobs.extend(output.logprobs)
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        if output.finish is None:
            return False
        self.finish = output.finish
        self.detail = output.detail
        self.retriable = output.retriable
        return True

    def since(self, index: int) -> RequestOutput:
        """Everything from token `index` on, and the end if it ended."""
        first = min(max(index, self.start_index), self.next_index)
        skip = first - self.start_index
        return RequestOutput(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            start_index=first,
            tokens=tuple(self.tokens[skip:]),
            logprobs=tuple(self.logprobs[skip:]),
            finish=self.finish,
            detail=self.detail,
            cached_tokens=self.cached_tokens,
            retriable=self.retriable,
        )
