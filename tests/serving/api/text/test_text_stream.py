"""Token streams as text: any run length, any stop strings, any resume point, the same text."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api.text import TextService
from serving.api.validation import ModelLimits
from serving.cluster.generation import Delta, GenerationRequest
from serving.engine.request import FinishReason, SamplingParams
from serving.errors import InternalError, InvalidRequestError, UnknownRequestError

FEW = "ab\u00e9\U0001f600"
EOS = 257
LIMITS = ModelLimits(vocab_size=320, max_model_len=100_000)


def request_for(stop=(), resume_lease_s=0.0, **sampling):
    sampling.setdefault("max_tokens", 1000)
    return GenerationRequest(
        "r", (1, 2, 3), SamplingParams(**sampling), tuple(stop), resume_lease_s=resume_lease_s
    )


@pytest.fixture(scope="session")
def service(byte_tokenizer):
    return TextService("bytes", byte_tokenizer(), LIMITS, eos_token_ids=(EOS,))


async def read(stream):
    deltas = [one async for one in stream]
    return deltas, "".join(one.text for one in deltas)


def whole(tokens, stops, min_tokens):
    """The text before the stop string that is complete first, and whether there is one."""
    decoded = bytes(tokens).decode("utf-8", "replace")
    if len(tokens) < min_tokens:
        return decoded, False
    free = bytes(tokens[:min_tokens]).decode("utf-8", "ignore")  # whole characters only
    searched = decoded[len(free) :]
    ends = [
        (start + len(stop), start)
        for stop in stops
        for start in range(len(searched) - len(stop) + 1)
        if searched.startswith(stop, start)
    ]
    return (free + searched[: min(ends)[1]], True) if ends else (decoded, False)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(FEW, max_size=25),
    cut_short=st.integers(0, 3),
    stops=st.lists(st.text(FEW + "\ufffd", min_size=1, max_size=4), max_size=3, unique=True),
    min_tokens=st.integers(0, 8),
    run=st.integers(1, 9),
    skip=st.integers(0, 60),
)
def test_equals_a_search_in_the_whole_text(
    service, scripted_gateway, text, cut_short, stops, min_tokens, run, skip
):
    tokens = list(text.encode())
    tokens = tokens[: max(0, len(tokens) - cut_short)]  # may end inside a character

    async def check():
        expected, stopped = whole(tokens, stops, min_tokens)
        request = request_for(stops, min_tokens=min_tokens)
        stream = await service.generate(scripted_gateway(lambda _: tokens, run), request)
        deltas, got = await read(stream)
        assert got == expected
        assert (deltas[-1].stop is not None) == stopped
        assert [one.finish for one in deltas] == [None] * (len(deltas) - 1) + [FinishReason.STOP]
        delivered = [token for one in deltas for token in one.tokens]
        assert delivered == tokens[: len(delivered)]
        assert deltas[-1].usage.completion_tokens == len(delivered)

        # The text of the first `skip` tokens, then the rest from a resumed stream.
        gateway = scripted_gateway(lambda _: tokens, 1)
        singly, _ = await read(await service.generate(gateway, request))
        if skip >= len(delivered):
            return
        before = "".join(one.text for one in singly if one.tokens and one.start_index < skip)
        gateway.forget_aborts(run)
        again, rest = await read(await service.resume(gateway, "r", skip))
        assert before + rest == expected
        assert [token for one in again for token in one.tokens] == delivered[skip:]
        assert again[0].start_index == skip
        assert again[-1].usage == deltas[-1].usage

    asyncio.run(check())


async def test_a_character_is_never_split(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: "a\U0001f600b".encode())
    deltas, _ = await read(await service.generate(gateway, request_for()))
    assert [one.text for one in deltas] == ["a", "", "", "", "\U0001f600", "b"]


async def test_text_that_could_become_a_stop_string_is_held_back(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"xSTxSTOPy")
    deltas, _ = await read(await service.generate(gateway, request_for(["STOP"])))
    assert [one.text for one in deltas] == ["x", "", "", "STx", "", "", "", ""]
    assert deltas[-1].finish is FinishReason.STOP
    assert deltas[-1].stop == "STOP"


async def test_a_match_aborts_the_request(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"abcdefgh")
    await read(await service.generate(gateway, request_for(["c"])))
    assert gateway.running["r"].aborted.is_set()
    assert gateway.running["r"].sent == 3


async def test_a_match_aborts_a_request_with_a_lease_too(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"abcdefgh")
    await read(await service.generate(gateway, request_for(["c"], resume_lease_s=60.0)))
    assert gateway.running["r"].aborted.is_set()


async def test_closing_without_a_match_leaves_a_leased_request_running(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"abcdefgh")
    stream = await service.generate(gateway, request_for(["c"], resume_lease_s=60.0))
    await stream.aclose()
    assert gateway.running["r"].closed.is_set()
    assert not gateway.running["r"].aborted.is_set()


async def test_stop_and_end_tokens_have_no_text(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"ab!")
    deltas, text = await read(
        await service.generate(gateway, request_for(stop_token_ids=(ord("!"),)))
    )
    assert text == "ab"
    assert deltas[-1].tokens == (ord("!"),)
    assert deltas[-1].usage.completion_tokens == 3


async def test_logprobs_offsets_and_usage(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: "a\u00e9b".encode(), 3)
    gateway.cached_tokens = 2
    deltas, _ = await read(await service.generate(gateway, request_for(["zz"], logprobs=2)))
    assert [one.offsets for one in deltas] == [(0, 1, 1), (2,)]
    assert [len(one.logprobs) for one in deltas] == [3, 1]
    assert deltas[-1].usage.cached_tokens == 2
    assert deltas[-1].usage.prompt_tokens == 3


async def test_a_failed_end_is_delivered_with_its_reason(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"ab")
    gateway.finish, gateway.detail = FinishReason.FAILED, "The worker fell over."
    deltas, text = await read(await service.generate(gateway, request_for()))
    assert text == "ab"
    assert (deltas[-1].finish, deltas[-1].detail) == (FinishReason.FAILED, "The worker fell over.")


async def test_resume_beyond_the_end_is_refused(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: b"ab")
    await read(await service.generate(gateway, request_for()))
    with pytest.raises(InvalidRequestError, match=r"from_index is 5.*2 tokens"):
        await read(await service.resume(gateway, "r", 5))


async def test_resume_of_an_unknown_request(service, scripted_gateway):
    with pytest.raises(UnknownRequestError):
        await service.resume(scripted_gateway(lambda _: b""), "nobody", 0)


async def test_a_stream_without_an_end_is_an_error(service, scripted_gateway):
    class Broken:
        request = request_for()

        async def __aiter__(self):
            yield Delta(0, (97,))

        async def aclose(self):
            pass

    gateway = scripted_gateway(lambda _: b"")

    async def submit(request):
        return Broken()

    gateway.submit = submit
    with pytest.raises(InternalError, match="broke off"):
        await read(await service.generate(gateway, request_for()))


async def test_prompts(service):
    assert await service.encode_prompt("h\u00e9") == (256, 104, 0xC3, 0xA9)
    assert await service.encode_prompt("a" * 40_000) == (256,) + (97,) * 40_000  # in a thread
    with pytest.raises(InvalidRequestError, match=r"100001 tokens.*at most 99999"):
        await service.encode_prompt("a" * 100_000)
    assert service.decode((104, 0xC3, 0xA9)) == "h\u00e9"
    assert service.token_text(0xC3) == "\ufffd"
    assert service.token_bytes(0xC3) == b"\xc3"
    chat = await service.encode_chat([{"role": "user", "content": "hi"}])
    assert bytes(chat) == b"<user>hi\n<assistant>"
