"""The application: its routes and their handlers."""

import dataclasses
import enum
import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version

from aiohttp import web

from lumen.errors import LumenError
from serving.api.field_checks import shown
from serving.api.http.call import Call
from serving.api.http.chat_call import chat_call
from serving.api.http.completion_call import completion_call
from serving.api.http.errors import errors_as_json, json_object, name_request
from serving.api.http.front_door import FRONT_DOOR, REQUEST_ID, FrontDoor
from serving.api.http.generation import answer
from serving.api.http.shapes import ChatShape, CompletionShape, Json, Shape
from serving.api.metrics import CONTENT_TYPE
from serving.errors import UnknownModelError

SLO_CLASS_HEADER = "X-Slo-Class"

_Understand = Callable[[dict[str, object], FrontDoor, str, str | None], Awaitable[Call]]


def http_app(door: FrontDoor) -> web.Application:
    """The OpenAI-compatible application in front of a gateway. See `HttpServer` to run it."""
    app = web.Application(middlewares=[errors_as_json], client_max_size=door.max_body_bytes)
    app[FRONT_DOOR] = door
    app.on_response_prepare.append(name_request)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{model:.+}", _model)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/version", _version)
    app.router.add_get("/debug/state", _debug_state)
    app.router.add_get("/debug/decisions", _debug_decisions)
    return app


async def _completions(request: web.Request) -> web.StreamResponse:
    door = request.app[FRONT_DOOR]
    return await _generate(request, door, completion_call, CompletionShape(door.text))


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    door = request.app[FRONT_DOOR]
    return await _generate(request, door, chat_call, ChatShape(door.text))


async def _generate(
    request: web.Request, door: FrontDoor, understand: _Understand, shape: Shape
) -> web.StreamResponse:
    arrived = door.clock()
    try:
        body = await json_object(request)
        call = await understand(
            body, door, request[REQUEST_ID], request.headers.get(SLO_CLASS_HEADER)
        )
    except LumenError as error:
        door.metrics.refused(error)
        raise
    return await answer(request, call, shape, door, arrived)


async def _models(request: web.Request) -> web.Response:
    door = request.app[FRONT_DOOR]
    return web.json_response({"object": "list", "data": [_model_json(door)]})


async def _model(request: web.Request) -> web.Response:
    door = request.app[FRONT_DOOR]
    name = request.match_info["model"]
    if name != door.text.model_id:
        raise UnknownModelError(
            f"The model {shown(name)} is not served here; expected {door.text.model_id!r}."
        )
    return web.json_response(_model_json(door))


def _model_json(door: FrontDoor) -> Json:
    return {
        "id": door.text.model_id,
        "object": "model",
        "created": door.started,
        "owned_by": "lumen",
        "max_model_len": door.text.limits.max_model_len,
    }


async def _health(request: web.Request) -> web.Response:
    info = request.app[FRONT_DOOR].gateway.info()
    if info.draining:
        reason = "draining: no new requests are taken"
    elif not info.ready:
        reason = "no healthy replica is connected"
    else:
        return web.json_response({"status": "ready"})
    return web.json_response(
        {"status": "unavailable", "reason": reason}, status=HTTPStatus.SERVICE_UNAVAILABLE
    )


async def _metrics(request: web.Request) -> web.Response:
    text = request.app[FRONT_DOOR].metrics.text()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": version("lumen-jax")})


async def _debug_state(request: web.Request) -> web.Response:
    return _debug(request.app[FRONT_DOOR].gateway.info())


async def _debug_decisions(request: web.Request) -> web.Response:
    return _debug({"decisions": list(request.app[FRONT_DOOR].decisions())})


def _debug(value: object) -> web.Response:
    return web.json_response(_plain(value))


def _plain(value: object) -> object:
    """Frozen dataclasses and enums as what JSON can say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
