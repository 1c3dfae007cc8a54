"""Messages on their way into a gRPC stream: bounded, and never waited for by whoever adds."""

import asyncio
import logging
from collections import deque

_MOST = 64
"""Messages of a batch: steps of several hundred requests have some 10 KiB each, prompts more."""

_log = logging.getLogger(__name__)


class Outbox[Message]:
    """A queue between a core's shell, which must not wait, and a stream, which may be slow.

    Iterate over it for batches of all that waits, up to `_MOST` messages: a stream that comes for
    them seldom, because either end is busy, gets the more each time. When more than `capacity`
    messages wait, the peer reads too slowly to be of use: the outbox breaks, and its link with it.
    Both cores know how to go on after a broken link.
    """

    def __init__(self, peer: str, capacity: int = 4096) -> None:
        self._peer = peer
        self._capacity = capacity
        self._waiting: deque[Message] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def put(self, message: Message) -> None:
        """Append a message; dropped after `close`."""
        if self._closed:
            return
        if len(self._waiting) >= self._capacity:
            _log.warning(
                "%s left %d messages unread; breaking its link", self._peer, self._capacity
            )
            self.close()
            return
        self._waiting.append(message)
        self._news.set()

    def close(self) -> None:
        """End the iteration; what still waits is dropped."""
        self._closed = True
        self._waiting.clear()
        self._news.set()

    def __aiter__(self) -> "Outbox[Message]":
        return self

    async def __anext__(self) -> list[Message]:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        waiting = self._waiting
        return [waiting.popleft() for _ in range(min(len(waiting), _MOST))]
