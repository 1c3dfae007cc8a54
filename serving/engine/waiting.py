"""Requests that wait for a row and for blocks: one queue per class, in order of arrival."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.request import Priority
from serving.errors import InternalError

_by_arrival = attrgetter("arrival")


class WaitingQueues:
    """First come, first served in a class; a preempted request returns to its old place.

    tokens: context tokens of all that wait, as they were when they came.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._queues: dict[Priority, list[ActiveRequest]] = {p: [] for p in Priority}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[ActiveRequest]:
        for queue in self._queues.values():
            yield from queue

    def head(self, priority: Priority) -> ActiveRequest | None:
        """The next request of a class, if one waits."""
        queue = self._queues[priority]
        return queue[0] if queue else None

    def higher_waits(self, priority: Priority) -> bool:
        """Whether a request of a higher class waits."""
        return any(self._queues[p] for p in Priority if p < priority)

    def add(self, request: ActiveRequest) -> None:
        """Put a request at its place by arrival."""
        request.waiting_tokens = len(request.tokens)
        self.tokens += request.waiting_tokens
        insort(self._queues[request.priority], request, key=_by_arrival)

    def remove(self, request: ActiveRequest) -> None:
        """Take a request out, wherever it stands."""
        queue = self._queues[request.priority]
        place = bisect_left(queue, request.arrival, key=_by_arrival)
        if place == len(queue) or queue[place] is not request:
            raise InternalError(f"Request {request.request_id} does not wait.")
        del queue[place]
        self.tokens -= request.waiting_tokens

    def check(self) -> None:
        """Raises InternalError unless every queue is in order and holds what belongs there."""
        if self.tokens != sum(request.waiting_tokens for request in self):
            raise InternalError("The number of waiting tokens is wrong.")
        for priority, queue in self._queues.items():
            if not queue:
                continue
            arrivals = [request.arrival for request in queue]
            if arrivals != sorted(set(arrivals)):
                raise InternalError(f"The waiting queue of {priority.name} is out of order.")
            for request in queue:
                if request.state is not RequestState.WAITING or request.priority is not priority:
                    raise InternalError(f"{request.request_id} waits in the wrong queue.")
                if request.blocks or request.row >= 0:
                    raise InternalError(f"{request.request_id} waits but holds a row or blocks.")
