"""POST /v1/chat/completions over a real socket."""

import pytest

MODEL = "tiny/byte-model"
HELLO = [{"role": "user", "content": "hello"}]


def body(**more):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 64, **more}


async def test_the_template_makes_the_prompt(served):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    status, answer, _ = await served.post("/v1/chat/completions", body(messages=messages))
    assert status == 200
    (sent,) = served.gateway.submitted
    prompt = "<system>be brief\n<user>a\nb\n<assistant>c\n<user>d\n<assistant>"
    assert bytes(sent.prompt).decode() == prompt
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "role": "assistant", "content": prompt.upper(), "refusal": None
    }  # fmt: skip
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["id"].startswith("chatcmpl-")


async def test_left_out_max_tokens_is_what_the_model_leaves(served):
    await served.post("/v1/chat/completions", {"model": MODEL, "messages": HELLO})
    (sent,) = served.gateway.submitted
    assert sent.sampling.max_tokens == 512 - len(sent.prompt)


async def test_max_completion_tokens(served):
    wanted = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 4}
    _, answer, _ = await served.post("/v1/chat/completions", wanted)
    assert answer["choices"][0]["message"]["content"] == "<USE"
    assert answer["choices"][0]["finish_reason"] == "length"
    status, _, _ = await served.post("/v1/chat/completions", {**wanted, "max_tokens": 4})
    assert status == 200
    for wrong in ({"max_tokens": 5}, {"max_completion_tokens": 512}):
        status, answer, _ = await served.post("/v1/chat/completions", {**wanted, **wrong})
        assert (status, answer["error"]["param"]) == (400, "max_completion_tokens")


async def test_logprobs(serve):
    async with serve(lambda _: "\u00e9b".encode()) as served:
        _, answer, _ = await served.post(
            "/v1/chat/completions", body(logprobs=True, top_logprobs=1)
        )
        assert answer["choices"][0]["message"]["content"] == "\u00e9b"
        content = answer["choices"][0]["logprobs"]["content"]
        assert content[0] == {
            "token": "\ufffd", "logprob": -0.5, "bytes": [0xC3],
            "top_logprobs": [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}],
        }  # fmt: skip
        assert bytes(b for one in content for b in one["bytes"]).decode() == "\u00e9b"
        _, answer, _ = await served.post("/v1/chat/completions", body(logprobs=True))
        assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        _, answer, _ = await served.post("/v1/chat/completions", body(top_logprobs=0))
        assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "list of messages"),
        ({"messages": ["hi"]}, "messages[0]", "expected an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "'system', 'user' or"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "a list of 1"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "a string or a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "'image_url', which is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "expected a string",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
            "messages[0]",
            "'name', which is not supported",
        ),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt", "at most 511"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
    ],
)
async def test_refusals(served, fields, param, says):
    status, answer, _ = await served.post("/v1/chat/completions", body(**fields))
    assert status == 400
    assert answer["error"]["param"] == param
    assert says in answer["error"]["message"]
    assert served.gateway.submitted == []


async def test_a_model_without_a_template(serve, byte_tokenizer):
    async with serve(tokenizer=byte_tokenizer(has_chat_template=False)) as served:
        status, answer, _ = await served.post("/v1/chat/completions", body())
        assert status == 400
        assert "no chat template; use /v1/completions" in answer["error"]["message"]
