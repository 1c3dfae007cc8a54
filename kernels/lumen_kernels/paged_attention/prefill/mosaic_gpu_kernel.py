"""The static side of the Hopper prefill kernel, and what its warpgroups share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.hopper import swizzled
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as work

ROWS = 64
"""Query rows of a warpgroup: the M of one WGMMA."""

CONSUMERS = 2
"""Warpgroups that compute; one more loads."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Static choices of the kernel.

    key_tile: keys folded at once. stages: tiles of K, and of V, in flight. turns: consumers issue
    products in turns. overlap: exponentiate while the sum over the tile before is still running.
    shared: the output leaves through the queries' buffer, to save memory. paired: two programs, a
    cluster, take two items of one KV head and one tile, and load keys and values for each other.

    TFLOP/s on one H200 (2026-11-25, 32/8 heads of 128, blocks of 64, XLA's best product 758), for
    16,384 tokens and for 2,048 behind 14,336: turns alone 594 and 560; neither turns nor overlap
    592 and 540. With three stages and `shared`, 16,384 tokens: neither 598, overlap 551, both 558.
    Later, on another one and under its power limit, in turns with each other, 4,096 tokens behind
    0, 4,096 and 12,288: turns alone 552, 571 and 578; `paired` 563, 592 and 600, and with three
    stages and `shared` 556, 582 and 596.
    """

    key_tile: int = 128
    stages: int = 2
    turns: bool = True
    overlap: bool = False
    shared: bool = False
    paired: bool = False
    producer_registers: int = 40
    consumer_registers: int = 232

    def __post_init__(self) -> None:
        # What three warpgroups start with: 168 each. Asking for more waits forever.
        assert self.producer_registers + CONSUMERS * self.consumer_registers <= 504


TUNINGS = {
    64: Tuning(stages=4),
    128: Tuning(paired=True),
    256: Tuning(key_tile=64, shared=True),
}
"""By head_dim."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is static in a call.

    heads: query heads. tile_tokens, tile_heads: of an item.
    """

    shape: ArenaShape
    options: Options
    tuning: Tuning
    heads: int
    tile_tokens: int
    tile_heads: int

    @staticmethod
    def of(heads: int, shape: ArenaShape, options: Options, tuning: Tuning) -> "Plan":
        """heads: query heads."""
        group = heads // options.kv_heads
        tile_heads = 1 if group % CONSUMERS else CONSUMERS
        return Plan(shape, options, tuning, heads, ROWS * CONSUMERS // tile_heads, tile_heads)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.options.kv_heads

    @property
    def units(self) -> int:
        """Items of a tile over all heads."""
        return self.heads // self.tile_heads

    @property
    def programs(self) -> int:
        """Of a cluster: one, or two that read the same keys and values."""
        in_pairs = self.group // self.tile_heads % 2 == 0 and self.options.target.cores % 2 == 0
        return 2 if self.tuning.paired and in_pairs else 1

    @property
    def load_axis(self) -> str | None:
        """Axis of programs that load for each other; the interpreter does not know such copies."""
        return "pair" if self.programs > 1 and not self.options.target.interpret else None

    @property
    def pages_per_tile(self) -> int:
        """Copies per tile of keys."""
        return max(self.tuning.key_tile // self.shape.block_size, 1)

    def scratch(self) -> list[Any]:
        """Shared memory and barriers of a program."""
        head_dim, tuning = self.shape.head_dim, self.tuning
        tiled = swizzled(64, 2)

        def tiles(count: int, rows: int) -> Any:
            return plgpu.SMEM((count, rows, head_dim), jnp.bfloat16, transforms=tiled)

        queries = tiles(CONSUMERS, ROWS)
        staging = plgpu.SMEM((CONSUMERS, ROWS, head_dim), jnp.bfloat16)
        ring = tiles(tuning.stages, tuning.key_tile)
        loaded = plgpu.Barrier(num_arrivals=self.pages_per_tile, num_barriers=tuning.stages)
        freed: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.stages)
        if self.load_axis:
            freed = plgpu.ClusterBarrier(
                collective_axes=(self.load_axis,),
                num_arrivals=CONSUMERS,
                num_barriers=tuning.stages,
            )
        buffers = [plgpu.RefUnion(queries, staging)] if tuning.shared else [queries, staging]
        lse = [plgpu.SMEM((CONSUMERS, ROWS), jnp.float32)] if self.options.with_lse else []
        return [
            buffers,
            plgpu.SMEM((CONSUMERS, work.COLUMNS), jnp.int32),  # the item's row of the work list
            lse,
            [ring, ring],
            [loaded, loaded],
            [freed, freed],
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),  # queries and row loaded
            plgpu.Barrier(num_barriers=CONSUMERS),  # their buffers free
            plgpu.Barrier(num_barriers=CONSUMERS),  # turn to issue products
            plgpu.Barrier(num_arrivals=self.pages_per_tile),  # values of a ragged tile loaded
        ]


def for_each_item(
    plan: Plan, tiles: Any, body: Callable[[jax.Array, jax.Array, Any], Any], carry: Any
) -> Any:
    """Call body(tile, first query head, carry) for this program's items; returns the carry.

    Items lie in order of cost. Clusters take them there and back, so that whoever got the longest
    of one round gets the shortest of the next. The programs of a cluster take neighbours.
    """
    clusters = plan.options.target.cores // plan.programs
    cluster = lax.axis_index("cluster").astype(jnp.int32)
    among = lax.axis_index("pair").astype(jnp.int32)
    units = jnp.int32(plan.units // plan.programs)
    total = tiles[0, work.COUNT] * units

    def place(turn: jax.Array) -> jax.Array:
        return jnp.where(turn % 2 == 0, cluster, clusters - 1 - cluster)

    whole = lax.div(total, jnp.int32(clusters))
    turns = whole + (place(whole) < lax.rem(total, jnp.int32(clusters))).astype(jnp.int32)

    def step(turn: jax.Array, carry: Any) -> Any:
        item = turn * clusters + place(turn)
        unit = lax.rem(item, units) * plan.programs + among
        return body(lax.div(item, units), unit * plan.tile_heads, carry)

    return lax.fori_loop(jnp.int32(0), turns, step, carry)


def buffers_of(plan: Plan, buffers: Any) -> tuple[Any, Any]:
    """The queries' buffer and that of the output, which may be the same memory."""
    queries, staging = buffers[0] if plan.tuning.shared else buffers
    return queries, staging


def rows_of(plan: Plan, first: Any, first_head: Any, consumer: Any) -> tuple[Any, Any]:
    """First token (a multiple of ALIGN) and query head of a consumer's rows."""
    if plan.tile_heads == 1:
        return (first + consumer * (ROWS // work.ALIGN)) * work.ALIGN, first_head
    return first * work.ALIGN, first_head + consumer
