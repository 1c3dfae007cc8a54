"""What every HTTP handler works with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from serving.api.metrics import ServingMetrics
from serving.api.text import TextService
from serving.cluster.generation import Gateway


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """The gateway and what the HTTP handlers need beside it.

    draw_seed: a uint32 for requests without a seed. new_id: an id for requests that bring none.
    clock: monotonic, seconds, for latencies. wall_clock: seconds since 1970, for `created`.
    started: when the server started, seconds since 1970.
    decisions: the scheduler's last decisions, for /debug/decisions; dataclasses or plain values.
    """

    gateway: Gateway
    text: TextService
    metrics: ServingMetrics
    draw_seed: Callable[[], int]
    new_id: Callable[[], str]
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    started: int
    decisions: Callable[[], Sequence[object]] = tuple
    max_body_bytes: int = 4 * 1024 * 1024


FRONT_DOOR = web.AppKey("front_door", FrontDoor)
REQUEST_ID = web.RequestKey("request_id", str)
