"""lumen-serve as a newcomer starts it: the default model, two replicas on a CPU."""

import subprocess
import sys

import grpc.aio
import openai
import pytest

from lumen.default_model import default_model
from lumen.errors import ModelUnavailableError
from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from tests.e2e.live import CHANNEL_OPTIONS, LiveServer, greedy, read
from tools.bench.spawn import running_server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2():
    try:
        default_model()
    except ModelUnavailableError as error:
        pytest.skip(f"THE DEFAULT MODEL IS NOT TESTED END TO END: {error}")
    with running_server(["--platform=cpu"]) as server:
        yield LiveServer(server)


@pytest.fixture
async def client(smollm2):
    async with openai.AsyncOpenAI(
        base_url=f"{smollm2.server.http}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_a_completion_is_the_known_text(client):
    answer = await client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0
    )
    assert answer.choices[0].text.startswith(" Paris")


async def test_a_chat_answer_streams_and_ends_by_itself(client):
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
    )
    chunks = [chunk async for chunk in stream if chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The capital of France is Paris."
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_stream_goes_on_when_the_worker_is_killed(smollm2):
    async with grpc.aio.insecure_channel(smollm2.server.grpc, CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.InferenceStub(channel)
        request = greedy("Once upon a time, there was a little girl named", 64)
        undisturbed = await read(stub.Generate(request))
        call = stub.Generate(request)
        first = [await call.read() for _ in range(4)]
        smollm2.kill("worker")
        output = await read(call, first)
    assert len(output.attempts) > 1
    assert len(output.tokens) == 64
    assert undisturbed.same_as(output)


def test_make_serve_answers_a_first_prompt():
    """Exactly what `make serve` runs, but on free ports."""
    command = [sys.executable, "-m", "serving.launch.serve", "--http_port=0", "--grpc_port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("its completion:"):
                    break
        finally:
            process.terminate()
    assert said[0].startswith("Lumen is ready: smollm2-135m-instruct at http://127.0.0.1:")
    assert " Paris" in said[-1]
    assert process.returncode == 0
