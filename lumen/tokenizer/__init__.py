"""Text to tokens and back: tokenizers, chat templates, incremental detokenisation."""

from lumen.tokenizer.detokenizer import IncrementalDetokenizer
from lumen.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
