"""A text stream that counts into the metrics what its client gets; for both front doors."""

import contextlib
from collections.abc import AsyncGenerator, Callable

from lumen.errors import LumenError
from serving.api.metrics import RequestObserver
from serving.api.text import TextDelta, TextStream
from serving.cluster.generation import GenerationRequest
from serving.engine.request import FinishReason


class ObservedStream:
    """As the TextStream it wraps. Iterate once, then `aclose()`, which counts an early leave."""

    def __init__(
        self, stream: TextStream, observer: RequestObserver, clock: Callable[[], float]
    ) -> None:
        """clock: the one whose time `observer` was begun with."""
        self._stream = stream
        self._observer = observer
        self._clock = clock

    @property
    def request(self) -> GenerationRequest:
        """What is being generated."""
        return self._stream.request

    async def __aiter__(self) -> AsyncGenerator[TextDelta]:
        """Deltas until one has `finish`. Raises what the stream raises, counted as a failure."""
        try:
            async with contextlib.aclosing(aiter(self._stream)) as deltas:
                async for delta in deltas:
                    self._observer.observe(delta, self._clock())
                    yield delta
        except LumenError:
            self._observer.ended(FinishReason.FAILED, self._clock())
            raise

    async def aclose(self) -> None:
        """Let go of the stream; safe to call twice and after the end."""
        self._observer.ended(FinishReason.CANCELLED, self._clock())
        await self._stream.aclose()
