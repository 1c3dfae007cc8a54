"""Block copies on NVIDIA Hopper (Pallas Mosaic GPU): bytes through shared memory, by bulk copies.

A block is cut into chunks, contiguous on both sides. A group of four warps, of which one thread
issues, loads a few neighbouring chunks into shared memory, stores them and ends; no thread touches
the data. As many groups as fit share a core, and the hardware hands out the next: that is the
pipeline, and one that balances itself. A persistent grid of rings was level for 256 blocks of 2 MB
on an H100 (379 µs), and slower for 64: 103 and 106 µs to gather and scatter, against 100.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.target import Target

_CHUNK_BYTES = 32768  # at most
_GROUP_BYTES = 65536  # 8 to 64 KB per group are within 6 %, 64 KB is the best (H100)
_GROUP_CHUNKS = 8  # at most: the code of each is written out


def gather(
    arena: tuple[jax.Array, ...],
    bases: jax.Array,
    slots_per_block: int,
    shape: ArenaShape,
    target: Target,
) -> jax.Array:
    """See `lumen_kernels.block_copy.gather`."""
    blocks, dtype = bases.shape[0], arena[0].dtype
    cut = _cut(shape.page_shape, slots_per_block, dtype)

    def body(bases_ref: Any, *refs: Any) -> None:
        *segments, buffer, stages, arrived = refs
        source, destination = _Side(cut, segments, bases_ref), _Side(cut, [buffer])
        _move(blocks, cut, source, destination, stages, arrived)

    rows = blocks * cut.chunks * cut.rows
    buffer = jax.ShapeDtypeStruct((rows, cut.width), dtype)
    kernel = _kernel(body, blocks, dtype, cut, target, buffer)
    gathered: jax.Array = kernel(bases, *map(cut.view, arena))
    return gathered.reshape(blocks, slots_per_block, *shape.page_shape)


def scatter(
    arena: tuple[jax.Array, ...],
    bases: jax.Array,
    buffer: jax.Array,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.scatter`."""
    blocks, slots_per_block = buffer.shape[:2]
    cut = _cut(shape.page_shape, slots_per_block, buffer.dtype)

    def body(bases_ref: Any, buffer_ref: Any, *refs: Any) -> None:
        *segments, stages, arrived = refs
        source, destination = _Side(cut, [buffer_ref]), _Side(cut, segments, bases_ref)
        _move(blocks, cut, source, destination, stages, arrived)

    refs = [jax.new_ref(cut.view(segment)) for segment in arena]
    _kernel(body, blocks, buffer.dtype, cut, target)(bases, cut.view(buffer), *refs)
    return _frozen(refs, arena)


def copy(
    arena: tuple[jax.Array, ...],
    sources: jax.Array,
    destinations: jax.Array,
    slots_per_block: int,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.copy`."""
    blocks, dtype = sources.shape[0], arena[0].dtype
    cut = _cut(shape.page_shape, slots_per_block, dtype)

    def body(sources_ref: Any, destinations_ref: Any, *refs: Any) -> None:
        *segments, stages, arrived = refs
        source = _Side(cut, segments, sources_ref)
        destination = _Side(cut, segments, destinations_ref)
        _move(blocks, cut, source, destination, stages, arrived)

    refs = [jax.new_ref(cut.view(segment)) for segment in arena]
    _kernel(body, blocks, dtype, cut, target)(sources, destinations, *refs)
    return _frozen(refs, arena)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Slots seen as rows of `width` elements, of which `rows` make a chunk.

    A slot is one row, or `split` rows if it is larger than a chunk may be. chunks: of a block;
    group: chunks that a group of warps moves.
    """

    slots_per_block: int
    split: int
    width: int
    rows: int
    chunks: int
    group: int

    def view(self, slots: jax.Array) -> jax.Array:
        """Of an arena's segment or a buffer; the same bytes, so no copy."""
        return slots.reshape(-1, self.width)


def _cut(page: tuple[int, ...], slots_per_block: int, dtype: jnp.dtype) -> _Cut:
    elements, most = math.prod(page), _CHUNK_BYTES // dtype.itemsize
    split = next(n for n in range(1, elements + 1) if elements % n == 0 and elements // n <= most)
    width, block = elements // split, slots_per_block * split
    rows = max(n for n in range(1, block + 1) if block % n == 0 and n * width <= most)
    group = min(_GROUP_BYTES // (rows * width * dtype.itemsize), _GROUP_CHUNKS)
    return _Cut(slots_per_block, split, width, rows, block // rows, group)


class _Side:
    """Where chunks come from or go to: an arena and ids into it, or a buffer (bases None)."""

    def __init__(self, cut: _Cut, refs: list[Any], bases: Any = None) -> None:
        self._cut = cut
        self._refs = refs
        self._bases = bases

    def places(self, chunk: jax.Array) -> list[tuple[jax.Array, Any]]:
        """For each array, whether the chunk lies in it, and the chunk there.

        It lies in none if the block's id is negative or past the end.
        """
        cut = self._cut
        block, part = lax.div(chunk, cut.chunks), lax.rem(chunk, cut.chunks)
        base = block * cut.slots_per_block if self._bases is None else self._bases[block]
        # The number of a row fits int32 however large the arena is; that of a byte would not.
        row = base * cut.split + part * cut.rows
        found, first = [], 0
        for ref in self._refs:
            inside = (base >= 0) & (row >= first) & (row < first + ref.shape[0])
            found.append((inside, ref.at[pl.ds(row - first, cut.rows)]))
            first += ref.shape[0]
        return found


def _move(
    blocks: int, cut: _Cut, source: _Side, destination: _Side, stages: Any, arrived: Any
) -> None:
    """Move this group's share. stages [chunks, rows, width]; arrived: a barrier for each."""
    moves, total = [], blocks * cut.chunks
    for stage in range(cut.group):
        chunk = lax.axis_index("group") * cut.group + stage
        at = jnp.minimum(chunk, total - 1)
        reads, writes = source.places(at), destination.places(at)
        moves.append((reads, writes, (chunk < total) & _anywhere(reads) & _anywhere(writes)))
    for stage, (reads, _, wanted) in enumerate(moves):
        for here, place in reads:

            @pl.when(wanted & here)
            def _(place: Any = place, stage: int = stage) -> None:
                plgpu.copy_gmem_to_smem(
                    place,
                    stages.at[stage],
                    arrived.at[stage],
                    # Without this it would be no bulk copy, but a box of at most 256 x 256.
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

    for stage, (_, writes, wanted) in enumerate(moves):
        for here, place in writes:

            @pl.when(wanted & here)
            def _(place: Any = place, stage: int = stage) -> None:
                plgpu.barrier_wait(arrived.at[stage])
                plgpu.copy_smem_to_gmem(stages.at[stage], place)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _anywhere(places: list[tuple[jax.Array, Any]]) -> jax.Array:
    return functools.reduce(operator.or_, (here for here, _ in places))


def _kernel(
    body: Callable[..., None],
    blocks: int,
    dtype: jnp.dtype,
    cut: _Cut,
    target: Target,
    out_type: Any = (),
) -> Callable[..., Any]:
    kernel: Callable[..., Any] = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(
            plgpu.SMEM((cut.group, cut.rows, cut.width), dtype),
            plgpu.Barrier(num_barriers=cut.group),
        ),
        grid=(pl.cdiv(blocks * cut.chunks, cut.group),),
        grid_names=("group",),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
        kernel_name="block_copy",
    )
    return kernel


def _frozen(refs: list[Any], arena: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(
        jax.freeze(ref).reshape(segment.shape) for ref, segment in zip(refs, arena, strict=True)
    )
