"""The official client against the real server: what it sends works, what it gets it understands."""

import asyncio

import openai
import pytest

from serving.engine.request import FinishReason
from serving.errors import DrainingError, QueueFullError

MODEL = "tiny/byte-model"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(served):
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as one:
        yield one


async def test_models(client):
    assert [one.id async for one in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "lumen"


async def test_completion(client):
    answer = await client.completions.create(model=MODEL, prompt="hello", logprobs=1, seed=3)
    assert answer.choices[0].text == "HELLO"
    assert answer.choices[0].logprobs.tokens == list("HELLO")
    assert answer.usage.total_tokens == 11


async def test_completion_stream_with_usage(client):
    stream = await client.completions.create(
        model=MODEL, prompt=["hello", "you"], stream=True, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == ["HELLO", "YOU"]
    assert usage.completion_tokens == 8


async def test_chat(client):
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, max_completion_tokens=6,
        extra_body={"top_k": 5, "ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "<USER>")
    assert choice.finish_reason == "length"
    assert [one.token for one in choice.logprobs.content] == list("<USER>")
    assert choice.logprobs.content[0].top_logprobs[1].logprob == -1.5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream_with_usage_and_stop(client):
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True},
        stop=["LLO"],
    )  # fmt: skip
    chunks = [one async for one in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == "<USER>HE"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 11


async def test_streaming_helper_of_the_client(client):
    async with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "<USER>HELLO\n<ASSISTANT>"


async def test_closing_a_stream_frees_the_request(client, served):
    served.gateway.hold_at = 3
    stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
    assert (await anext(aiter(stream))).choices[0].text == "HEL"
    await stream.close()
    (running,) = served.gateway.running.values()
    await asyncio.wait_for(running.closed.wait(), 20)
    assert running.aborted.is_set()


async def test_errors_are_the_clients_own_kinds(client, served):
    async def complete(**fields):
        await client.completions.create(**{"model": MODEL, "prompt": "hello", **fields})

    with pytest.raises(openai.BadRequestError) as bad:
        await complete(temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    assert bad.value.request_id == "id0"
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported") as bad:
        await complete(logit_bias={"5": 1})
    assert bad.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        await complete(model="gpt-9")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.APIStatusError) as large:
        await complete(prompt="x" * 10_000_000)
    assert large.value.status_code == 413
    served.gateway.refusal = QueueFullError("Too many wait.", 7.0)
    with pytest.raises(openai.RateLimitError) as full:
        await complete()
    assert full.value.response.headers["Retry-After"] == "7"
    served.gateway.refusal = DrainingError("About to stop.")
    with pytest.raises(openai.InternalServerError) as draining:
        await complete()
    assert draining.value.status_code == 503


async def test_an_error_mid_stream_is_raised_by_the_client(client, served):
    served.gateway.finish = FinishReason.FAILED
    served.gateway.detail = "The worker fell over."
    stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
    texts = []
    show = texts.append

    async def read():
        async for chunk in stream:
            show(chunk.choices[0].text)

    with pytest.raises(openai.APIError, match="The worker fell over"):
        await read()
    assert texts == ["HEL"]


async def test_the_synchronous_client(served):
    def drive():
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model=MODEL, prompt="hello").choices[0].text
            chunks = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            streamed = "".join(one.choices[0].delta.content or "" for one in chunks)
            return [one.id for one in client.models.list()], whole, streamed

    models, whole, streamed = await asyncio.to_thread(drive)
    assert (models, whole, streamed) == ([MODEL], "HELLO", "<USER>HELLO\n<ASSISTANT>")
