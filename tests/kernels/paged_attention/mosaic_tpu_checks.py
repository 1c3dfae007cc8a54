"""Runs of the Mosaic TPU kernels in Pallas' interpreters, compared with the oracle."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.paged_attention.decode import mosaic_tpu as decode
from lumen_kernels.paged_attention.mosaic_tpu_blocks import (
    Blocks,
    decode_blocks,
    prefill_blocks,
)
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.paged_attention.prefill import mosaic_tpu as prefill
from lumen_kernels.target import Backend, Target

from tests.kernels.paged_attention.oracle import Case, assert_same_arena

DMA_MODES = ("on_wait", "eager")
"""When the interpreter runs a copy. A missing wait shows as NaN in one, as a race in the other."""


@dataclass(frozen=True)
class Setting:
    """How a kernel runs, and its options.

    chunk, tile: instead of what the formula gives, in tokens; a small chunk has several of them
    in a short sequence. interpret: True: the fast interpreter; or parameters of the exact one.
    """

    cores: int = 1
    window: int | None = None
    soft_cap: float | None = None
    chunk: int | None = 128
    tile: int | None = None
    table_in_smem: bool = True
    interpret: bool | pltpu.InterpretParams = True

    def options(self, case: Case) -> Options:
        target = Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite", self.cores, interpret=True)
        scale = case.head_dim**-0.5
        return Options(case.kv_heads, scale, self.window, self.soft_cap, True, target)

    def blocks(self, formula, case: Case, group: int, tokens: int) -> Blocks:
        shape = arena_shape("test", case.arena, case.head_dim)
        options = self.options(case)
        blocks = formula(
            shape, case.dtype, case.kv_heads * group, case.kv_heads, tokens, case.tables.shape,
            options.target,
        )  # fmt: skip
        blocks = replace(blocks, table_in_smem=self.table_in_smem)
        if self.chunk is not None:
            blocks = replace(blocks, chunk_tokens=self.chunk)
        if self.tile is not None:
            blocks = replace(blocks, tile_tokens=self.tile, pass_rows=self.tile)
        return blocks


_FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def _decode(shape: ArenaShape, options: Options, blocks: Blocks, interpret):
    def run(q, k, v, arena, tables, lengths, layer_offset):
        return decode.attend_and_write(
            q, k, v, arena, shape, tables, lengths, layer_offset, options, blocks=blocks,
            interpret=interpret,
        )  # fmt: skip

    return jax.jit(run, compiler_options=_FAST_COMPILE)


@functools.cache
def _prefill(shape: ArenaShape, options: Options, blocks: Blocks, interpret):
    def run(q, arena, tables, starts, counts, layer_offset):
        return prefill.attend(
            q, arena, shape, tables, starts, counts, layer_offset, options, blocks=blocks,
            interpret=interpret,
        )  # fmt: skip

    return jax.jit(run, compiler_options=_FAST_COMPILE)


def run_decode(case: Case, q, k, v, lengths, setting: Setting):
    """q, k and v [rows, n, heads, head_dim] float32, k and v may be None. As the operation does."""
    shape = arena_shape("test", case.arena, case.head_dim)
    blocks = setting.blocks(decode_blocks, case, q.shape[2] // case.kv_heads, q.shape[1])
    run = _decode(shape, setting.options(case), blocks, setting.interpret)
    q, k, v = (x if x is None else x.astype(case.dtype) for x in (q, k, v))
    out, lse, arena = run(
        q, k, v, case.arena, case.tables, np.array(lengths, np.int32), case.layer_offset
    )
    return np.asarray(out).astype(np.float32), np.asarray(lse), arena


def run_prefill(case: Case, q, starts, counts, setting: Setting):
    """q [tokens, heads, head_dim] float32. Output and log-sum-exp."""
    shape = arena_shape("test", case.arena, case.head_dim)
    blocks = setting.blocks(prefill_blocks, case, q.shape[1] // case.kv_heads, q.shape[0])
    run = _prefill(shape, setting.options(case), blocks, setting.interpret)
    out, lse = run(
        q.astype(case.dtype), case.arena, case.tables, np.array(starts, np.int32),
        np.array(counts, np.int32), case.layer_offset,
    )  # fmt: skip
    return np.asarray(out).astype(np.float32), np.asarray(lse)


def check_decode(
    case: Case, group: int, setting: Setting, n: int = 1, absent: tuple[int, ...] = ()
) -> None:
    """Write n tokens in every row but those absent, which are padding; compare everything."""
    rows = len(case.lengths)
    q = np.stack([case.draw(n, case.kv_heads * group) for _ in range(rows)])
    k, v = (np.stack([case.draw(n) for _ in range(rows)]) for _ in range(2))
    lengths = [0 if row in absent else case.lengths[row] + n for row in range(rows)]
    out, lse, arena = run_decode(case, q, k, v, lengths, setting)
    for row, length in enumerate(lengths):
        if length:
            case.grow(row, k[row], v[row])
        for i in range(n):
            position = length - n + i if length else -1
            compare(case, out[row, i], lse[row, i], q[row, i], row, position, setting)
    assert_same_arena(case, arena)


def check_prefill(
    case: Case, group: int, counts: list[int], padding: int, setting: Setting
) -> None:
    """Attend for counts[r] more tokens per row, with `padding` in the stream; compare all."""
    starts = list(case.lengths)
    for row, count in enumerate(counts):
        case.grow(row, case.draw(count), case.draw(count))
    q = case.draw(sum(counts) + padding, case.kv_heads * group)
    out, lse = run_prefill(case, q, starts, counts, setting)
    at = 0
    for row, count in enumerate(counts):
        for i in range(count):
            compare(case, out[at], lse[at], q[at], row, starts[row] + i, setting)
            at += 1
    assert not out[at:].any()
    assert np.isneginf(lse[at:]).all()


def compare(case: Case, out, lse, q, row: int, position: int, setting: Setting) -> None:
    """One query against the oracle. bfloat16 rounds weights and outputs, not the sums."""
    scale = case.head_dim**-0.5
    expected, expected_lse = case.dense(q, row, position, scale, setting.window, setting.soft_cap)
    exact = case.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-5 if exact else 0.02, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-5, rtol=0)


@contextmanager
def no_race() -> Iterator[None]:
    """Fails if the interpreter saw a race in what ran inside."""
    try:
        yield
        races = interpret_pallas_call.races
        assert races is not None, "nothing ran with race detection"
        assert not races.races_found
    finally:
        # An exception leaves state behind that makes the next run fail.
        pltpu.reset_tpu_interpret_mode_state()


def watched(setting: Setting, mode: str) -> Setting:
    """The same, in the exact interpreter, with race detection and poisoned memory."""
    parameters = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=mode, num_cores_or_threads=setting.cores
    )
    return replace(setting, interpret=parameters)
