"""One form for what is asked of a fleet, whatever it was read from or drawn by."""

from dataclasses import dataclass

from serving.engine.request import Priority


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """What a request is promised.

    name: as in reports. priority: in scheduling. ttft_s, tpot_s: the most that its first token, and
    on average each further one, may take; None: no promise.
    """

    name: str
    priority: Priority = Priority.HIGH
    ttft_s: float | None = None
    tpot_s: float | None = None


INTERACTIVE = ServiceClass("interactive")
BATCH = ServiceClass("batch", Priority.LOW)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    at_s: when it arrives, from the start of the workload. prompt, output: tokens, at least 1 each;
    the output is forced to this length. prefix: numbers of the prompt's leading pieces, each of
    `Workload.prefix_tokens` tokens (the last may be shorter): requests with equal leading numbers
    have these tokens in common. tenant: who asks.
    """

    at_s: float
    prompt: int
    output: int
    service: ServiceClass = INTERACTIVE
    tenant: str = ""
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    name: for reports. seconds: how long requests arrive; the last may come before. prefix_tokens:
    of one piece of a prefix; 0 where no request has one. left_out: requests of the source that are
    not here, since nobody could hold them.
    """

    name: str
    seconds: float
    requests: tuple[WorkloadRequest, ...]
    prefix_tokens: int = 0
    left_out: int = 0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.requests) / self.seconds
