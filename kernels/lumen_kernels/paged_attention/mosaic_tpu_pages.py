"""Pages of K and V on their way from the arena to the buffers of the Mosaic TPU attention kernel.

A grid step works on an item (see `mosaic_tpu_kernel`) and walks its chunks. The next chunk's pages
travel while one is worked on, and behind the last chunk of an item those of the next item, so that
the chain of transfers ends only with the last item of a core.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention.mosaic_tpu_blocks import Blocks
from lumen_kernels.paged_attention.options import Options

TABLE_ROWS = 3
"""Of a table in HBM: the item's, the next one's, and one under way."""

SUBLANES = 8
"""Rows of a vector register."""

Ref = Any


@dataclass(frozen=True, slots=True)
class Config:
    """What the kernel is traced for. packing: rows of the arena per register row."""

    shape: ArenaShape
    options: Options
    blocks: Blocks
    heads: int
    rows: int
    columns: int
    segments: int
    writes: bool
    unrolled: bool
    packing: int

    @property
    def chunk_pages(self) -> int:
        """Blocks of a chunk."""
        return self.blocks.chunk_tokens // self.shape.block_size

    @property
    def slab(self) -> int:
        """Rows of an arena page that one vector load brings."""
        return SUBLANES * self.packing


@dataclass(slots=True)
class PageStream:
    """Pages on their way from the arena to two buffers, item by item, chunk by chunk.

    Of item and chunk numbers a step is meant: item `step` of this core's list.
    """

    config: Config
    layer_offset: Ref
    plan: Ref
    table: Ref
    arena: tuple[Ref, ...]
    buffers: Ref
    semaphores: Ref
    table_rows: Ref | None
    table_semaphores: Ref | None
    group: jax.Array
    steps: int

    def _item(self, step: jax.Array) -> jax.Array:
        groups = self.config.blocks.item_groups
        return step * groups + self.group if groups > 1 else step

    def _planned(self, kind: int, step: jax.Array) -> jax.Array:
        count = self.steps * self.config.blocks.item_groups
        value: jax.Array = self.plan[kind * count + self._item(step)]
        return value

    def first(self, step: jax.Array) -> jax.Array:
        """Position of the item's first query token."""
        return self._planned(1, step)

    def end(self, step: jax.Array) -> jax.Array:
        """One past the item's last position."""
        return self._planned(2, step)

    def first_page(self, step: jax.Array) -> jax.Array:
        """Column of the table that holds the first position seen."""
        window = self.config.options.sliding_window
        if window is None:
            return jnp.zeros((), jnp.int32)
        block_size = self.config.shape.block_size
        page: jax.Array = lax.div(jnp.maximum(self.first(step) - (window - 1), 0), block_size)
        return page

    def end_page(self, step: jax.Array) -> jax.Array:
        """One past the column that holds the last position seen."""
        block_size = self.config.shape.block_size
        return lax.div(self.end(step) + (block_size - 1), block_size)

    def chunks(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The item's first chunk, and one past its last."""
        pages = self.config.chunk_pages
        end = lax.div(self.end_page(step) + (pages - 1), pages)
        return lax.div(self.first_page(step), pages), end

    def pages(self, step: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pages of the chunk that are fetched: the first, and one past the last."""
        pages = self.config.chunk_pages
        begin = jnp.maximum(self.first_page(step) - chunk * pages, 0)
        return begin, jnp.minimum(self.end_page(step) - chunk * pages, pages)

    def slot(self, step: jax.Array, column: jax.Array) -> jax.Array:
        """Slot of this step's first head in a block of the item's row."""
        if self.table_rows is None:
            base = self.table[self._planned(0, step) * self.config.columns + column]
        else:
            base = self.table_rows[lax.rem(step, TABLE_ROWS), column]
        slot: jax.Array = base + self.layer_offset[0]
        if self.config.blocks.item_groups == 1:
            slot += self.group * self.config.heads
        return slot

    def _table_copy(self, step: jax.Array) -> Any:
        assert self.table_rows is not None
        assert self.table_semaphores is not None
        place = lax.rem(step, TABLE_ROWS)
        row = self._planned(0, step)
        return pltpu.make_async_copy(
            self.table.at[row], self.table_rows.at[place], self.table_semaphores.at[place]
        )

    def begin(self) -> None:
        """Start the chain: the first item, and the rows of the table it and the next one need."""
        if self.table_rows is not None:
            self._table_copy(jnp.int32(0)).start()
            if self.steps > 1:
                self._table_copy(jnp.int32(1)).start()
        self.open(jnp.int32(0), jnp.int32(0))

    def look_ahead(self, step: jax.Array) -> None:
        """Send for the table row of the item after the next."""
        if self.table_rows is not None:

            @pl.when(step + 2 < self.steps)
            def _() -> None:
                self._table_copy(step + 2).start()

    def open(self, step: jax.Array, buffer: jax.Array) -> None:
        """Start the first chunk of an item; once for each, in order."""
        if self.table_rows is not None:
            self._table_copy(step).wait()
        self.start(step, self.chunks(step)[0], buffer)

    def start(self, step: jax.Array, chunk: jax.Array, buffer: jax.Array) -> None:
        """Start the transfers of a chunk."""

        def page(index: jax.Array, _: None) -> None:
            slot = self.slot(step, chunk * self.config.chunk_pages + index)
            self.per_segment(
                slot,
                lambda pages: pltpu.make_async_copy(
                    pages, self.buffers.at[buffer, index], self.semaphores.at[buffer]
                ).start(),
            )

        lax.fori_loop(*self.pages(step, chunk), page, None)

    def per_segment(self, slot: jax.Array, use: Callable[[Ref], None]) -> None:
        """Call use with the heads' pages, in the segment that holds the slot."""
        heads = self.config.heads
        if len(self.arena) == 1:
            use(self.arena[0].at[pl.ds(slot, heads)])
            return
        shape = self.config.shape
        for segment, first, slots in zip(self.arena, shape.first_slots, shape.slots, strict=True):

            @pl.when((slot >= first) & (slot < first + slots))
            def _(segment: Ref = segment, first: int = first) -> None:
                use(segment.at[pl.ds(slot - first, heads)])

    def wait(self, step: jax.Array, chunk: jax.Array, buffer: jax.Array) -> None:
        """Wait for all pages of a chunk.

        Semaphores count bytes, so one wait as large as a whole chunk does for all its pages.
        """
        begin, end = self.pages(step, chunk)
        semaphore = self.semaphores.at[buffer]

        def arrived(pages: Ref) -> None:
            pltpu.make_async_copy(pages, pages, semaphore).wait()

        whole = end - begin == self.config.chunk_pages

        @pl.when(whole)
        def _() -> None:
            arrived(self.buffers.at[buffer])

        @pl.when(jnp.logical_not(whole))
        def _() -> None:
            lax.fori_loop(
                begin, end, lambda index, _: arrived(self.buffers.at[buffer, index]), None
            )
