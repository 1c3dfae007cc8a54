"""One served model's text: prompts to tokens, tokens to text."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from serving.api.text.stream import Detokenizer, TextStream
from serving.api.validation import ModelLimits, check_prompt_length
from serving.cluster.generation import Gateway, GenerationRequest, TokenStream

_LARGE_TEXT = 32_768  # characters; encoding more would hold up the event loop for milliseconds


class TextTokenizer(Protocol):
    """What the text layer needs of a tokenizer."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text, with the model's own beginning if it has one."""
        ...

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text of these tokens."""
        ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt the model was trained on for this conversation, ready for its answer.

        Raises TokenizerError.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; they need not be whole characters."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A new one, at the beginning of a text."""
        ...


class TextService:
    """Text in and out of one served model; shared by the gRPC and the HTTP front door."""

    def __init__(
        self,
        model_id: str,
        tokenizer: TextTokenizer,
        limits: ModelLimits,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.model_id = model_id
        self.limits = limits
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return self._tokenizer.has_chat_template

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text. Large texts are encoded in a thread."""
        if len(text) > _LARGE_TEXT:
            ids = await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)
        else:
            ids = self._tokenizer.encode(text, add_special_tokens)
        return tuple(ids)

    async def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InvalidRequestError if empty or beyond the limit."""
        ids = await self.encode(text)
        check_prompt_length(len(ids), self.limits)
        return ids

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Prompt tokens of a conversation of {"role", "content"} messages.

        Raises InvalidRequestError (beyond the limit) or TokenizerError (no template, or the
        template refuses these messages).
        """
        text = self._tokenizer.apply_chat_template(messages)
        ids = await self.encode(text, add_special_tokens=False)
        check_prompt_length(len(ids), self.limits)
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text of these tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; they need not be whole characters."""
        return self._tokenizer.token_bytes(token)

    def token_text(self, token: int) -> str:
        """One token alone as text, with U+FFFD where its bytes are not whole characters."""
        return self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    async def generate(self, gateway: Gateway, request: GenerationRequest) -> TextStream:
        """Submit a request and read its answer as text. Raises what `Gateway.submit` raises."""
        return self._wrap(gateway, await gateway.submit(request))

    async def resume(self, gateway: Gateway, request_id: str, from_index: int) -> TextStream:
        """Attach again at token `from_index`; the text goes on where it was after that token.

        Raises what `Gateway.resume` raises.
        """
        return self._wrap(gateway, await gateway.resume(request_id, 0), skip=from_index)

    def _wrap(self, gateway: Gateway, stream: TokenStream, skip: int = 0) -> TextStream:
        sampling = stream.request.sampling
        silent = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            silent |= self._eos
        return TextStream(gateway, stream, self._tokenizer.detokenizer(), silent, skip)
