"""Chat templates: the environment Hugging Face's templates expect, and how they fail."""

from datetime import datetime
from typing import Any

import pytest

from lumen.errors import TokenizerError
from lumen.tokenizer.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, Any]] = HELLO, **more: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2026, 7, 4))
    return template.render(messages, **more)


def test_blocks_are_trimmed_and_special_tokens_visible() -> None:
    source = (
        "{{ bos_token }}\n  {% for m in messages %}\n{{ m.role }}: {{ m['content'] }}\n"
        "  {% endfor %}\nend"
    )
    assert render(source) == "<s>\nuser: hello\nend"


def test_what_templates_use_beyond_plain_jinja() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 Jul 2026"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    loop = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "1"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hello!"
    assert render("{% if tools %}tools{% else %}none{% endif %}") == "none"
    tool = {"type": "function", "function": {"name": "f"}}
    assert render("{{ tools[0].function.name }}", tools=[tool]) == "f"
    assert render("{% if enable_thinking %}t{% endif %}", enable_thinking=True) == "t"
    assert render("{% if add_generation_prompt %}go{% endif %}", add_generation_prompt=False) == ""


def test_a_refusal_has_the_templates_own_words() -> None:
    source = (
        "{% if messages[0].role != 'user' %}"
        "{{ raise_exception('Conversations must begin with the user.') }}{% endif %}ok"
    )
    assert render(source) == "ok"
    with pytest.raises(TokenizerError, match=r"refuses.*must begin with the user\."):
        render(source, [{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ nothing.here }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_faults_and_forbidden_access_are_errors_for_people(source: str) -> None:
    with pytest.raises(TokenizerError, match="refuses this conversation"):
        render(source)


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(TokenizerError, match="syntax error in line 2"):
        ChatTemplate("fine\n{% if %}", {})
