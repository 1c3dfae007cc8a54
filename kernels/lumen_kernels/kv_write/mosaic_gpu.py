"""KV write on NVIDIA Hopper (Pallas Mosaic GPU): rows through shared memory, by TMA.

A group of four warps, of which one thread issues, loads the rows of a few neighbouring tokens
into shared memory, stores each token's heads as one strided box, K and V apart, and ends; no
thread touches the data. As many groups as fit share a core, and the hardware hands out the next.
(A persistent grid of rings was level for 8,192 tokens on an H100.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.target import Target

_MAX_BOX = 256
"""Elements a TMA box may have along one dimension."""

_GROUP_TOKENS = 4  # 8 are level at 2,048 tokens, 2 and 8 at 8,192 (H100)
_GROUP_BYTES = 98_304  # of shared memory: two groups share a core


def supports(shape: ArenaShape, heads: int, dtype: jnp.dtype) -> bool:
    """Whether this kernel can write such an arena."""
    row = shape.page_shape[2]
    boxes = row % 128 == 0 and row <= _MAX_BOX >= heads and dtype.itemsize in (2, 4)
    return boxes and 2 * heads * shape.head_dim * dtype.itemsize <= _GROUP_BYTES


def write(
    k: jax.Array,
    v: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.kv_write.write`; layer_offset int32."""
    tokens, heads, head_dim = k.shape
    # Few tokens are spread over the cores: then the time is that of one load and one store.
    fitting = _GROUP_BYTES // (2 * heads * head_dim * k.dtype.itemsize)
    group_tokens = 1 if tokens <= target.cores else min(_GROUP_TOKENS, fitting)

    def body(
        k_ref: Any, v_ref: Any, slots_ref: Any, offsets_ref: Any, layer_ref: Any, *rest: Any
    ) -> None:
        *segments, k_rows, v_rows, arrived = rest
        first = lax.axis_index("group") * group_tokens
        # Rows past the end come as zeros, and are not stored.
        plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(first, group_tokens)], k_rows, arrived)
        plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(first, group_tokens)], v_rows, arrived)
        # All places are read before the first wait, so that it is one wait for everything.
        places = []
        for index in range(group_tokens):
            token = jnp.minimum(first + index, tokens - 1)
            slot = slots_ref[token]
            stored = (slot >= 0) & (first + index < tokens)
            places.append((stored, slot + layer_ref[0], offsets_ref[token]))
        plgpu.barrier_wait(arrived)
        for index, (stored, slot, offset) in enumerate(places):
            for segment, begin, size in zip(segments, shape.first_slots, shape.slots, strict=True):

                @pl.when(stored & (slot >= begin) & (slot < begin + size))
                def _(
                    segment: Any = segment,
                    slot: jax.Array = slot - begin,
                    offset: jax.Array = offset,
                    index: int = index,
                ) -> None:
                    k_place, v_place = rows_at(segment, slot, offset)
                    plgpu.copy_smem_to_gmem(k_rows.at[index], k_place, commit_group=False)
                    plgpu.copy_smem_to_gmem(v_rows.at[index], v_place, commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def rows_at(segment: Any, slot: jax.Array, offset: jax.Array) -> tuple[Any, Any]:
        """K and V of every head, as [heads, head_dim]."""
        some = pl.ds(slot, heads)
        if not shape.packed:
            return segment.at[some, 0, offset], segment.at[some, 1, offset]
        return (
            segment.at[some, 0, offset, pl.ds(0, head_dim)],
            segment.at[some, 0, offset, pl.ds(head_dim, head_dim)],
        )

    rows = plgpu.SMEM((group_tokens, heads, head_dim), k.dtype)
    refs = [jax.new_ref(segment) for segment in arena]
    plgpu.kernel(
        body,
        scratch_types=(rows, rows, plgpu.Barrier(num_arrivals=2)),
        grid=(pl.cdiv(tokens, group_tokens),),
        grid_names=("group",),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
        kernel_name="kv_write",
    )(k, v, slots, offsets, layer_offset.reshape(1), *refs)
    return tuple(jax.freeze(ref) for ref in refs)
