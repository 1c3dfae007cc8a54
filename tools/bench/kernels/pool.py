"""A KV arena as large as a deployment's, and ways to look into it without copying it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from lumen_kernels.arena import slot_shape
from lumen_kernels.target import Target

from tools.bench.kernels.case import DoesNotFitError, WrongResultError
from tools.bench.kernels.sizes import Model

Ints = npt.NDArray[np.int64]
Arena = tuple[jax.Array, ...]

_PARTS = 64  # filled one after another: random bits of the whole arena would not fit beside it
_NOWHERE = (-1, 2**30)  # what table columns past a row's end hold


class KvPool:
    """One segment of random bfloat16 K and V. Heads of 64 (packed slots) are not covered.

    Operations donate `arena` and put back what they return. Random access over all of it is what
    serving does; a small arena would flatter the TLB and the L2.
    """

    def __init__(self, model: Model, block_size: int, size_bytes: float, target: Target) -> None:
        self.model = model
        self.block_size = block_size
        self._page = slot_shape(block_size, model.head_dim, target)
        slot_bytes = 2 * math.prod(self._page)
        blocks = int(size_bytes // (slot_bytes * model.slots_per_block))
        self.blocks = max(blocks // _PARTS, 1) * _PARTS
        self.bytes = self.blocks * model.slots_per_block * slot_bytes
        self.block_bytes = model.slots_per_block * slot_bytes
        self.arena: Arena = ()

    @property
    def struct(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape of `arena`, allocated or not."""
        slots = self.blocks * self.model.slots_per_block
        return (jax.ShapeDtypeStruct((slots, *self._page), jnp.bfloat16),)

    def fill(self) -> None:
        """Allocate with random contents; again: where an operation lost or spoiled the arena."""
        self.release()
        self.arena = (_filled(self.struct[0].shape),)

    def release(self) -> None:
        """Give the memory back."""
        for segment in self.arena:
            if not segment.is_deleted():
                segment.delete()
        self.arena = ()

    def bases(self, random: np.random.Generator, count: int, layers: int | None = None) -> Ints:
        """Bases of `count` distinct random blocks, each of so many layers (all by default)."""
        stride = (layers or self.model.layers) * self.model.kv_heads
        blocks = self.blocks * self.model.slots_per_block // stride
        if count > blocks:
            raise DoesNotFitError(
                f"needs {count} blocks of {self.block_size} tokens; the arena has {blocks}"
            )
        return random.permutation(blocks)[:count] * stride

    def layers_for(self, blocks: int) -> int:
        """Layers that so many distinct blocks can have: all, or as many as fit, a power of two.

        A batch whose context exceeds the arena is measured as if the model had fewer layers.
        """
        layers = self.model.layers
        while layers > 1 and blocks * layers > self.blocks * self.model.layers:
            layers //= 2
        return layers

    def tables(
        self, random: np.random.Generator, lengths: Ints, columns: int, layers: int
    ) -> npt.NDArray[np.int32]:
        """A block table [rows, columns] of distinct random blocks, garbage past a row's end."""
        used = -(-lengths // self.block_size)
        table = np.tile(_NOWHERE, (len(lengths), columns // 2 + 1))[:, :columns]
        bases = self.bases(random, int(used.sum()), layers)
        table[np.arange(columns) < used[:, None]] = bases
        return table.astype(np.int32)

    def slots(self, bases: Ints, offsets: Ints) -> Ints:
        """Slots of these blocks [n] at these layer offsets [layers], for all heads, flat."""
        heads = np.arange(self.model.kv_heads)
        found: Ints = (bases[:, None, None] + offsets[:, None] + heads).ravel()
        return found

    def tokens(self, bases: Ints, offsets: Ints, layer_offset: int) -> tuple[Any, Any]:
        """K and V [n, kv_heads, head_dim], bfloat16, of tokens at `offsets` of blocks `bases`."""
        slots = bases[:, None] + layer_offset + np.arange(self.model.kv_heads)
        rows = self._rows(slots, offsets)
        padded = np.zeros(1 << (rows.size - 1).bit_length(), np.int32)  # few shapes to compile
        padded[: rows.size] = rows.ravel()
        read = np.asarray(_read(self.arena[0], padded))[: rows.size]
        pairs = read.reshape(*rows.shape, -1)
        return pairs[:, :, 0], pairs[:, :, 1]

    def poison(self, tables: npt.NDArray[np.int32], lengths: Ints, layers: int) -> None:
        """NaN into what lies behind the last token of each row in its last block."""
        last = np.repeat(np.arange(len(lengths)), self.block_size)
        offsets = np.tile(np.arange(self.block_size), len(lengths))
        behind = (offsets > ((lengths - 1) % self.block_size)[last]) & (lengths > 0)[last]
        last, offsets = last[behind], offsets[behind]
        if not last.size:
            return
        bases = tables[last, (lengths[last] - 1) // self.block_size].astype(np.int64)
        heads = np.arange(layers * self.model.kv_heads)
        rows = self._rows(bases[:, None] + heads, offsets)
        self.arena = (_poisoned(self.arena[0], rows.astype(np.int32).ravel()),)

    def _rows(self, slots: Ints, offsets: Ints) -> Ints:
        """Rows of head_dim [n, heads, 2] of tokens in slots [n, heads] at offsets [n]: K, V."""
        first = slots * 2 * self.block_size + offsets[:, None]
        rows: Ints = np.stack([first, first + self.block_size], axis=-1)
        return rows

    def fingerprint(self) -> npt.NDArray[np.uint32]:
        """One number per slot that changes with any bit of it, and with any move inside it."""
        return np.asarray(_fingerprint(self.arena[0]))

    def require_only_written(self, before: npt.NDArray[np.uint32], slots: Ints) -> None:
        """Raises WrongResultError if a slot changed since `before` that is none of `slots`."""
        changed = np.flatnonzero(self.fingerprint() != before)
        strange = np.setdiff1d(changed, slots)
        if strange.size:
            raise WrongResultError(
                f"{strange.size} slots changed that were not to be written, first {strange[0]}"
            )


@functools.partial(jax.jit, static_argnums=0)
def _filled(shape: tuple[int, ...]) -> jax.Array:
    part = shape[0] // _PARTS

    def fill(index: jax.Array, arena: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), index)
        # Of variance 1, as scores want it; uniform, because that needs the fewest bits.
        random = jax.random.uniform(key, (part, *shape[1:]), jnp.bfloat16, -1.73, 1.73)
        return lax.dynamic_update_slice_in_dim(arena, random, index * part, axis=0)

    filled: jax.Array = lax.fori_loop(0, _PARTS, fill, jnp.zeros(shape, jnp.bfloat16))
    return filled


@jax.jit
def _read(arena: jax.Array, rows: jax.Array) -> jax.Array:
    # Through the flat view: a gather over two dimensions of the arena may transpose all of it.
    return arena.reshape(-1, arena.shape[-1]).at[rows].get(mode="promise_in_bounds")


@functools.partial(jax.jit, donate_argnums=0)
def _poisoned(arena: jax.Array, rows: jax.Array) -> jax.Array:
    flat = arena.reshape(-1, arena.shape[-1])
    flat = flat.at[rows].set(jnp.nan, mode="promise_in_bounds", unique_indices=True)
    return flat.reshape(arena.shape)


@jax.jit
def _fingerprint(arena: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(arena, jnp.uint16).astype(jnp.uint32)
    place = lax.iota(jnp.uint32, math.prod(arena.shape[1:])).reshape(arena.shape[1:])
    return jnp.sum(bits * (2 * place + 1), axis=(1, 2, 3), dtype=jnp.uint32)
