"""Names of parameters the field knows and we do not offer: refused by name, never ignored."""

import json
from collections.abc import Mapping, Sequence

from serving.api.field_checks import shown
from serving.errors import InvalidRequestError, UnsupportedParameterError

UNSUPPORTED_FIELDS: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "prompt_embeds": (),
    "lora_request": (),
}
"""Names the field knows and we do not offer, with the values that ask for nothing.

A null is neutral for every one of them.
"""


def refuse_unsupported(fields: Mapping[str, object], understood: Sequence[str]) -> None:
    """Check the names of `fields`: those not understood must be neutral or are refused.

    Raises UnsupportedParameterError for what we know and do not offer, InvalidRequestError for
    names we do not know.
    """
    for name, value in fields.items():
        if name in understood:
            continue
        if name not in UNSUPPORTED_FIELDS:
            raise InvalidRequestError(f"The request has an unknown field {shown(name)}.", name)
        neutral = UNSUPPORTED_FIELDS[name]
        if value is None or any(_same(value, one) for one in neutral):
            continue
        instead = f" or send {' or '.join(json.dumps(one) for one in neutral)}" if neutral else ""
        raise UnsupportedParameterError(f"{name} is not supported; leave it out{instead}.", name)


def _same(value: object, neutral: object) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
