"""The official client against the real processes."""

import asyncio

import aiohttp
import openai
import pytest

MODEL = "random:tiny-llama"
PROMPT = "Once upon a time"


async def test_models(client):
    assert [model.id for model in (await client.models.list()).data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_a_completion_and_its_stream_are_the_same_text(client):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = await client.completions.create(**asked)
    stream = await client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert whole.usage.completion_tokens <= 24
    assert whole.choices[0].finish_reason in ("length", "stop")


async def test_chat_with_logprobs_and_seed(client):
    async def ask(seed):
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello?"}],
            max_tokens=12,
            seed=seed,
            logprobs=True,
            top_logprobs=2,
        )
        choice = answer.choices[0]
        assert len(choice.logprobs.content) <= 12
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
        return choice.message.content

    assert await ask(3) == await ask(3)


async def test_a_stop_string_ends_the_text_before_it(client):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = (await client.completions.create(**asked)).choices[0].text
    stop = whole[6:8]
    cut = (await client.completions.create(**asked, stop=stop)).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "gpt-9"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"prompt": [512]}, openai.BadRequestError, "512"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens"),
    ],
)
async def test_bad_requests_are_refused_by_name(client, changes, error, named):
    with pytest.raises(error) as refusal:
        await client.completions.create(**{"model": MODEL, "prompt": PROMPT, **changes})
    assert named in refusal.value.message


async def test_a_body_too_large_is_refused(client):
    with pytest.raises(openai.APIStatusError) as refusal:
        await client.completions.create(model=MODEL, prompt="a" * 10_000_000)
    assert refusal.value.status_code == 413


async def test_health_and_metrics(live, client):
    await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2)
    async with aiohttp.ClientSession(live.server.http) as http:
        async with http.get("/health") as health:
            assert health.status == 200
        async with http.get("/metrics") as page:
            metrics = await page.text()
    assert 'generation_tokens_total{model_name="random:tiny-llama"}' in metrics


async def test_many_streams_at_once(client):
    async def one(number):
        stream = await client.completions.create(
            model=MODEL, prompt=f"{PROMPT} {number}", max_tokens=20, temperature=0, stream=True,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )  # fmt: skip
        return [chunk async for chunk in stream][-1].usage.completion_tokens

    assert await asyncio.gather(*(one(number) for number in range(12))) == [20] * 12
