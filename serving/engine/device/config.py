"""Settings of a device executor."""

from dataclasses import dataclass
from pathlib import Path

from serving.engine.device.prefill_calls import most_sequences
from serving.engine.executor import MixedSize
from serving.errors import ConfigurationError

_SMALLEST_PREFILL_BUCKET = 16

_MANY_ROWS = 64
"""Replicas of so many rows have no programs for 2 and for 4: on an H200, 8 rows of an 8B model take
8 % longer than one, and programs of few rows take longest to compile."""

_MIXED_CALLS = ((256, 64), (512, 64), (512, 128), (1024, 128), (1024, 256))
"""Where an 8B model on an H200 gains most: of longer calls the weights are a small part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExecutorConfig:
    """How one replica uses its devices.

    max_model_len: tokens of prompt and output together. max_prefill_tokens: tokens of one prefill
    call, and of one prompt's chunk; max_prefills: prompts whose chunks one plan has, which a call
    packs as far as its size allows. prefill_buckets: tokens of the calls that programs are
    compiled for, ascending, the last one max_prefill_tokens; None: powers of two from 16.
    mixed_calls: (tokens, rows) of the calls that run decode rows and prompt chunks in one pass over
    the weights: tokens in all, of which so many are the rows', one of `decode_buckets`; of what
    fits none of them, rows and chunks take a pass each.
    num_blocks, arena_bytes (per device): size of the KV arena, at most one of them; neither: what
    `memory_fraction` of an accelerator's memory leaves beside the weights; on a CPU enough for
    every row at full length, within 1 GiB unless a single request needs more.
    batch_sizes: that decode programs are compiled for, ascending, the last one num_rows; None: as
    many as pay, see `decode_buckets`.
    dtype: "float32", "bfloat16" or "float16", of weights, activations and KV.
    max_logprobs: most alternatives reported per token.
    droppable_units: numbers of units whose weights lie in one piece of a device's memory, so that
    one allocation can have it if they are dropped.
    compile_threads: programs compiled at a time.
    cache_dir: where compiled programs are kept, trusted like the code itself (`program_cache`);
    None: none are, except as JAX is configured.
    """

    max_model_len: int
    num_rows: int = 16
    block_size: int = 16
    num_blocks: int | None = None
    arena_bytes: int | None = None
    memory_fraction: float = 0.9
    max_prefill_tokens: int = 512
    max_prefills: int = 16
    prefill_buckets: tuple[int, ...] | None = None
    mixed_calls: tuple[tuple[int, int], ...] = ()
    batch_sizes: tuple[int, ...] | None = None
    dtype: str = "float32"
    max_logprobs: int = 20
    droppable_units: tuple[int, ...] = ()
    compile_threads: int = 4
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigurationError."""
        for name in (
            "max_model_len", "num_rows", "block_size", "max_prefill_tokens", "max_prefills",
            "max_logprobs", "compile_threads",
        ):  # fmt: skip
            value = getattr(self, name)
            if value < 1:
                raise ConfigurationError(f"{name} is {value}; it must be at least 1.")
        if self.num_blocks is not None and self.arena_bytes is not None:
            raise ConfigurationError(
                "num_blocks and arena_bytes are both given; each sets the size of the KV arena, "
                "so give one of them."
            )
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigurationError(
                f"memory_fraction is {self.memory_fraction}; it must be a share of the device's "
                "memory, more than 0 and at most 1."
            )
        self._check_sizes("prefill_buckets", "max_prefill_tokens")
        self._check_sizes("batch_sizes", "num_rows")
        for tokens, rows in self.mixed_calls:
            if rows not in self.decode_buckets or tokens <= rows:
                raise ConfigurationError(
                    f"mixed_calls has ({tokens}, {rows}); rows must be a batch size of decodes, "
                    f"one of {self.decode_buckets}, and tokens more than them."
                )

    def _check_sizes(self, name: str, largest: str) -> None:
        sizes, last = getattr(self, name), getattr(self, largest)
        if sizes is None:
            return
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] != last:
            raise ConfigurationError(
                f"{name} is {sizes}; it must be ascending and end with {largest} ({last})."
            )

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Batch sizes that decode programs are compiled for, ascending.

        Up to 32 rows a step takes as long as its weights take to stream, so sizes double; past
        that every row costs, and so does padding: there are two, then four sizes per doubling.
        Large replicas leave out the smallest.
        """
        if self.batch_sizes is not None:
            return self.batch_sizes
        sizes = [1] if self.num_rows < _MANY_ROWS else [1, 8]
        while sizes[-1] < self.num_rows:
            sizes.append(sizes[-1] + _step_after(sizes[-1]))
        return (*sizes[:-1], self.num_rows)

    @property
    def chunk_buckets(self) -> dict[int, int]:
        """Tokens of the calls that prefill programs are compiled for, and sequences of each."""
        buckets = self.prefill_buckets
        if buckets is None:
            buckets = _doubling(_SMALLEST_PREFILL_BUCKET, self.max_prefill_tokens)
        sizes = self.decode_buckets
        return {tokens: most_sequences(tokens, self.max_prefills, sizes) for tokens in buckets}

    @property
    def mixed_sizes(self) -> tuple[MixedSize, ...]:
        """What the calls of `mixed_calls` take, ascending."""
        sizes = self.decode_buckets
        return tuple(
            MixedSize(tokens, rows, most_sequences(tokens - rows, self.max_prefills, sizes))
            for tokens, rows in sorted(set(self.mixed_calls))
        )


def gpu_mixed_calls(num_rows: int, max_prefill_tokens: int) -> tuple[tuple[int, int], ...]:
    """`DeviceExecutorConfig.mixed_calls` for a GPU: few, as each takes its time to compile."""
    calls = {(tokens, min(rows, num_rows)) for tokens, rows in _MIXED_CALLS}
    return tuple(sorted(call for call in calls if call[0] <= max_prefill_tokens))


def _step_after(size: int) -> int:
    """From a batch size to the next."""
    octave = 1 << (size.bit_length() - 1)
    return octave if octave < 32 else octave // 2 if octave < 128 else octave // 4


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... while below last, then last."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return (*sizes, last)
