"""From loosely typed fields to a GenerationRequest: the one gate of both front doors.

Nothing passes that the engine would have to doubt, and nothing a client asks for is ignored:
a field is understood, neutral, or refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.api.field_checks import real_number, sequence, shown, truth, unicode_text, whole_number
from serving.api.unsupported import refuse_unsupported
from serving.cluster.generation import GenerationRequest
from serving.engine.request import Priority, SamplingParams
from serving.errors import InvalidRequestError

MAX_SEED = 2**32 - 1
LOWEST_TEMPERATURE = 0.001  # below, logits divided by it leave what fp32 can tell apart
HIGHEST_TEMPERATURE = 2.0
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_CHARACTERS = 1024
MAX_RESUME_LEASE_S = 600.0
MAX_DEADLINE_S = 7 * 24 * 3600.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PRIORITIES = {
    "interactive": Priority.HIGH,
    "batch": Priority.LOW,
}


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests to one served model are held against.

    max_model_len: prompt plus generated tokens.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20
    max_stop_strings: int = 4
    max_resume_lease_s: float = MAX_RESUME_LEASE_S


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """What a front door takes for fields that the client left out.

    max_tokens None: as many as the model's length limit leaves.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    resume_lease_s: float = 0.0


OPENAI_COMPLETION_DEFAULTS = RequestDefaults(max_tokens=16)
OPENAI_CHAT_DEFAULTS = RequestDefaults(max_tokens=None)
GRPC_DEFAULTS = RequestDefaults(max_tokens=None)

REQUEST_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "logprobs",
    "max_tokens",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "stop",
    "slo_class",
    "deadline_s",
    "resume_lease_s",
)
"""The fields `generation_request` understands."""


def generation_request(
    fields: Mapping[str, object],
    *,
    request_id: str,
    prompt: tuple[int, ...],
    limits: ModelLimits,
    defaults: RequestDefaults,
    draw_seed: Callable[[], int],
    max_tokens_name: str = "max_tokens",
) -> GenerationRequest:
    """Build a request from the fields a client set (see REQUEST_FIELDS); null means left out.

    prompt: token ids, checked by `token_ids` or made by our tokenizer.
    draw_seed: gives a uint32 when the client chose none.
    max_tokens_name: what the client calls max_tokens, for errors.
    Raises InvalidRequestError or UnsupportedParameterError.
    """
    refuse_unsupported(fields, REQUEST_FIELDS)
    check_prompt_length(len(prompt), limits)
    given = {name: value for name, value in fields.items() if value is not None}
    deadline = given.get("deadline_s")
    return GenerationRequest(
        request_id=checked_request_id(request_id),
        prompt=prompt,
        sampling=sampling_params(
            given,
            prompt_tokens=len(prompt),
            limits=limits,
            defaults=defaults,
            draw_seed=draw_seed,
            max_tokens_name=max_tokens_name,
        ),
        stop=stop_strings(given.get("stop", ()), limits),
        priority=priority_of(given.get("slo_class", Priority.HIGH)),
        deadline_s=None
        if deadline is None
        else real_number(deadline, "deadline_s", 0.0, MAX_DEADLINE_S, above=True),
        resume_lease_s=real_number(
            given.get("resume_lease_s", defaults.resume_lease_s),
            "resume_lease_s",
            0.0,
            limits.max_resume_lease_s,
        ),
    )


