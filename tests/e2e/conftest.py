"""Real processes on free ports: lumen-serve with its gateway and its worker.

Servers are shared by a session and leave no state behind that a later test could see; a test that
kills something gets the server back ready. Models of these tests have random weights and a few
thousand parameters, so that starting takes seconds; `test_default_model.py` has the real one.
"""

import grpc
import grpc.aio
import openai
import pytest

from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from tests.e2e.live import CHANNEL_OPTIONS, TINY, LiveServer, until_healthy
from tools.bench.spawn import running_server


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Compiled programs are shared by all servers of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def live(cache_dir):
    with running_server([*TINY, f"--cache_dir={cache_dir}"]) as server:
        yield LiveServer(server)


@pytest.fixture
async def channel(live):
    async with grpc.aio.insecure_channel(live.server.grpc, CHANNEL_OPTIONS) as channel:
        await until_healthy(channel)  # the test before may have killed something
        yield channel


@pytest.fixture
def stub(channel):
    return pb_grpc.InferenceStub(channel)


@pytest.fixture
async def client(live):
    async with openai.AsyncOpenAI(
        base_url=f"{live.server.http}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
