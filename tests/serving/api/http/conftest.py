"""The real HTTP server on a free port of the loopback, in front of the scripted gateway."""

import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from serving.api.http import FrontDoor, HttpServer
from serving.api.metrics import ServingMetrics
from serving.api.text import TextService
from serving.api.validation import ModelLimits

MODEL = "tiny/byte-model"
LIMITS = ModelLimits(vocab_size=320, max_model_len=512)


def shout(request):
    """The prompt's letters in capitals, without its beginning-of-text token."""
    return [token - 32 if 97 <= token <= 122 else token for token in request.prompt if token < 256]


@dataclass
class Served:
    url: str
    gateway: Any
    door: FrontDoor
    session: aiohttp.ClientSession

    async def post(self, path, body=None, **more):
        """(status, body, headers) of a JSON answer."""
        if body is not None:
            more["json"] = body
        async with self.session.post(self.url + path, **more) as response:
            return response.status, await response.json(), response.headers

    async def get(self, path, method="GET"):
        async with self.session.request(method, self.url + path) as response:
            return response.status, await response.json(), response.headers


@pytest.fixture(scope="session")
def serve(scripted_gateway, byte_tokenizer):
    @contextlib.asynccontextmanager
    async def run(answer=shout, run=3, tokenizer=None, **settings):
        gateway = scripted_gateway(answer, run)
        text = TextService(MODEL, tokenizer or byte_tokenizer(), LIMITS, eos_token_ids=(257,))
        ids = itertools.count()
        seeds = itertools.count(1000)
        door = FrontDoor(
            gateway=gateway,
            text=text,
            metrics=ServingMetrics(MODEL, gateway.info),
            draw_seed=lambda: next(seeds),
            new_id=lambda: f"id{next(ids)}",
            clock=time.monotonic,
            wall_clock=time.time,
            started=1_700_000_000,
            **settings,
        )
        server = HttpServer(door)
        port = await server.start("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as session:
                yield Served(f"http://127.0.0.1:{port}", gateway, door, session)
        finally:
            await server.stop()

    return run


@pytest.fixture
async def served(serve):
    async with serve() as one:
        yield one
