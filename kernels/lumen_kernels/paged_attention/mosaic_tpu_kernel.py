"""The Mosaic TPU attention kernel of decode and prefill: items of query rows over paged K and V.

An item is a few consecutive query tokens of one row of the block table: a decode step's tokens, or
a tile of a prompt. A grid step takes one item and some KV heads. It walks the keys in chunks of a
fixed number of positions, from the lowest to the highest, so that what is summed in which order
depends on positions only. While a chunk is worked on, the pages of the next one travel to the
other of two buffers, and at the end of an item those of the next item: the chain of transfers ends
only with the last item of a core.

What is not fetched or does not hold a token is set to zero in the buffer of V: masked weights are
zero, but zero times the NaN of an earlier owner would be NaN.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention.mosaic_tpu_blocks import LANES, MOST_COLUMNS, Blocks
from lumen_kernels.paged_attention.mosaic_tpu_pages import (
    SUBLANES,
    TABLE_ROWS,
    Config,
    PageStream,
    Ref,
)
from lumen_kernels.paged_attention.options import Arena, Options

_MASKED = -1e30  # finite, so that a fully masked chunk stays free of NaN

Interpret = bool | pltpu.InterpretParams


@dataclass(frozen=True, slots=True)
class Items:
    """What grid steps work on, int32 [items] each.

    rows: row of the block table. firsts: position of the first query token, negative if the first
    ones are padding. ends: one past the last position any of them sees; 0: nothing, an empty item.
    """

    rows: jax.Array
    firsts: jax.Array
    ends: jax.Array


def attend(
    q: jax.Array,
    new_kv: jax.Array | None,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    items: Items,
    layer_offset: jax.Array,
    options: Options,
    blocks: Blocks,
    *,
    operation: str,
    unrolled: bool,
    interpret: Interpret | None = None,
    bounds_checks: bool = False,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """Attention of items of blocks.tile_tokens query tokens each.

    q [items, kv heads, group * tile tokens, width]: row g * tile_tokens + t is head g of the group
    and token t; width is the arena's, heads of 64 are zero in the upper half. Token t sees the
    positions up to min(firsts + t, ends - 1). new_kv: `packed_tokens` of one token per item, which
    is stored at position ends - 1 and seen; None: nothing is stored. tables int32 [rows, blocks].
    unrolled: over the KV heads of a step, and a single form of the inner loop; for few query rows.
    interpret: None: as the target says. The number of items is a multiple of blocks.item_groups.

    Returns the output [items, kv heads, group * tile tokens, head_dim], the log-sum-exp without
    head_dim if wanted, and the arena. Raises KernelArgumentError for a table that is too wide.
    """
    count, kv_heads, rows, width = q.shape
    heads = kv_heads // blocks.head_groups
    pages = shape.page_shape[0]
    steps = count // blocks.item_groups
    columns = tables.shape[1]
    if not blocks.table_in_smem and columns > MOST_COLUMNS:
        raise KernelArgumentError(
            operation,
            "tables",
            f"has {columns} columns; scalar memory takes rows of up to {MOST_COLUMNS}. Use larger "
            "blocks.",
        )
    dtype = arena[0].dtype
    config = Config(
        shape, options, blocks, heads, rows, columns, len(arena),
        new_kv is not None, unrolled, 4 // dtype.itemsize,
    )  # fmt: skip

    def at_item(group: jax.Array, step: jax.Array, *_: Ref) -> tuple[jax.Array | int, ...]:
        if blocks.item_groups > 1:
            return step * blocks.item_groups + group, 0, 0, 0
        return step, group, 0, 0

    plan = jnp.concatenate([items.rows, items.firsts, items.ends])
    scalars = [layer_offset.astype(jnp.int32).reshape(1), plan]
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    operands, in_specs = [q], [pl.BlockSpec((1, heads, rows, width), at_item)]
    if new_kv is not None:
        operands.append(new_kv)
        in_specs.append(pl.BlockSpec((1, heads, pages, width), at_item))
    if blocks.table_in_smem:
        scalars.append(tables.reshape(-1))
    else:
        operands.append(tables)
        in_specs.append(in_hbm)
    first_segment = len(scalars) + len(operands)
    operands += arena
    in_specs += [in_hbm] * len(arena)

    out_shape = [jax.ShapeDtypeStruct((count, kv_heads, rows, shape.head_dim), q.dtype)]
    out_specs = [pl.BlockSpec((1, heads, rows, shape.head_dim), at_item)]
    if options.with_lse:
        out_shape.append(jax.ShapeDtypeStruct((count, kv_heads, rows, LANES), jnp.float32))
        out_specs.append(pl.BlockSpec((1, heads, rows, LANES), at_item))
    aliases = {}
    if new_kv is not None:
        aliases = {first_segment + i: len(out_shape) + i for i in range(len(arena))}
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arena]
        out_specs += [in_hbm] * len(arena)

    if interpret is None:
        interpret = options.target.interpret
    results = pl.pallas_call(
        functools.partial(_kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(blocks.head_groups * blocks.item_groups, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=_scratch(config, dtype, width),
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_limit_bytes,
            disable_bounds_checks=not bounds_checks,
        ),
        cost_estimate=_cost(q, arena, shape, columns),
        interpret=interpret,
        name=f"paged_attention_{operation}",
    )(*scalars, *operands)
    out, *rest = results
    lse = rest.pop(0)[..., 0] if options.with_lse else None
    return out, lse, tuple(rest) if new_kv is not None else arena


def packed_tokens(k: jax.Array, v: jax.Array, shape: ArenaShape) -> jax.Array:
    """K and V [rows, kv heads, head_dim] as the words the kernel stores, int32 [rows, kv heads,
    pages, width].

    A register row holds two neighbouring bfloat16 rows: the token's bits stand in both halves, and
    the kernel takes the right one. As integers the other half keeps its bits even if they are NaN.
    """
    both = jnp.concatenate([k, v], axis=-1)[:, :, None] if shape.packed else jnp.stack([k, v], 2)
    if both.dtype.itemsize == 4:
        return lax.bitcast_convert_type(both, jnp.int32)
    bits = lax.bitcast_convert_type(both, jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(bits | bits << 16, jnp.int32)


def _scratch(config: Config, dtype: Any, width: int) -> list[Any]:
    pages, block_size, _ = config.shape.page_shape
    heads = config.heads
    state = (heads, config.rows, LANES)
    scratch = [
        pltpu.VMEM((2, config.chunk_pages, heads, pages, block_size, width), dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.VMEM(state, jnp.float32),
        pltpu.VMEM(state, jnp.float32),
        pltpu.VMEM((heads, config.rows, width), jnp.float32),
    ]
    if not config.blocks.table_in_smem:
        scratch += [
            pltpu.SMEM((TABLE_ROWS, config.columns), jnp.int32),
            pltpu.SemaphoreType.DMA((TABLE_ROWS,)),
        ]
    if config.writes:
        scratch += [
            pltpu.VMEM((2, heads, pages, config.slab, width), dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ]
    return scratch


def _cost(q: jax.Array, arena: Arena, shape: ArenaShape, columns: int) -> pl.CostEstimate:
    """For XLA's scheduler; lengths are not known, so half of the table's width stands for them."""
    items, kv_heads, rows, width = q.shape
    tokens = max(columns * shape.block_size // 2, 1)
    token_bytes = kv_heads * math.prod(shape.page_shape) // shape.block_size
    return pl.CostEstimate(
        flops=4 * items * kv_heads * rows * width * tokens,
        bytes_accessed=items * tokens * token_bytes * arena[0].dtype.itemsize
        + 2 * q.size * q.dtype.itemsize,
        transcendentals=items * kv_heads * rows * tokens,
    )


def _kernel(config: Config, *refs: Ref) -> None:
    given = iter(refs)
    layer_offset, plan = next(given), next(given)
    table = next(given) if config.blocks.table_in_smem else None
    q = next(given)
    new_kv = next(given) if config.writes else None
    if table is None:
        table = next(given)
    arena = tuple(next(given) for _ in range(config.segments))
    out = next(given)
    lse = next(given) if config.options.with_lse else None
    if config.writes:
        arena = tuple(next(given) for _ in range(config.segments))
    buffers, semaphores, carried, best, mass, total = (next(given) for _ in range(6))
    in_smem = config.blocks.table_in_smem
    table_rows, table_semaphores = (None, None) if in_smem else (next(given), next(given))
    staged = (next(given), next(given)) if config.writes else None

    step, steps = pl.program_id(1), pl.num_programs(1)
    stream = PageStream(
        config, layer_offset, plan, table, arena, buffers, semaphores, table_rows,
        table_semaphores, pl.program_id(0), plan.shape[0] // 3 // config.blocks.item_groups,
    )  # fmt: skip
    state = _State(config, q, buffers, best, mass, total)

    @pl.when(step == 0)
    def _() -> None:
        carried[0] = 0  # the buffer of the next chunk
        carried[1] = 0  # tokens stored so far
        stream.begin()

    stream.look_ahead(step)
    state.clear()
    first_chunk, end_chunk = stream.chunks(step)

    def chunk_step(chunk: jax.Array, buffer: jax.Array) -> jax.Array:
        last = chunk + 1 == end_chunk

        @pl.when(jnp.logical_not(last))
        def _() -> None:
            stream.start(step, chunk + 1, 1 - buffer)

        @pl.when(last & (step + 1 < steps))
        def _() -> None:
            stream.open(step + 1, 1 - buffer)

        stream.wait(step, chunk, buffer)
        if staged is not None:

            @pl.when(last)
            def _() -> None:
                _store_token(stream, step, chunk, buffer, new_kv, carried, *staged)

        _clean(stream, step, chunk, buffer)
        first, end = stream.first(step), stream.end(step)
        if config.unrolled:
            for head, row in itertools.product(
                range(config.heads), range(0, config.rows, config.blocks.pass_rows)
            ):
                state.fold(head, row, buffer, chunk, first, end, masked=True)
        else:
            _fold_in_a_loop(state, buffer, chunk, first, end)
        return 1 - buffer

    buffer = lax.fori_loop(first_chunk, end_chunk, chunk_step, carried[0])
    carried[0] = buffer

    @pl.when((first_chunk == end_chunk) & (step + 1 < steps))
    def _() -> None:
        stream.open(step + 1, buffer)

    state.finish(out, lse)
    if staged is not None:

        @pl.when(step + 1 == steps)
        def _() -> None:
            for back in range(2):

                @pl.when(carried[1] > back)
                def _(back: int = back) -> None:
                    _wait_stored(config, *staged, (carried[1] - 1 - back) & 1)


def _store_token(
    stream: PageStream,
    step: jax.Array,
    chunk: jax.Array,
    buffer: jax.Array,
    new_kv: Ref,
    carried: Ref,
    staging: Ref,
    semaphores: Ref,
) -> None:
    """Put the item's token into its page in the buffer, and send its register row to the arena.

    Two rows of bfloat16 are the least that a transfer can address; the other one keeps its bits.
    """
    config = stream.config
    block_size, slab, packing = config.shape.block_size, config.slab, config.packing
    position = stream.end(step) - 1
    column, offset = lax.div(position, block_size), position & (block_size - 1)
    page = column - chunk * config.chunk_pages
    above = pl.multiple_of(offset & ~(slab - 1), slab)
    inside = offset - above
    stored = carried[1]
    place = stored & 1

    @pl.when(stored >= 2)
    def _() -> None:
        _wait_stored(config, staging, semaphores, place)

    width = config.shape.page_shape[2]
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    taken = -1 if packing == 1 else jnp.where(inside & 1 == 0, 0xFFFF, ~0xFFFF)
    mask = jnp.where(row == lax.div(inside, packing), taken, 0)
    for head in range(config.heads):
        for half in range(config.shape.page_shape[0]):
            rows = (buffer, page, head, half, pl.ds(above, slab))
            words = pltpu.bitcast(stream.buffers[rows], jnp.int32)
            token = jnp.broadcast_to(new_kv[0, head, half : half + 1, :], words.shape)
            words = (words & ~mask) | (token & mask)
            merged = pltpu.bitcast(words, stream.buffers.dtype)
            stream.buffers[rows] = merged
            staging[place, head, half] = merged
    even = pl.multiple_of(offset & ~(packing - 1), packing)
    from_row = pl.multiple_of(inside & ~(packing - 1), packing)
    stream.per_segment(
        stream.slot(step, column),
        lambda pages: pltpu.make_async_copy(
            staging.at[place, :, :, pl.ds(from_row, packing)],
            pages.at[:, :, pl.ds(even, packing)],
            semaphores.at[place],
        ).start(),
    )
    carried[1] = stored + 1


def _wait_stored(config: Config, staging: Ref, semaphores: Ref, place: jax.Array) -> None:
    sent = staging.at[place, :, :, pl.ds(0, config.packing)]
    pltpu.make_async_copy(sent, sent, semaphores.at[place]).wait()


def _clean(stream: PageStream, step: jax.Array, chunk: jax.Array, buffer: jax.Array) -> None:
    """Zero V, in the buffer, wherever this chunk has no token of the item."""
    config, buffers = stream.config, stream.buffers
    value = config.shape.page_shape[0] - 1  # a packed page is both
    block_size = config.shape.block_size
    begin, end = stream.pages(step, chunk)
    tail = stream.end(step) - chunk * config.blocks.chunk_tokens
    shape = (config.heads, block_size, config.shape.page_shape[2])

    def zero(page: jax.Array, _: None) -> None:
        buffers[buffer, page, :, value] = jnp.zeros(shape, buffers.dtype)

    if config.options.sliding_window is not None:
        lax.fori_loop(0, begin, zero, None)
    lax.fori_loop(end, config.chunk_pages, zero, None)

    @pl.when(tail < end * block_size)
    def _() -> None:
        kept = buffers[buffer, end - 1, :, value].astype(jnp.float32)
        row = lax.broadcasted_iota(jnp.int32, shape, 1) + (end - 1) * block_size
        kept = jnp.where(row < tail, kept, 0.0)
        buffers[buffer, end - 1, :, value] = kept.astype(buffers.dtype)


@dataclass(slots=True)
class _State:
    """Running softmax of an item: best score, mass and weighted sum of V, per head and query row.

    best [heads, rows, 128] holds its number in every lane; mass is a sum per lane, added up at the
    end: one reduction over lanes per chunk instead of two.
    """

    config: Config
    q: Ref
    buffers: Ref
    best: Ref
    mass: Ref
    total: Ref

    def clear(self) -> None:
        self.best[...] = jnp.full(self.best.shape, _MASKED, jnp.float32)
        self.mass[...] = jnp.zeros(self.mass.shape, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)

    def fold(
        self,
        head: jax.Array | int,
        first_row: jax.Array | int,
        buffer: jax.Array,
        chunk: jax.Array,
        first: jax.Array,
        end: jax.Array,
        *,
        masked: bool,
    ) -> None:
        """Add a chunk to the state of blocks.pass_rows query rows of one head."""
        config = self.config
        tokens, count = config.blocks.chunk_tokens, config.blocks.pass_rows
        pages, _, width = config.shape.page_shape
        rows = pl.ds(first_row, count)
        exact = self.q.dtype == jnp.float32
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
        keys = self.buffers[buffer, :, head, 0].reshape(tokens, width)
        values = keys if pages == 1 else self.buffers[buffer, :, head, 1].reshape(tokens, width)
        scores = lax.dot_general(
            self.q[0, head, rows, :], keys, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = self._scaled(scores)
        if masked:
            seen = self._seen(chunk, first, end)
            scores = jnp.where(seen, scores, _MASKED)
        before = self.best[head, rows, :]
        best = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - _repeated(best, tokens))
        if masked:
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp(before - best)
        mass = self.mass[head, rows, :] * shrink
        for lane in range(0, tokens, LANES):
            mass += weights[:, lane : lane + LANES]
        part = lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        self.best[head, rows, :] = best
        self.mass[head, rows, :] = mass
        self.total[head, rows, :] = self.total[head, rows, :] * _repeated(shrink, width) + part

    def finish(self, out: Ref, lse: Ref | None) -> None:
        """Write the item's outputs; zeros and -inf for rows that saw nothing."""
        config = self.config
        for head in range(config.heads):
            mass = jnp.sum(self.mass[head], axis=1, keepdims=True)
            some = jnp.where(mass > 0, mass, 1.0)
            result = self.total[head] / some
            if config.shape.packed:
                result = result[:, config.shape.head_dim :]
            out[0, head] = result.astype(out.dtype)
            if lse is not None:
                found = self.best[head] + jnp.log(some)
                lse[0, head] = jnp.where(mass > 0, found, -jnp.inf)

    def _scaled(self, scores: jax.Array) -> jax.Array:
        options = self.config.options
        if options.soft_cap is None:
            return scores * options.scale
        return jnp.tanh(scores * (options.scale / options.soft_cap)) * options.soft_cap

    def _seen(self, chunk: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
        """Which keys of the chunk the rows of a pass see, [pass rows, chunk tokens]."""
        config = self.config
        tile = config.blocks.tile_tokens
        shape = (config.blocks.pass_rows, config.blocks.chunk_tokens)
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        # A pass is whole tiles: row g * tile + t is token t. Cheaper than a remainder.
        token = row
        for boundary in range(tile, shape[0], tile):
            token -= jnp.where(row >= boundary, tile, 0)
        limit = jnp.minimum(first + token, end - 1)
        key = lax.broadcasted_iota(jnp.int32, shape, 1) + chunk * config.blocks.chunk_tokens
        seen = key <= limit
        if config.options.sliding_window is not None:
            seen &= key > limit - config.options.sliding_window
        return seen


def _fold_in_a_loop(
    state: _State, buffer: jax.Array, chunk: jax.Array, first: jax.Array, end: jax.Array
) -> None:
    """Fold all heads and query rows of a step; without a mask where all rows see all keys."""
    config = state.config
    passes = config.rows // config.blocks.pass_rows
    chunk_tokens = config.blocks.chunk_tokens

    def fold(masked: bool) -> None:
        def one(index: jax.Array, _: None) -> None:
            head = lax.div(index, passes)
            first_row = pl.multiple_of(
                lax.rem(index, passes) * config.blocks.pass_rows, config.blocks.pass_rows
            )
            state.fold(head, first_row, buffer, chunk, first, end, masked=masked)

        lax.fori_loop(0, config.heads * passes, one, None)

    whole = (chunk + 1) * chunk_tokens <= first + 1
    if config.options.sliding_window is not None:
        whole &= chunk * chunk_tokens >= end - config.options.sliding_window

    @pl.when(whole)
    def _() -> None:
        fold(masked=False)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        fold(masked=True)


def _repeated(lanes: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with the same number in all lanes, widened: no data moves."""
    return jnp.concatenate([lanes] * (width // LANES), axis=1) if width > LANES else lanes
