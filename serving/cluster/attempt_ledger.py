"""Attempts that no request needs any more: aborted until their end is known, then acknowledged."""

from collections.abc import Callable

from serving.cluster.messages import AbortRequest
from serving.cluster.timers import Timers

# Messages may be lost and acknowledgements are not answered, so each is said three times. What
# is lost even so, the worker forgets by itself after `retain_ended_s`.
TIMES_ACKNOWLEDGED = 3


class AttemptLedger:
    """What is still to be said to workers about attempts that are over for the gateway."""

    def __init__(
        self, gateway_id: str, abort_retry_s: float, send: Callable[[str, AbortRequest], None]
    ) -> None:
        self._gateway_id = gateway_id
        self._abort_retry_s = abort_retry_s
        self._send = send  # to the worker of that id, if it is connected
        self._closing: dict[str, dict[int, str]] = {}  # request -> attempt -> worker
        self._acknowledge: dict[str, dict[tuple[str, int], int]] = {}
        self._timers: Timers[tuple[str, int]] = Timers()

    def close(self, worker_id: str, request_id: str, attempt: int, now: float) -> None:
        """Have this attempt aborted, again and again until its end is known."""
        attempts = self._closing.setdefault(request_id, {})
        if attempt not in attempts:
            attempts[attempt] = worker_id
            self._abort(request_id, attempt, now)

    def _abort(self, request_id: str, attempt: int, now: float) -> None:
        worker_id = self._closing[request_id][attempt]
        self._send(worker_id, AbortRequest(self._gateway_id, request_id, attempt))
        self._timers.arm((request_id, attempt), now + self._abort_retry_s)

    def next_due(self) -> float | None:
        """When an abort is to be repeated."""
        return self._timers.next_due()

    def tick(self, now: float) -> None:
        """Repeat the aborts that are due."""
        for request_id, attempt in self._timers.pop_due(now):
            self._abort(request_id, attempt, now)

    def is_closing(self, request_id: str) -> bool:
        """The end of an attempt at this request is not known yet."""
        return request_id in self._closing

    def abort_again(self, worker_id: str, now: float) -> None:
        """That worker is back: abort there what is still open, without waiting."""
        for request_id, attempt in self._closing_on(worker_id):
            self._abort(request_id, attempt, now)

    def _closing_on(self, worker_id: str) -> list[tuple[str, int]]:
        return [
            (request_id, attempt)
            for request_id, attempts in self._closing.items()
            for attempt, where in attempts.items()
            if where == worker_id
        ]

    def unknown(self, request_id: str, attempt: int) -> None:
        """Its worker does not have it: nothing to abort, nothing to acknowledge."""
        attempts = self._closing.get(request_id)
        if attempts is not None and attempt in attempts:
            del attempts[attempt]
            self._timers.disarm((request_id, attempt))
            if not attempts:
                del self._closing[request_id]

    def ended(self, worker_id: str, request_id: str, attempt: int) -> None:
        """Its end arrived: the worker may forget it."""
        self.unknown(request_id, attempt)
        self._acknowledge.setdefault(worker_id, {})[request_id, attempt] = TIMES_ACKNOWLEDGED

    def worker_gone(self, worker_id: str) -> None:
        """That incarnation is over, and everything on it."""
        self._acknowledge.pop(worker_id, None)
        for request_id, attempt in self._closing_on(worker_id):
            self.unknown(request_id, attempt)

    def take_acknowledgements(self, worker_id: str) -> tuple[tuple[str, int], ...]:
        """What the next heartbeat to that worker acknowledges."""
        due = self._acknowledge.pop(worker_id, {})
        again = {key: times - 1 for key, times in due.items() if times > 1}
        if again:
            self._acknowledge[worker_id] = again
        return tuple(due)

    def is_empty(self) -> bool:
        """Nothing is left to say."""
        return not self._closing and not self._acknowledge
