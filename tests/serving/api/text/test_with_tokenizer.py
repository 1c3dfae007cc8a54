"""The text layer with the tokenizer it serves with, rather than a double."""

import pytest

from lumen.tokenizer.byte_tokenizer import byte_tokenizer as lumen_byte_tokenizer
from serving.api.text import TextService
from serving.api.validation import ModelLimits
from serving.cluster.generation import GenerationRequest
from serving.engine.request import SamplingParams
from serving.errors import InvalidRequestError


@pytest.fixture(scope="module")
def service():
    tokenizer = lumen_byte_tokenizer(300)
    return TextService("m", tokenizer, ModelLimits(300, 64), tokenizer.eos_token_ids)


async def test_stream_of_what_was_encoded(service, scripted_gateway):
    said = "Gr\u00fc\u00dfe, \U0001f600! STOP here"
    tokens = await service.encode(said, add_special_tokens=False)
    gateway = scripted_gateway(lambda _: tokens, run=5)
    request = GenerationRequest("r", tokens[:2], SamplingParams(max_tokens=500), ("STOP",))
    stream = await service.generate(gateway, request)
    assert "".join([one.text async for one in stream]) == "Gr\u00fc\u00dfe, \U0001f600! "
    assert service.decode(tokens) == said


async def test_end_tokens_have_no_text(service, scripted_gateway):
    gateway = scripted_gateway(lambda _: [ord("a") + 3, 2])
    stream = await service.generate(gateway, GenerationRequest("r", (5,), SamplingParams()))
    assert [one.text async for one in stream] == ["a", ""]


async def test_chat_by_the_models_template(service):
    prompt = await service.encode_chat([{"role": "user", "content": "hi"}])
    assert service.decode(prompt) == "user: hi\nassistant: "
    with pytest.raises(InvalidRequestError, match=r"at most 63"):
        await service.encode_chat([{"role": "user", "content": "x" * 64}])
