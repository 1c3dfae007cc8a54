"""Resolves what `--model` says into weights and a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from lumen.checkpoint import open_source, open_tokenizer
from lumen.default_model import SMOLLM2_135M_INSTRUCT, default_model
from lumen.errors import ModelUnavailableError
from lumen.tensor_source import TensorSource
from lumen.tokenizer import Tokenizer
from lumen.tokenizer.byte_tokenizer import MIN_VOCAB_SIZE, byte_tokenizer

_RANDOM_PREFIX = "random:"
_FORMS = (
    "expected nothing (the default model), a directory in native or Hugging Face format, "
    "a file ending in .gguf, or random:PRESET"
)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model ready to be loaded.

    model_id: what clients call it. tokenizer: None if the weights came without one; then only
    token ids can be sent. origin: where the weights come from, for people.
    """

    model_id: str
    source: TensorSource
    tokenizer: Tokenizer | None
    origin: str

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the configuration, else the tokenizer's."""
        if self.source.config.eos_token_ids or self.tokenizer is None:
            return self.source.config.eos_token_ids
        return self.tokenizer.eos_token_ids


def resolve_model(
    spec: str | None, cache_dir: Path | None = None, progress: Progress | None = None
) -> ResolvedModel:
    """Find the model that `spec` names and open it; weights are not read yet.

    spec: None for the default model (downloaded and converted on first use), a directory
        (native or Hugging Face), a .gguf file, or "random:PRESET".
    cache_dir, progress: as for `default_model`.
    Raises ModelUnavailableError if there is no such model, and CheckpointError, ModelConfigError
    or TokenizerError if it is damaged or unsupported.
    """
    if spec is None:
        return _opened(
            default_model(cache_dir, progress),
            SMOLLM2_135M_INSTRUCT.model_id,
            f"{SMOLLM2_135M_INSTRUCT.requirement} (the default model)",
        )
    if spec.startswith(_RANDOM_PREFIX):
        return _random(spec)
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        raise ModelUnavailableError(
            f"There is no model {spec!r}: {_FORMS}. Models are not downloaded by name; "
            f"download the files first and pass their directory."
        )
    name = path.stem if path.is_file() else path.resolve().name
    return _opened(path, name, str(path.resolve()))


def _opened(path: Path, model_id: str, origin: str) -> ResolvedModel:
    return ResolvedModel(model_id, open_source(path), open_tokenizer(path), origin)


def _random(spec: str) -> ResolvedModel:
    # Imported here: random weights need JAX, which the other forms do without.
    from lumen.random_weights import random_weights

    source = random_weights(spec)
    vocab_size = source.config.vocab_size
    tokenizer = byte_tokenizer(vocab_size) if vocab_size >= MIN_VOCAB_SIZE else None
    return ResolvedModel(
        spec, source, tokenizer, f"random weights of the shape {spec.removeprefix(_RANDOM_PREFIX)}"
    )
