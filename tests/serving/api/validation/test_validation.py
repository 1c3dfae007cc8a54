"""Every bad field is refused with a sentence that names it; nothing asked for is ignored."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.unsupported import UNSUPPORTED_FIELDS
from serving.api.validation import (
    GRPC_DEFAULTS,
    OPENAI_CHAT_DEFAULTS,
    OPENAI_COMPLETION_DEFAULTS,
    REQUEST_FIELDS,
    ModelLimits,
    generation_request,
    token_ids,
)
from serving.engine.request import Priority, SamplingParams
from serving.errors import InvalidRequestError, UnsupportedParameterError

LIMITS = ModelLimits(vocab_size=100, max_model_len=32)
PROMPT = (1, 2, 3)


def build(
    prompt=PROMPT,
    defaults=OPENAI_COMPLETION_DEFAULTS,
    request_id="r-1",
    max_tokens_name="max_tokens",
    **fields,
):
    return generation_request(
        fields,
        request_id=request_id,
        prompt=prompt,
        limits=LIMITS,
        defaults=defaults,
        draw_seed=lambda: 4711,
        max_tokens_name=max_tokens_name,
    )


def test_everything_given():
    request = build(
        temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, seed=2**32 - 1, logprobs=3, max_tokens=9,
        min_tokens=2, stop_token_ids=[7, 7, 8], ignore_eos=True, stop=["x", "y", "x"],
        slo_class="batch", deadline_s=1.5, resume_lease_s=30,
    )  # fmt: skip
    assert request.sampling == SamplingParams(0.5, 5, 0.9, 0.1, 2**32 - 1, 3, 9, 2, (7, 8), True)
    assert (request.stop, request.priority) == (("x", "y"), Priority.LOW)
    assert (request.deadline_s, request.resume_lease_s) == (1.5, 30.0)
    assert (request.request_id, request.prompt) == ("r-1", PROMPT)


def test_nothing_given_and_nulls_are_the_same():
    bare = build()
    assert bare == build(**dict.fromkeys(REQUEST_FIELDS), **dict.fromkeys(UNSUPPORTED_FIELDS))
    assert bare.sampling == SamplingParams(seed=4711)
    assert bare.priority is Priority.HIGH
    assert bare.deadline_s is None


@pytest.mark.parametrize(
    ("defaults", "max_tokens"),
    [(OPENAI_COMPLETION_DEFAULTS, 16), (OPENAI_CHAT_DEFAULTS, 29), (GRPC_DEFAULTS, 29)],
)
def test_default_length_of_each_front_door(defaults, max_tokens):
    assert build(defaults=defaults).sampling.max_tokens == max_tokens


BAD = [
    ("temperature", -0.1, "from 0 to 2"),
    ("temperature", 2.1, "from 0 to 2"),
    ("temperature", math.nan, "from 0 to 2"),
    ("temperature", math.inf, "from 0 to 2"),
    ("temperature", 10**400, "more than 128 bits"),
    ("temperature", 1e-9, "0 \\(greedy\\)"),
    ("temperature", "1", "expected a number"),
    ("temperature", True, "expected a number"),
    ("temperature", [1], "a list of 1"),
    ("top_p", 0, "above 0"),
    ("top_p", 1.01, "at most 1"),
    ("top_p", -math.inf, "above 0"),
    ("top_k", -2, "from -1 to 100"),
    ("top_k", 101, "from -1 to 100"),
    ("top_k", 1.5, "an integer"),
    ("top_k", False, "an integer"),
    ("min_p", -0.001, "from 0 to 1"),
    ("min_p", 1.5, "from 0 to 1"),
    ("seed", -1, "from 0 to 4294967295"),
    ("seed", 2**32, "from 0 to 4294967295"),
    ("seed", "7", "an integer"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", 30, "30.*3 tokens.*32.*at most 29"),
    ("max_tokens", math.nan, "an integer"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", 17, "at most max_tokens, which is 16"),
    ("stop_token_ids", [100], "from 0 to 99"),
    ("stop_token_ids", [-1], "from 0 to 99"),
    ("stop_token_ids", "12", "a list of token ids"),
    ("stop_token_ids", [1] * 65, "at most 64"),
    ("ignore_eos", 1, "true or false"),
    ("stop", ["a", "b", "c", "d", "e"], "at most 4"),
    ("stop", "", "1 to 1024"),
    ("stop", ["x" * 1025], "1 to 1024"),
    ("stop", [1], "expected a string"),
    ("stop", {"a": 1}, "a list of strings"),
    ("stop", "\ud83d", "surrogate"),
    ("stop", [b"\xff"], "UTF-8"),
    ("slo_class", "urgent", "'interactive', 'batch'"),
    ("slo_class", 1, "'interactive', 'batch'"),
    ("deadline_s", 0, "above 0"),
    ("deadline_s", math.nan, "above 0"),
    ("resume_lease_s", -1, "from 0 to 600"),
    ("resume_lease_s", 1e9, "from 0 to 600"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_bad_values_are_refused_by_name(field, value, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        build(**{field: value})
    assert caught.value.parameter == field
    str(caught.value).encode("utf-8")


def test_the_length_is_named_as_the_client_named_it():
    def named(**fields):
        return build(max_tokens_name="max_completion_tokens", **fields)

    for fields in ({"max_tokens": 30}, {"max_tokens": 0}):
        with pytest.raises(InvalidRequestError, match=r"^max_completion_tokens is") as caught:
            named(**fields)
        assert caught.value.parameter == "max_completion_tokens"


def test_whole_floats_are_integers_as_in_json():
    assert build(max_tokens=5.0, top_k=-1).sampling.max_tokens == 5


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "\u00e9", "a\n", None, 7])
def test_bad_request_ids(request_id):
    with pytest.raises(InvalidRequestError, match="request_id"):
        build(request_id=request_id)


def test_prompt_limits():
    assert build(prompt=(1,) * 31, max_tokens=1).sampling.max_tokens == 1
    with pytest.raises(InvalidRequestError, match=r"32 tokens.*32.*at most 31"):
        build(prompt=(1,) * 32)
    with pytest.raises(InvalidRequestError, match="empty"):
        build(prompt=())


def test_token_ids():
    assert token_ids([0, 99, 5.0], LIMITS) == (0, 99, 5)
    for bad in ([100], [-1], [True], ["1"], [1.5], [None], "ab", b"ab", {"a": 1}, 3, [1] * 32):
        with pytest.raises(InvalidRequestError, match="prompt"):
            token_ids(bad, LIMITS)


@pytest.mark.parametrize("field", UNSUPPORTED_FIELDS)
def test_unsupported_fields_are_refused_unless_neutral(field):
    for neutral in (*UNSUPPORTED_FIELDS[field], None):
        assert build(**{field: neutral}) == build()
    with pytest.raises(UnsupportedParameterError, match=f"{field} is not supported") as caught:
        build(**{field: {"something": "else"}})
    assert caught.value.parameter == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("n", True), ("best_of", 3), ("echo", True), ("presence_penalty", 0.1),
     ("logit_bias", {"5": 1}), ("tools", [{}]), ("suffix", "x"), ("echo", 0),
     ("response_format", {"type": "json_object"}), ("frequency_penalty", -1), ("audio", {})],
)  # fmt: skip
def test_asking_for_more_than_nothing(field, value):
    with pytest.raises(UnsupportedParameterError, match=field):
        build(**{field: value})


def test_neutral_numbers_in_either_spelling():
    assert build(n=1, best_of=1.0, presence_penalty=0.0, frequency_penalty=0) == build()


def test_refusal_says_what_would_do():
    with pytest.raises(UnsupportedParameterError, match=r'leave it out or send \{"type": "text"\}'):
        build(response_format={"type": "json_object"})


def test_unknown_fields_are_named():
    with pytest.raises(InvalidRequestError, match="temprature") as caught:
        build(temprature=0.5)
    assert not isinstance(caught.value, UnsupportedParameterError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(fields=st.dictionaries(st.sampled_from([*REQUEST_FIELDS, "n", "tools", "what"]), JSON))
def test_any_json_is_understood_or_refused(fields):
    try:
        request = build(**fields)
    except InvalidRequestError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.parameter in fields
        str(refusal).encode("utf-8")
        return
    sampling = request.sampling
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.seed < 2**32
    assert sampling.min_tokens <= sampling.max_tokens <= 29
