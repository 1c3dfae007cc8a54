"""POST /v1/completions over a real socket."""

import asyncio
import json

import pytest

from serving.cluster.generation import GenerationRequest
from serving.engine.request import FinishReason, Priority
from serving.errors import QueueFullError

MODEL = "tiny/byte-model"


def body(**more):
    return {"model": MODEL, "prompt": "hello", "max_tokens": 64, **more}


async def events(response):
    """The data of every server-sent event, decoded but for the last, which must be [DONE]."""
    raw = (await response.read()).decode()
    assert raw.endswith("\n\n")
    data = [one.removeprefix("data: ") for one in raw.removesuffix("\n\n").split("\n\n")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


async def test_whole(served):
    status, answer, headers = await served.post("/v1/completions", body())
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {"index": 0, "text": "HELLO", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert answer["id"] == f"cmpl-{headers['X-Request-Id']}"


async def test_streamed_equals_whole(served):
    async with served.session.post(
        served.url + "/v1/completions",
        json=body(stream=True, stream_options={"include_usage": True}),
        headers={"X-Request-Id": "mine-1"},
    ) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert response.headers["X-Request-Id"] == "mine-1"
        chunks = await events(response)
    assert "".join(one["choices"][0]["text"] for one in chunks[:-1]) == "HELLO"
    assert [one["choices"][0]["finish_reason"] for one in chunks[:-1]] == [None, "stop"]
    assert all(one["usage"] is None and one["id"] == "cmpl-mine-1" for one in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 11


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_choices_in_order(served, stream):
    wanted = body(prompt=["one", "two", "three"], stream=stream)
    if stream:
        async with served.session.post(served.url + "/v1/completions", json=wanted) as response:
            texts = ["", "", ""]
            for chunk in await events(response):
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        _, answer, _ = await served.post("/v1/completions", wanted)
        texts = [one["text"] for one in sorted(answer["choices"], key=lambda one: one["index"])]
        assert answer["usage"]["completion_tokens"] == 11
    assert texts == ["ONE", "TWO", "THREE"]
    assert len({one.request_id for one in served.gateway.submitted}) == 3


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [([104, 105], ["HI"]), ([[104], [105, 105]], ["H", "II"]), (["a", [98]], ["A", "B"])],
)
async def test_prompts_as_token_ids(served, prompt, texts):
    status, answer, _ = await served.post("/v1/completions", body(prompt=prompt))
    assert status == 200
    assert [one["text"] for one in answer["choices"]] == texts


async def test_every_parameter_reaches_the_gateway(served):
    await served.post(
        "/v1/completions",
        body(
            temperature=0.25, top_p=0.5, top_k=3, min_p=0.125, seed=7, max_tokens=9, min_tokens=2,
            stop=["#", "##"], stop_token_ids=[300], ignore_eos=True, slo_class="batch",
            deadline_s=60, logprobs=2, user="somebody", n=1,
        ),
    )  # fmt: skip
    (sent,) = served.gateway.submitted
    assert isinstance(sent, GenerationRequest)
    assert bytes(sent.prompt[1:]) == b"hello"
    one = sent.sampling
    assert (one.temperature, one.top_p, one.top_k, one.min_p) == (0.25, 0.5, 3, 0.125)
    assert (one.seed, one.max_tokens, one.min_tokens, one.logprobs) == (7, 9, 2, 2)
    assert (one.stop_token_ids, one.ignore_eos) == ((300,), True)
    assert (sent.stop, sent.priority, sent.deadline_s) == (("#", "##"), Priority.LOW, 60.0)


async def test_defaults_are_openais(served):
    status, _, _ = await served.post("/v1/completions", {"model": MODEL, "prompt": "x"})
    assert status == 200
    (sent,) = served.gateway.submitted
    assert (sent.sampling.temperature, sent.sampling.max_tokens) == (1.0, 16)
    assert sent.sampling.seed == 1000  # drawn
    assert sent.priority is Priority.HIGH


async def test_the_class_may_come_in_a_header_and_the_field_wins(served):
    for fields, expected in (({}, Priority.LOW), ({"slo_class": "interactive"}, Priority.HIGH)):
        await served.post("/v1/completions", body(**fields), headers={"X-Slo-Class": "batch"})
        assert served.gateway.submitted[-1].priority is expected
    status, answer, _ = await served.post(
        "/v1/completions", body(), headers={"X-Slo-Class": "soon"}
    )
    assert (status, answer["error"]["param"]) == (400, "slo_class")


async def test_stop_string(served):
    _, answer, _ = await served.post("/v1/completions", body(prompt="one two", stop=" T"))
    assert answer["choices"][0]["text"] == "ONE"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    assert all(one.aborted.is_set() for one in served.gateway.running.values())


async def test_length(served):
    _, answer, _ = await served.post("/v1/completions", body(max_tokens=2))
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("HE", "length")


async def test_logprobs(serve):
    async with serve(lambda _: "a\u00e9".encode()) as served:
        _, answer, _ = await served.post("/v1/completions", body(logprobs=2))
        assert answer["choices"][0]["text"] == "a\u00e9"
        assert answer["choices"][0]["logprobs"] == {
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
            "token_logprobs": [-0.5] * 3,
            "top_logprobs": [
                {"a": -0.5, "b": -1.5},
                {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.5},
                {"bytes:\\xa9": -0.5, "bytes:\\xaa": -1.5},
            ],
            "text_offset": [0, 1, 1],
        }
        _, answer, _ = await served.post("/v1/completions", body(logprobs=0))
        assert answer["choices"][0]["logprobs"]["top_logprobs"][0] == {"a": -0.5}


async def test_cached_tokens_are_shown(served):
    served.gateway.cached_tokens = 4
    _, answer, _ = await served.post("/v1/completions", body())
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_a_failed_request_is_an_error(served):
    served.gateway.finish = FinishReason.FAILED
    served.gateway.detail = "The worker fell over."
    status, answer, _ = await served.post("/v1/completions", body())
    assert status == 503
    assert answer["error"]["message"] == "The worker fell over."
    served.gateway.finish = FinishReason.DEADLINE
    status, answer, _ = await served.post("/v1/completions", body())
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("prompt", ["hello", ["hello", "there"]])
async def test_a_failure_mid_stream_is_an_error_event_then_done(served, prompt):
    served.gateway.finish = FinishReason.FAILED
    served.gateway.detail = "The worker fell over."
    async with served.session.post(
        served.url + "/v1/completions", json=body(stream=True, prompt=prompt)
    ) as response:
        assert response.status == 200
        chunks = await events(response)
    assert chunks[0]["choices"][0]["text"] == "HEL"
    assert chunks[-1] == {
        "error": {
            "message": "The worker fell over.", "type": "server_error", "param": None,
            "code": "unavailable",
        }
    }  # fmt: skip
    assert all(one.closed.is_set() for one in served.gateway.running.values())


async def test_queue_full(served):
    served.gateway.refusal = QueueFullError("8 requests wait already; try later.", 2.2)
    status, answer, headers = await served.post("/v1/completions", body(stream=True))
    assert status == 429
    assert headers["Retry-After"] == "3"
    assert answer["error"]["code"] == "queue_full"


async def test_a_call_refused_halfway_leaves_nothing_running(served):
    submit = served.gateway.submit

    async def refuse_third(request):
        if request.request_id.endswith("-2"):
            raise QueueFullError("Too many wait.", 1.0)
        return await submit(request)

    served.gateway.submit = refuse_third
    status, _, _ = await served.post("/v1/completions", body(prompt=["a", "b", "c"]))
    assert status == 429
    assert len(served.gateway.running) == 2
    assert all(one.aborted.is_set() for one in served.gateway.running.values())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "there"]])
async def test_a_client_that_goes_away_frees_its_requests(served, stream, prompt):
    served.gateway.hold_at = 3
    posted = served.session.post(
        served.url + "/v1/completions", json=body(stream=stream, prompt=prompt)
    )
    if stream:
        response = await posted
        await response.content.readuntil(b"\n\n")
        response.close()
    else:
        waiting = asyncio.ensure_future(posted)
        await served.gateway.until_held()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    for one in served.gateway.running.values():
        await asyncio.wait_for(one.closed.wait(), 20)
        assert one.aborted.is_set()
    assert len(served.gateway.running) == (1 if prompt == "hello" else 2)


async def test_an_abort_from_elsewhere_ends_the_answer(served):
    served.gateway.hold_at = 3
    async with served.session.post(
        served.url + "/v1/completions", json=body(stream=True)
    ) as response:
        first = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
        await served.gateway.abort(first["id"].removeprefix("cmpl-"))
        (last,) = await events(response)
    assert first["choices"][0]["text"] == "HEL"
    assert last["choices"][0]["finish_reason"] == "abort"
