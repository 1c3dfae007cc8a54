"""Runs a call: submits its requests, reads their streams together, answers whole or streamed.

However a handler ends (done, failed, cancelled because its client went away), every token stream
of its call is closed, which frees the requests' memory within a step.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

from aiohttp import web

from lumen.errors import LumenError
from serving.api.http.call import Call
from serving.api.http.errors import error_body, log_unexpected
from serving.api.http.front_door import FrontDoor
from serving.api.http.shapes import Answer, Json, Shape
from serving.api.observed_stream import ObservedStream
from serving.api.status import error_of_end
from serving.api.text import TextDelta, Usage

_DONE = b"data: [DONE]\n\n"
_WAITING_DELTAS = 64  # per call with several prompts; then its readers wait for the client


async def answer(
    request: web.Request, call: Call, shape: Shape, door: FrontDoor, arrived: float
) -> web.StreamResponse:
    """Generate and respond. Raises LumenErrors as long as nothing was sent."""
    async with _submitted(call, door, arrived) as streams:
        if call.stream:
            return await _streamed(request, call, shape, streams, door)
        return await _whole(call, shape, streams)


@contextlib.asynccontextmanager
async def _submitted(
    call: Call, door: FrontDoor, arrived: float
) -> AsyncIterator[list[ObservedStream]]:
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for one in call.requests:
            try:
                stream = await door.text.generate(door.gateway, one)
            except LumenError as error:
                door.metrics.refused(error)
                raise
            observer = door.metrics.accepted(len(one.prompt), arrived)
            observed = ObservedStream(stream, observer, door.clock)
            stack.push_async_callback(observed.aclose)
            streams.append(observed)
        yield streams


async def _whole(call: Call, shape: Shape, streams: list[ObservedStream]) -> web.Response:
    deltas: list[list[TextDelta]] = [[] for _ in streams]
    async with contextlib.aclosing(_merged(streams)) as merged:
        async for index, delta in merged:
            deltas[index].append(delta)
    answers = []
    for ones in deltas:
        finish = ones[-1].finish
        assert finish is not None, "a text stream ends with a finish or raises"
        text = "".join(one.text for one in ones)
        answers.append(Answer(text, tuple(ones), finish, ones[-1].usage))
    return web.Response(
        body=_json(shape.whole(call, answers)), content_type="application/json", charset="utf-8"
    )


async def _streamed(
    request: web.Request, call: Call, shape: Shape, streams: list[ObservedStream], door: FrontDoor
) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # proxies that know it pass events on at once
        }
    )
    await response.prepare(request)
    try:
        await _send(response, *shape.opening(call))
        usages: list[Usage | None] = [None] * len(streams)
        async with contextlib.aclosing(_merged(streams)) as merged:
            async for index, delta in merged:
                usages[index] = delta.usage
                if delta.text or delta.finish is not None or call.wants_logprobs:
                    await _send(response, shape.chunk(call, index, delta))
        await _send(response, *shape.closing(call, [one for one in usages if one is not None]))
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client is gone: nobody to tell
    except Exception as error:
        log_unexpected(error, request)
        await _send(response, error_body(error))
    await response.write(_DONE)
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, *events: Json) -> None:
    if events:
        await response.write(b"".join(b"data: " + _json(one) + b"\n\n" for one in events))


async def _merged(streams: list[ObservedStream]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """Deltas of all streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async with contextlib.aclosing(aiter(streams[0])) as deltas:
            async for delta in deltas:
                yield 0, _complete(delta)
        return
    arrived: asyncio.Queue[tuple[int, TextDelta | BaseException | None]] = asyncio.Queue(
        _WAITING_DELTAS
    )

    async def read(index: int, stream: ObservedStream) -> None:
        try:
            async with contextlib.aclosing(aiter(stream)) as deltas:
                async for delta in deltas:
                    await arrived.put((index, _complete(delta)))
            await arrived.put((index, None))
        except Exception as error:
            await arrived.put((index, error))

    readers = [asyncio.create_task(read(index, one)) for index, one in enumerate(streams)]
    try:
        running = len(readers)
        while running:
            index, news = await arrived.get()
            if isinstance(news, BaseException):
                raise news
            if news is None:
                running -= 1
            else:
                yield index, news
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _complete(delta: TextDelta) -> TextDelta:
    """The delta; raises UnavailableError or DeadlineExceededError if such an end is in it."""
    error = None if delta.finish is None else error_of_end(delta.finish, delta.detail)
    if error is not None:
        raise error
    return delta


def _json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
