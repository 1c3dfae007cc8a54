"""Bad input at the HTTP door: a precise status, OpenAI's JSON shape, and nothing submitted."""

import io
import json

import pytest

from serving.errors import DrainingError, RequestExistsError

MODEL = "tiny/byte-model"
COMPLETIONS = "/v1/completions"


def check_shape(answer):
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]


BAD_FIELDS = [
    ({"model": None}, 400, "model"),
    ({"model": 5}, 400, "model"),
    ({"model": "gpt-9"}, 404, None),
    ({"model": "\ud800"}, 400, "model"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt"),
    ({"prompt": ["a", 5]}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [5, "a"]}, 400, "prompt"),
    ({"prompt": [320]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": "\udfff"}, 400, "prompt"),
    ({"prompt": "x" * 512}, 400, "prompt"),
    ({"prompt": [1] * 512}, 400, "prompt"),
    ({"prompt": ["x"] * 129}, 400, "prompt"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": 1}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, 400, "stream_options"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": float("inf")}, 400, "top_p"),
    ({"max_tokens": 510}, 400, "max_tokens"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ({"resume_lease_s": 5}, 400, "resume_lease_s"),
    ({"echo": True}, 400, "echo"),
    ({"best_of": 2}, 400, "best_of"),
    ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
    ({"frobnicate": 1}, 400, "frobnicate"),
    ({"\ud800": 1}, 400, "\ud800"),
]


@pytest.mark.parametrize(("fields", "status", "param"), BAD_FIELDS)
async def test_bad_fields(served, fields, status, param):
    got, answer, headers = await served.post(
        COMPLETIONS, {"model": MODEL, "prompt": "hello", **fields}
    )
    check_shape(answer)
    assert (got, answer["error"]["param"]) == (status, param)
    assert headers["X-Request-Id"] == "id0"
    assert served.gateway.submitted == []


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": \xff}', "not valid UTF-8"),
        (b"[1, 2]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
async def test_bad_bodies(served, raw, says):
    status, answer, _ = await served.post(COMPLETIONS, data=raw)
    check_shape(answer)
    assert status == 400
    assert says in answer["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_10_mb_is_refused(served, chunked):
    raw = json.dumps({"model": MODEL, "prompt": "x" * 10_000_000}).encode()

    async def pieces():
        for start in range(0, len(raw), 100_000):
            yield raw[start : start + 100_000]

    status, answer, _ = await served.post(
        COMPLETIONS, data=pieces() if chunked else io.BytesIO(raw)
    )
    check_shape(answer)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    status, _, _ = await served.post(COMPLETIONS, {"model": MODEL, "prompt": "still there"})
    assert status == 200


async def test_unknown_paths_and_wrong_methods(served):
    status, answer, headers = await served.get("/v1/nothing")
    check_shape(answer)
    assert (status, headers["X-Request-Id"]) == (404, "id0")
    status, answer, _ = await served.get("/v1/models/other")
    check_shape(answer)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer, headers = await served.get(COMPLETIONS)
    check_shape(answer)
    assert (status, headers["Allow"]) == (405, "POST")
    status, answer, headers = await served.get("/v1/models", method="DELETE")
    check_shape(answer)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


async def test_a_bad_request_id_is_refused_and_another_given(served):
    status, answer, headers = await served.post(
        COMPLETIONS, {"model": MODEL, "prompt": "x"}, headers={"X-Request-Id": "a b"}
    )
    assert (status, answer["error"]["param"]) == (400, "X-Request-Id")
    assert headers["X-Request-Id"] == "id0"


@pytest.mark.parametrize(
    ("error", "status"),
    [(DrainingError("About to stop."), 503), (RequestExistsError("Already there."), 409)],
)
async def test_refusals_of_the_gateway(served, error, status):
    served.gateway.refusal = error
    got, answer, _ = await served.post(COMPLETIONS, {"model": MODEL, "prompt": "x"})
    check_shape(answer)
    assert (got, answer["error"]["message"]) == (status, str(error))


async def test_a_defect_is_told_in_general_and_logged_in_full(served, caplog):
    async def broken(request):
        raise RuntimeError("secret detail")

    served.gateway.submit = broken
    status, answer, _ = await served.post(COMPLETIONS, {"model": MODEL, "prompt": "x"})
    check_shape(answer)
    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "secret detail" in caplog.text
