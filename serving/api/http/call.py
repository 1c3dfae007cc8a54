"""What the two generating endpoints have in common before anything is generated."""

from collections.abc import Mapping
from dataclasses import dataclass

from serving.api.field_checks import shown, truth, unicode_text
from serving.api.http.front_door import FrontDoor
from serving.api.validation import RequestDefaults, generation_request
from serving.cluster.generation import GenerationRequest
from serving.errors import (
    InvalidRequestError,
    UnknownModelError,
    UnsupportedParameterError,
)

ENVELOPE = ("model", "stream", "stream_options", "user", "metadata", "safety_identifier")
"""Fields of a body that do not shape the generation. The last three label it for the caller."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to generate: a choice per prompt.

    created: seconds since 1970.
    """

    response_id: str
    created: int
    model: str
    requests: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer shows log-probabilities."""
        return self.requests[0].sampling.logprobs is not None


def check_model(body: Mapping[str, object], door: FrontDoor) -> str:
    """The model's name. Raises InvalidRequestError or UnknownModelError."""
    served = door.text.model_id
    if body.get("model") is None:
        raise InvalidRequestError(f"model is missing; expected {served!r}.", "model")
    model = unicode_text(body["model"], "model")
    if model != served:
        raise UnknownModelError(
            f"The model {shown(model)} is not served here; expected {served!r}."
        )
    return model


def build_call(
    body: Mapping[str, object],
    fields: dict[str, object],
    prompts: list[tuple[int, ...]],
    *,
    door: FrontDoor,
    request_id: str,
    slo_class: str | None,
    prefix: str,
    defaults: RequestDefaults,
    max_tokens_name: str = "max_tokens",
) -> Call:
    """Check the rest of a body whose own part the endpoint has understood.

    fields: those of the generation, unknown ones included. slo_class: from the header.
    prefix: of the response's id. Raises InvalidRequestError or UnsupportedParameterError.
    """
    stream = truth(body.get("stream") or False, "stream")
    include_usage = _include_usage(body.get("stream_options"), stream)
    if fields.get("resume_lease_s") is not None:
        raise UnsupportedParameterError(
            "resume_lease_s is not supported over HTTP, which cannot resume; use gRPC.",
            "resume_lease_s",
        )
    if slo_class is not None:
        fields = {**fields, "slo_class": fields.get("slo_class") or slo_class}
    requests = tuple(
        generation_request(
            fields,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt=prompt,
            limits=door.text.limits,
            defaults=defaults,
            draw_seed=door.draw_seed,
            max_tokens_name=max_tokens_name,
        )
        for index, prompt in enumerate(prompts)
    )
    return Call(
        response_id=f"{prefix}-{request_id}",
        created=int(door.wall_clock()),
        model=door.text.model_id,
        requests=requests,
        stream=stream,
        include_usage=include_usage,
    )


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequestError(
            f"stream_options is {shown(options)}; expected an object.", "stream_options"
        )
    if not stream:
        raise InvalidRequestError(
            "stream_options is given without stream; leave it out or set stream to true.",
            "stream_options",
        )
    for name, value in options.items():
        if name != "include_usage" and value not in (None, False):
            raise UnsupportedParameterError(
                f"stream_options.{name} is not supported; the only option is include_usage."
                if name.isidentifier()
                else "stream_options has an unknown option; the only one is include_usage.",
                "stream_options",
            )
    return truth(options.get("include_usage") or False, "stream_options.include_usage")
