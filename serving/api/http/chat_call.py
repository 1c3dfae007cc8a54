"""The body of POST /v1/chat/completions: a conversation, by the model's own template."""

from serving.api.field_checks import sequence, shown, truth, unicode_text, whole_number
from serving.api.http.call import ENVELOPE, Call, build_call, check_model
from serving.api.http.front_door import FrontDoor
from serving.api.validation import OPENAI_CHAT_DEFAULTS
from serving.errors import InvalidRequestError, UnsupportedParameterError

MAX_MESSAGES = 4096
_ROLES = ("system", "user", "assistant")
_OWN_FIELDS = (
    "messages",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
)


async def chat_call(
    body: dict[str, object], door: FrontDoor, request_id: str, slo_class: str | None
) -> Call:
    """Understand the body.

    Raises InvalidRequestError, UnsupportedParameterError, UnknownModelError or TokenizerError.
    """
    check_model(body, door)
    if not door.text.has_chat_template:
        raise InvalidRequestError(
            f"The model {door.text.model_id!r} has no chat template; use /v1/completions and "
            "send the whole prompt."
        )
    messages = _messages(body.get("messages"))
    fields = {name: body[name] for name in body if name not in (*ENVELOPE, *_OWN_FIELDS)}
    fields["logprobs"] = _logprobs(body, door)
    name, fields["max_tokens"] = _max_tokens(body)
    return build_call(
        body,
        fields,
        [await door.text.encode_chat(messages)],
        door=door,
        request_id=request_id,
        slo_class=slo_class,
        prefix="chatcmpl",
        defaults=OPENAI_CHAT_DEFAULTS,
        max_tokens_name=name,
    )


def _messages(value: object) -> list[dict[str, str]]:
    if value is None:
        raise InvalidRequestError("messages is missing; expected a list of messages.", "messages")
    messages = sequence(value, "messages", "messages", MAX_MESSAGES)
    if not messages:
        raise InvalidRequestError("messages is empty; expected at least one message.", "messages")
    return [_message(one, f"messages[{index}]") for index, one in enumerate(messages)]


def _message(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} is {shown(value)}; expected an object.", where)
    for name, what in value.items():
        if name not in ("role", "content") and what not in (None, [], {}):
            raise UnsupportedParameterError(
                f"{where} has a field {shown(name)}, which is not supported; "
                "a message has role and content.",
                where,
            )
    role = value.get("role")
    if role not in _ROLES:
        raise UnsupportedParameterError(
            f"{where}.role is {shown(role)}; expected 'system', 'user' or 'assistant'.",
            f"{where}.role",
        )
    return {"role": str(role), "content": _content(value.get("content"), f"{where}.content")}


def _content(value: object, where: str) -> str:
    """A string, or text parts, which are joined by line breaks."""
    if isinstance(value, str):
        return unicode_text(value, where)
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{where} is {shown(value)}; expected a string or a list of text parts.", where
        )
    texts = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise InvalidRequestError(f"{at} is {shown(part)}; expected an object.", at)
        if part.get("type") != "text":
            raise UnsupportedParameterError(
                f"{at} is of type {shown(part.get('type'))}, which is not supported; "
                "this model reads text.",
                f"{at}.type",
            )
        texts.append(unicode_text(part.get("text"), f"{at}.text"))
    return "\n".join(texts)


def _logprobs(body: dict[str, object], door: FrontDoor) -> int | None:
    wanted = truth(body.get("logprobs") or False, "logprobs")
    top = body.get("top_logprobs")
    if top is None:
        return 0 if wanted else None
    number = whole_number(top, "top_logprobs", 0, door.text.limits.max_logprobs)
    if not wanted and number:
        raise InvalidRequestError(
            f"top_logprobs is {number} without logprobs; set logprobs to true.", "top_logprobs"
        )
    return number if wanted else None


def _max_tokens(body: dict[str, object]) -> tuple[str, object]:
    """The name the client uses, and the value."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if new is None:
        return "max_tokens", old
    if old is not None and old != new:
        raise InvalidRequestError(
            f"max_completion_tokens is {shown(new)} but max_tokens is {shown(old)}; send one.",
            "max_completion_tokens",
        )
    return "max_completion_tokens", new
