"""A tokenizer for models that have none: one token per byte.

Random weights have no vocabulary of their own, but the text endpoints should work with them.
Ids 0, 1 and 2 are padding, beginning and end of a text, 3 to 258 the byte values; every further
id of the model's table decodes to its number, so that what a random model writes can be seen.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lumen.errors import TokenizerError
from lumen.tokenizer.token_spelling import byte_alphabet
from lumen.tokenizer.tokenizer import Tokenizer

_SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")
MIN_VOCAB_SIZE = len(_SPECIAL) + 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with exactly `vocab_size` ids.

    Raises TokenizerError below 259, where the bytes do not fit.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            f"A vocabulary of {vocab_size} is too small for a byte tokenizer, which needs "
            f"{MIN_VOCAB_SIZE}."
        )
    characters = sorted(byte_alphabet().items(), key=lambda item: item[1])
    tokens = [*_SPECIAL, *(character for character, _ in characters)]
    space = next(character for character, value in characters if value == ord(" "))
    tokens += [f"{space}{token}" for token in range(len(tokens), vocab_size)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in _SPECIAL]
    )
    pad, begin, end = _SPECIAL
    special = {"pad_token": pad, "bos_token": begin, "eos_token": end}
    return Tokenizer(backend, special, _CHAT_TEMPLATE)
