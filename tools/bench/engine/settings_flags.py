"""Flags of an engine to measure or to check, the same in every tool that starts one.

Importing this defines them; their defaults are those of configs/gpu.toml.
"""

from pathlib import Path

from absl import flags

from serving.engine.device.config import gpu_mixed_calls
from serving.errors import ConfigurationError
from tools.bench.engine.engine import EngineSettings

_MODEL = flags.DEFINE_string("model", "random:llama-3.1-8b", "What --model of lumen-serve takes.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Precision.")
_TENSOR = flags.DEFINE_integer("tensor_parallel", 1, "Devices of the replica.")
_ROWS = flags.DEFINE_integer("num_rows", 512, "Requests run side by side.")
_BLOCK = flags.DEFINE_integer("block_size", 64, "Tokens of one KV block.")
_CHUNKS = flags.DEFINE_list(
    "chunks", ["128", "256", "512", "1024", "2048", "4096"], "Sizes of prefill calls, ascending."
)
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", [], "Sizes of decode batches, ascending, the last one --num_rows. Default: many."
)
_PREFILLS = flags.DEFINE_integer(
    "max_prefills", 32, "Prompts that one step prefills, packed together."
)
_MIXED = flags.DEFINE_bool(
    "mixed_calls", True, "Decodes and short prompt chunks of a step in one pass over the weights."
)
_MODEL_LEN = flags.DEFINE_integer("max_model_len", 16448, "Tokens of one request.")
_MEMORY = flags.DEFINE_float("memory_fraction", 0.9, "Share of the memory JAX has.")
_BLOCKS = flags.DEFINE_integer("num_blocks", None, "KV blocks. Default: what memory leaves.")
_THREADS = flags.DEFINE_integer("compile_threads", 8, "Programs compiled at a time.")
_CACHE = flags.DEFINE_string("cache_dir", "", "Folder of compiled programs. Empty: not kept.")


def engine_settings(
    *, step_tokens: int | None = None, decode_steps: int = 1, pipeline_depth: int = 2
) -> EngineSettings:
    """What the flags say. Raises ConfigurationError if sizes are no numbers."""
    chunks, batch_sizes = _numbers(_CHUNKS), _numbers(_BATCH_SIZES)
    if not chunks:
        raise ConfigurationError("--chunks is empty; name at least one size of prefill calls.")
    return EngineSettings(
        model=_MODEL.value,
        dtype=_DTYPE.value,
        max_model_len=_MODEL_LEN.value,
        num_rows=_ROWS.value,
        block_size=_BLOCK.value,
        prefill_buckets=chunks,
        batch_sizes=batch_sizes or None,
        mixed_calls=gpu_mixed_calls(_ROWS.value, chunks[-1]) if _MIXED.value else (),
        max_prefills=_PREFILLS.value,
        memory_fraction=_MEMORY.value,
        num_blocks=_BLOCKS.value,
        step_tokens=step_tokens,
        decode_steps=decode_steps,
        pipeline_depth=pipeline_depth,
        compile_threads=_THREADS.value,
        tensor_parallel=_TENSOR.value,
    )


def _numbers(flag: flags.FlagHolder[list[str]]) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in flag.value)
    except ValueError as error:
        raise ConfigurationError(
            f"--{flag.name}={','.join(flag.value)}; it must be whole numbers, ascending."
        ) from error


def cache_dir() -> Path | None:
    """Where compiled programs are kept; None: nowhere."""
    return Path(_CACHE.value) if _CACHE.value else None
