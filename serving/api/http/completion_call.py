"""The body of POST /v1/completions: prompts as text or token ids."""

from collections.abc import Sequence

from serving.api.field_checks import sequence, unicode_text
from serving.api.http.call import ENVELOPE, Call, build_call, check_model
from serving.api.http.front_door import FrontDoor
from serving.api.validation import OPENAI_COMPLETION_DEFAULTS, token_ids
from serving.errors import InvalidRequestError

MAX_PROMPTS = 128


async def completion_call(
    body: dict[str, object], door: FrontDoor, request_id: str, slo_class: str | None
) -> Call:
    """Understand the body.

    Raises InvalidRequestError, UnsupportedParameterError, UnknownModelError or TokenizerError.
    """
    check_model(body, door)
    prompts = await _prompts(body.get("prompt"), door)
    fields = {name: body[name] for name in body if name not in (*ENVELOPE, "prompt")}
    return build_call(
        body,
        fields,
        prompts,
        door=door,
        request_id=request_id,
        slo_class=slo_class,
        prefix="cmpl",
        defaults=OPENAI_COMPLETION_DEFAULTS,
    )


async def _prompts(value: object, door: FrontDoor) -> list[tuple[int, ...]]:
    """One prompt or several, each a string or a list of token ids."""
    if value is None:
        raise InvalidRequestError(
            "prompt is missing; expected a string, a list of strings, or token ids.", "prompt"
        )
    if isinstance(value, str):
        return [await _encoded(value, door)]
    if not isinstance(value, Sequence) or not value or not isinstance(value[0], str | list):
        return [token_ids(value, door.text.limits)]
    many = sequence(value, "prompt", "prompts", MAX_PROMPTS)
    return [
        token_ids(one, door.text.limits) if isinstance(one, list) else await _encoded(one, door)
        for one in many
    ]


async def _encoded(value: object, door: FrontDoor) -> tuple[int, ...]:
    text = unicode_text(value, "prompt")
    if not text:
        raise InvalidRequestError(
            "prompt is an empty string; expected at least one character.", "prompt"
        )
    return await door.text.encode_prompt(text)