def sampling_params(
    fields: Mapping[str, object],
    *,
    prompt_tokens: int,
    limits: ModelLimits,
    defaults: RequestDefaults,
    draw_seed: Callable[[], int],
    max_tokens_name: str = "max_tokens",
) -> SamplingParams:
    """The sampling part of a request; names other than its own are not looked at.

    Raises InvalidRequestError.
    """
    temperature = real_number(
        fields.get("temperature", defaults.temperature), "temperature", 0.0, HIGHEST_TEMPERATURE
    )
    if 0.0 < temperature < LOWEST_TEMPERATURE:
        raise InvalidRequestError(
            f"temperature is {temperature:g}; expected 0 (greedy) or a number from "
            f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}.",
            "temperature",
        )
    top_k = whole_number(fields.get("top_k", 0), "top_k", -1, limits.vocab_size)
    logprobs = fields.get("logprobs")
    max_tokens = _max_tokens(
        fields.get("max_tokens", defaults.max_tokens), prompt_tokens, limits, max_tokens_name
    )
    min_tokens = whole_number(fields.get("min_tokens", 0), "min_tokens", 0)
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {shown(min_tokens)}; expected at most {max_tokens_name}, "
            f"which is {max_tokens}.",
            "min_tokens",
        )
    stop_ids = sequence(
        fields.get("stop_token_ids", ()), "stop_token_ids", "token ids", MAX_STOP_TOKEN_IDS
    )
    return SamplingParams(
        temperature=temperature,
        top_k=max(top_k, 0),
        top_p=real_number(fields.get("top_p", defaults.top_p), "top_p", 0.0, 1.0, above=True),
        min_p=real_number(fields.get("min_p", 0.0), "min_p", 0.0, 1.0),
        seed=whole_number(fields["seed"], "seed", 0, MAX_SEED) if "seed" in fields else draw_seed(),
        logprobs=None
        if logprobs is None
        else whole_number(logprobs, "logprobs", 0, limits.max_logprobs),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=tuple(
            dict.fromkeys(
                whole_number(one, "stop_token_ids", 0, limits.vocab_size - 1) for one in stop_ids
            )
        ),
        ignore_eos=truth(fields.get("ignore_eos", False), "ignore_eos"),
    )


def token_ids(value: object, limits: ModelLimits, parameter: str = "prompt") -> tuple[int, ...]:
    """A prompt given as token ids. Raises InvalidRequestError; see also `check_prompt_length`."""
    ids = sequence(value, parameter, "token ids", max(limits.max_model_len - 1, 1))
    return tuple(whole_number(one, parameter, 0, limits.vocab_size - 1) for one in ids)


def check_prompt_length(prompt_tokens: int, limits: ModelLimits) -> None:
    """Raises InvalidRequestError for an empty prompt or one that leaves no room for a token."""
    if prompt_tokens == 0:
        raise InvalidRequestError("The prompt is empty; expected at least one token.", "prompt")
    if prompt_tokens >= limits.max_model_len:
        raise InvalidRequestError(
            f"The prompt has {prompt_tokens} tokens; the model's limit of {limits.max_model_len} "
            f"for prompt and answer leaves room for at most {limits.max_model_len - 1}.",
            "prompt",
        )


def stop_strings(value: object, limits: ModelLimits) -> tuple[str, ...]:
    """Stop strings from a string or a list of them; repeated ones once.

    Raises InvalidRequestError.
    """
    many = (value,) if isinstance(value, str | bytes) else value
    found = []
    for one in sequence(many, "stop", "strings", limits.max_stop_strings):
        text = unicode_text(one, "stop")
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"A stop string has {len(text)} characters; expected 1 to {MAX_STOP_CHARACTERS}.",
                "stop",
            )
        found.append(text)
    return tuple(dict.fromkeys(found))


def priority_of(value: object, parameter: str = "slo_class") -> Priority:
    """A scheduling class from its name or itself. Raises InvalidRequestError."""
    if isinstance(value, Priority):
        return value
    if isinstance(value, str) and value in _PRIORITIES:
        return _PRIORITIES[value]
    raise InvalidRequestError(
        f"{parameter} is {shown(value)}; expected {', '.join(map(repr, _PRIORITIES))}.", parameter
    )


def checked_request_id(value: object, parameter: str = "request_id") -> str:
    """An id a client may choose: it appears in logs, headers and messages.

    Raises InvalidRequestError.
    """
    if isinstance(value, str) and _REQUEST_ID.fullmatch(value):
        return value
    raise InvalidRequestError(
        f"{parameter} is {shown(value)}; expected 1 to 128 letters, digits or . _ : -", parameter
    )


def _max_tokens(value: object, prompt_tokens: int, limits: ModelLimits, name: str) -> int:
    room = limits.max_model_len - prompt_tokens
    if value is None:
        return room
    wanted = whole_number(value, name, 1)
    if wanted > room:
        raise InvalidRequestError(
            f"{name} is {shown(wanted)} and the prompt has {prompt_tokens} tokens; the model's "
            f"limit of {limits.max_model_len} for both leaves room for at most {room}.",
            name,
        )
    return wanted
