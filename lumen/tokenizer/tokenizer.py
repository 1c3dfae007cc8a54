"""A model's tokenizer: the `tokenizers` library's, with chat template and detokenisation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lumen.errors import TokenizerError
from lumen.tokenizer.chat_template import ChatTemplate
from lumen.tokenizer.detokenizer import IncrementalDetokenizer
from lumen.tokenizer.token_spelling import TokenSpelling

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """Text to token ids and back, for one model.

    Decoding gives what the tokenizer's decoder gives; the clean-up of spaces before punctuation
    that some tokenizer_config.json files ask for is not applied, since it would change text the
    model wrote and cannot be done while streaming.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        special_tokens: names such as "eos_token" to the token's text.
        Raises TokenizerError for an unsupported decoder or a malformed chat template.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._spelling = TokenSpelling(backend)
        self._template = (
            None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

        The last two may be absent. Raises TokenizerError if tokenizer.json is absent or damaged.
        """
        path = directory / _TOKENIZER_FILE
        if not path.exists():
            hint = (
                " It has a SentencePiece tokenizer.model, which is not read directly; save it "
                "once as tokenizer.json, for example with save_pretrained of transformers."
                if (directory / "tokenizer.model").exists()
                else ""
            )
            raise TokenizerError(f"{directory} holds no {_TOKENIZER_FILE}.{hint}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for all it cannot parse
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}.") from error
        config = _read_config(directory / _CONFIG_FILE)
        template_path = directory / _TEMPLATE_FILE
        template = (
            template_path.read_text(encoding="utf-8")
            if template_path.exists()
            else _template_in(config)
        )
        return cls(backend, _special_tokens_in(config), template)

    def save(self, directory: Path) -> None:
        """Write the files that `from_directory` reads into an existing directory."""
        self._backend.save(str(directory / _TOKENIZER_FILE))
        config = json.dumps(self.special_tokens, indent=2, ensure_ascii=False)
        (directory / _CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        if self._template is not None:
            (directory / _TEMPLATE_FILE).write_text(self._template.source, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included. The model's table may be longer."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the tokenizer names one."""
        return self._special_id("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token that ends a text: one or none."""
        token = self._special_id("eos_token")
        return () if token is None else (token,)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out when it skips special tokens."""
        return self._spelling.special_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        add_special_tokens: apply the tokenizer's own post-processor (for example a leading
        beginning-of-text token). Raises TokenizerError if the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"The text is not valid Unicode: it has a lone surrogate at character "
                f"{error.start}."
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text of these tokens; ids the tokenizer does not know give no text."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; they need not be whole characters."""
        return self._spelling.bytes_of(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; encode it with add_special_tokens=False.

        messages: {"role", "content"} mappings, oldest first. variables: further names the
        template reads, such as `enable_thinking`. Raises TokenizerError if there is no template
        or it refuses.
        """
        if self._template is None:
            raise TokenizerError(
                "This model has no chat template; send the whole prompt as text instead."
            )
        return self._template.render(messages, add_generation_prompt, tools, **variables)

    def detokenizer(
        self, skip_special_tokens: bool = True, context: Iterable[int] = ()
    ) -> IncrementalDetokenizer:
        """A detokenizer at the beginning of a text, or after `context`, tokens already shown."""
        return IncrementalDetokenizer(self._spelling, skip_special_tokens, context)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} holds a {type(config).__name__}, not a JSON object.")
    return config


def _special_tokens_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens, given as text or as an object with the text under "content"."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template_in(config: Mapping[str, Any]) -> str | None:
    """The chat template: one text, or the one named "default" of several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
