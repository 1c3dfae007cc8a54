"""Chat templates: the jinja2 programs that turn a conversation into a model's prompt.

The environment is the one Hugging Face's templates are written for: blocks trimmed, `break` and
`continue`, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and
`{% generation %}` marks. Templates come with model files and are not trusted, so they run in
jinja2's sandbox and see plain data only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lumen.errors import TokenizerError


class ChatTemplate:
    """One compiled template.

    source: the template's text. special_tokens: names such as "bos_token" to their text, visible
    to the template. now: the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile. Raises TokenizerError naming the line of a syntax error."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationMarks],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation of {"role", "content"} messages.

        add_generation_prompt: end with the beginning of the assistant's answer.
        Raises TokenizerError with the template's own words if it refuses the conversation.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TokenizerError(
                f"The model's chat template refuses this conversation: {error}"
            ) from error


class _GenerationMarks(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, marks for training, rendered as their text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
