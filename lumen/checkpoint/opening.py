"""Recognises what lies at a path and opens it: native, Hugging Face or GGUF."""

from pathlib import Path

from lumen.checkpoint.gguf_file import GgufFile
from lumen.checkpoint.gguf_source import GgufSource
from lumen.checkpoint.huggingface import HuggingFaceSource
from lumen.checkpoint.native import NativeSource, is_native
from lumen.errors import CheckpointError
from lumen.tensor_source import TensorSource
from lumen.tokenizer import Tokenizer
from lumen.tokenizer.gguf_tokenizer import tokenizer_from_gguf


def open_source(path: Path) -> TensorSource:
    """The weights at a path; headers are read, weights are not.

    Raises CheckpointError if nothing known lies there or it is damaged, ModelConfigError if the
    model is unsupported.
    """
    if path.is_file() and path.suffix == ".gguf":
        return GgufSource(path)
    if is_native(path):
        return NativeSource(path)
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path}.")
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    hint = f" It holds a GGUF file; name the file itself: {found[0]}." if found else ""
    raise CheckpointError(
        f"{path} is not a model: expected a directory with lumen.json (native) or config.json "
        f"(Hugging Face), or a file ending in .gguf.{hint}"
    )


def open_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that came with the weights at a path; None if none did.

    Raises TokenizerError if there is one that is damaged or unsupported, CheckpointError for a
    damaged GGUF file.
    """
    if path.is_file():
        metadata = GgufFile(path).metadata
        return tokenizer_from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return Tokenizer.from_directory(path)
