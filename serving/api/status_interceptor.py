"""Turns every error of the public gRPC methods into its status, in one place."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.api.status import UNEXPECTED, message_of, retry_after_s, status_of
from serving.errors import InvalidRequestError

_log = logging.getLogger(__name__)

RETRY_AFTER = "retry-after-s"
"""Trailing metadata: seconds after which the same request may be taken."""

PARAMETER = "parameter"
"""Trailing metadata: the field of the request that was wrong."""

type _Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Wraps the methods of one service (`/package.Service/`).

    Errors of the LumenError family end the call with their status and sentence. Any other
    exception is a defect: it is logged with its traceback and ends the call INTERNAL. A message
    that cannot be parsed (invalid UTF-8 is one) ends it INVALID_ARGUMENT.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        wrap, behaviour = (
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
        )
        return wrap(
            _guarded(behaviour, method),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


async def abort_with(context: Any, error: BaseException, method: str) -> None:
    """End a call with the status of `error`; never returns."""
    status = status_of(error)
    if status is UNEXPECTED:
        _log.error("%s failed", method, exc_info=error)
    trailing: list[tuple[str, str]] = []
    if (wait_s := retry_after_s(error)) is not None:
        trailing.append((RETRY_AFTER, f"{wait_s:g}"))
    if isinstance(error, InvalidRequestError) and error.parameter is not None:
        trailing.append((PARAMETER, ascii(error.parameter)[1:-1]))
    await context.abort(status.grpc, message_of(error), tuple(trailing))


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Gives the error instead of raising it, where gRPC would answer with a vague status."""

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return InvalidRequestError(
                f"The message cannot be parsed ({error}); expected one of lumen.v1, with all text "
                "in valid UTF-8."
            )

    return decode


def _guarded(
    behaviour: Callable[[Any, Any], Awaitable[Any]], method: str
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, InvalidRequestError):
                raise request
            return await behaviour(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            if context.cancelled():
                raise  # the client is gone; there is nobody to tell
            await abort_with(context, error, method)

    return guarded
