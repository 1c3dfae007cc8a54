"""Weights on disk: Hugging Face directories, GGUF files and the native format.

`open_source` opens whatever lies at a path, `check` compares it with its configuration, and
`write_native` and `write_huggingface` convert. Importing this package loads neither JAX nor Orbax.
"""

from lumen.checkpoint.gguf_source import GgufSource
from lumen.checkpoint.huggingface import HuggingFaceSource
from lumen.checkpoint.native import NativeSource
from lumen.checkpoint.opening import open_source, open_tokenizer
from lumen.checkpoint.validation import check

__all__ = [
    "GgufSource",
    "HuggingFaceSource",
    "NativeSource",
    "check",
    "open_source",
    "open_tokenizer",
]
