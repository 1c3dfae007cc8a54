"""The model a program serves, resolved from its settings: the same in gateway and worker."""

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from lumen.default_model import default_cache_dir
from lumen.model_spec import ResolvedModel, resolve_model
from serving.errors import ConfigurationError
from serving.launch.config import DEFAULT_MAX_MODEL_LEN, BatchSettings, ModelSettings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, the name clients use for it, and the tokens one request may have in all."""

    model_id: str
    max_model_len: int
    resolved: ResolvedModel


def served_model(settings: ModelSettings, progress: Progress | None = None) -> ServedModel:
    """Resolve the model and settle what depends on it; weights are not read.

    Raises ConfigurationError if --max_model_len is beyond the model, and what `resolve_model`
    raises.
    """
    resolved = resolve_model(settings.model or None, cache_dir(settings), progress)
    limit = resolved.source.config.max_position
    wanted = settings.max_model_len
    if wanted is not None and wanted > limit:
        raise ConfigurationError(
            f"--max_model_len is {wanted}, but the model goes up to {limit} tokens; lower it."
        )
    return ServedModel(
        settings.model_name or resolved.model_id,
        wanted if wanted is not None else min(limit, DEFAULT_MAX_MODEL_LEN),
        resolved,
    )


def check_arena_holds_a_request(batching: BatchSettings, model: ServedModel) -> None:
    """Raise ConfigurationError if --num_blocks cannot hold one request of full length."""
    if batching.num_blocks is None:
        return
    held = batching.num_blocks * batching.block_size
    if held < model.max_model_len:
        raise ConfigurationError(
            f"--num_blocks={batching.num_blocks} of --block_size={batching.block_size} hold {held} "
            f"tokens, less than one request of {model.max_model_len}; raise it to "
            f"{-(-model.max_model_len // batching.block_size)} or lower --max_model_len."
        )


def cache_dir(settings: ModelSettings) -> Path:
    """Lumen's cache folder."""
    return Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()
