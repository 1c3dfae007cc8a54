"""What was seen of one request."""

import time
from dataclasses import dataclass, field

from tools.bench.workload import Task


@dataclass(slots=True)
class RequestRecord:
    """Times are those of `time.perf_counter`, in seconds.

    started_at: when the request was due (open loop) or sent; waiting inside the benchmark counts.
    arrivals: (time, tokens) of each message with output. OpenAI chunks do not say how many
        tokens they hold: each counts as one arrival, and `output_tokens` comes from the usage.
    error: empty, or the kind of failure.
    """

    task: Task
    started_at: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # gRPC only
    output_tokens: int = 0
    cached_tokens: int = 0
    ended_at: float = 0.0
    error: str = ""

    def arrived(self, tokens: int) -> None:
        """Output came just now."""
        self.arrivals.append((time.perf_counter(), tokens))

    def finish(self, error: str = "") -> None:
        """The request ended; a forced length that was missed is an error of its own."""
        self.ended_at = time.perf_counter()
        self.error = error
        if not error and self.output_tokens != self.task.output_tokens:
            self.error = "wrong output length"

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals[0][0] - self.started_at

    @property
    def e2e_s(self) -> float:
        """From start to end."""
        return self.ended_at - self.started_at

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for one token."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.output_tokens - 1)

    def itl_s(self) -> list[float]:
        """Gap before each token after the first; tokens that came in one message have gap 0."""
        gaps: list[float] = [0.0] * (self.arrivals[0][1] - 1)
        for (before, _), (at, tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps.append(at - before)
            gaps.extend([0.0] * (tokens - 1))
        return gaps
