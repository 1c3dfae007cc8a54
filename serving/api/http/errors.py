"""Errors as OpenAI's clients expect them: one JSON shape, a precise status, the request's id."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from aiohttp import web

from serving.api.field_checks import shown
from serving.api.http.front_door import FRONT_DOOR, REQUEST_ID
from serving.api.status import message_of, retry_after_s, status_of
from serving.api.validation import checked_request_id
from serving.errors import InvalidRequestError, RequestTooLargeError

REQUEST_ID_HEADER = "X-Request-Id"

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_body(error: BaseException) -> dict[str, object]:
    """The body, or the data of a server-sent event, that tells of an error."""
    status = status_of(error)
    return _body(
        message_of(error), status.openai_type, status.openai_code, getattr(error, "parameter", None)
    )


def error_response(error: BaseException) -> web.Response:
    """The response that refuses a request because of an error."""
    headers = {}
    wait = retry_after_s(error)
    if wait is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return _response(status_of(error).http, error_body(error), headers)


def log_unexpected(error: BaseException, request: web.Request) -> None:
    """Log in full what the client is told in general: 500s are defects of ours."""
    if status_of(error).http == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error(
            "%s %s (request %s) failed",
            request.method,
            request.path,
            request.get(REQUEST_ID, "?"),
            exc_info=error,
        )


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names the request, then turns whatever a handler raises into an error response."""
    request[REQUEST_ID] = request.app[FRONT_DOOR].new_id()
    try:
        given = request.headers.get(REQUEST_ID_HEADER)
        if given is not None:
            request[REQUEST_ID] = checked_request_id(given, REQUEST_ID_HEADER)
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        limit = request.app[FRONT_DOOR].max_body_bytes
        return error_response(
            RequestTooLargeError(f"The body is too large; this server reads at most {limit} bytes.")
        )
    except web.HTTPMethodNotAllowed as refusal:
        allowed = ", ".join(sorted(refusal.allowed_methods))
        return _refused(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{request.path} does not take {shown(request.method)}; use {allowed}.",
            "method_not_allowed",
            {"Allow": allowed},
        )
    except web.HTTPNotFound:
        return _refused(
            HTTPStatus.NOT_FOUND,
            f"There is no {shown(request.path)} here; see /v1/models for a start.",
            "not_found",
            {},
        )
    except web.HTTPException as other:
        status = HTTPStatus(other.status)
        return _refused(status, f"{status.phrase}.", status.name.lower(), {})
    except ConnectionError:
        raise  # the client is gone: nobody to tell
    except Exception as error:
        log_unexpected(error, request)
        return error_response(error)


async def name_request(request: web.Request, response: web.StreamResponse) -> None:
    """On every response, streamed ones included: the id to look for in logs."""
    if REQUEST_ID in request:
        response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]


def _refused(
    status: HTTPStatus, message: str, code: str, headers: Mapping[str, str]
) -> web.Response:
    return _response(status, _body(message, "invalid_request_error", code, None), headers)


def _response(status: int, body: object, headers: Mapping[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=json.dumps(body).encode(),
        content_type="application/json",
        headers=headers,
    )


def _body(message: str, kind: str, code: str | None, parameter: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


async def json_object(request: web.Request) -> dict[str, object]:
    """The body as a JSON object.

    Raises InvalidRequestError, or HTTPRequestEntityTooLarge beyond the application's limit.
    """
    limit = request.app[FRONT_DOOR].max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    try:
        raw = await request.read()
        body = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid UTF-8: byte {error.start} cannot be decoded."
        ) from error
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidRequestError("The body has a number of too many digits.") from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f"The body is {shown(body)}; expected a JSON object.")
    return body
