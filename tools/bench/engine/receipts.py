"""What a replica's loop published for each request, token by token, and when."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.engine.request import FinishReason, RequestOutput
from tools.bench.engine.works import Job


class EngineError(Exception):
    """The engine failed, or answered something else than what it was asked for."""


@dataclass(slots=True)
class Receipt:
    """One request's output.

    times: of each token, on `time.perf_counter`: when the loop published it. Tokens that one step
    brought together have the same time. end: the output that ended the request; None: none did.
    """

    request_id: str
    job: Job
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end: RequestOutput | None = None

    @property
    def cancelled(self) -> bool:
        """It ended because it was told to."""
        return self.end is not None and self.end.finish is FinishReason.CANCELLED

    def check_whole(self) -> None:
        """Raise EngineError unless the request ended with every token it was to bring."""
        if self.end is None or self.end.finish is not FinishReason.LENGTH:
            how = "not at all" if self.end is None else f"{self.end.finish}: {self.end.detail}"
            raise EngineError(f"Request {self.request_id} ended as {how}")
        if len(self.tokens) != self.job.output_tokens:
            raise EngineError(
                f"Request {self.request_id} brought {len(self.tokens)} tokens, not "
                f"{self.job.output_tokens}."
            )


class Receipts:
    """The receipts of one run: one thread adds requests, the loop's thread takes in outputs.

    done: is set once every request has ended, after `close`. ended_at: when that was.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.ended_at = 0.0
        self._of: dict[str, Receipt] = {}
        self._ended = 0
        self._closed = False
        self._lock = threading.Lock()

    def add(self, request_id: str, job: Job) -> Receipt:
        """A receipt for a request that is about to be handed over."""
        receipt = self._of[request_id] = Receipt(request_id, job)
        return receipt

    def close(self) -> None:
        """No request is added any more."""
        with self._lock:
            self._closed = True
            self._see_end()

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """Take in what a step brought."""
        now = time.perf_counter()
        ends = 0
        for output in outputs:
            receipt = self._of[output.request_id]
            receipt.tokens.extend(output.tokens)
            for _ in output.tokens:
                receipt.times.append(now)
            if output.finish is not None:
                receipt.end = output
                ends += 1
        if ends:
            with self._lock:
                self._ended += ends
                self.ended_at = now
                self._see_end()

    def _see_end(self) -> None:
        if self._closed and self._ended == len(self._of):
            self.done.set()
