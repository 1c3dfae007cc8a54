"""The prefix cache: finds blocks whose KV was computed for the same tokens before.

A block is named by a chain of hashes over all tokens up to its end and over the model revision,
so equal keys mean equal KV. Blocks keep their key while requests use them and afterwards, until
the allocator evicts them, least recently used first. A request releases its blocks last to
first, so the leaves of a chain are evicted before what leads to them.
"""

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

from serving.kv.blocks import BlockAllocator, BlockState, BlockStateError

# Longer than collisions by accident need: prompts come from strangers, and a crafted collision
# would show one client the KV of another.
_KEY_BYTES = 32


class PrefixCache:
    """Keys of computed blocks. It holds no references: the allocator's states decide."""

    def __init__(self, allocator: BlockAllocator, block_size: int, model_revision: str) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._root = blake2b(model_revision.encode(), digest_size=_KEY_BYTES).digest()
        self._packed = Struct(f"<{block_size}i")
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        allocator.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._block_of)

    def extend_chain(self, chain: list[bytes], tokens: Sequence[int]) -> None:
        """Append the keys of all whole blocks of `tokens` that `chain` does not name yet.

        chain[i] is the key of tokens[i * block_size : (i + 1) * block_size] after all before it.
        """
        size = self._block_size
        known = len(chain)
        whole = len(tokens) // size
        if whole <= known:
            return
        parent = chain[-1] if chain else self._root
        for start in range(known * size, whole * size, size):
            block_hash = blake2b(parent, digest_size=_KEY_BYTES)
            block_hash.update(self._packed.pack(*tokens[start : start + size]))
            parent = block_hash.digest()
            chain.append(parent)

    def match(self, chain: Sequence[bytes], context_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix, never the whole context.

        At least one token is left to compute, since its output is what the next token is drawn
        from. The caller references the blocks with `share` before it allocates anything.
        """
        blocks: list[int] = []
        for key in chain[: max(context_tokens - 1, 0) // self._block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Reference blocks that `match` found."""
        for block in blocks:
            self._allocator.share(block)

    def register(self, block: int, key: bytes) -> bool:
        """Name a block whose KV has been computed, that is whose step has completed.

        False if another block already has this key: two requests computed the same prefix at
        the same time. Then this one stays private and becomes free when it is released.
        """
        if key in self._block_of:
            return False
        if block in self._key_of:
            raise BlockStateError(f"Block {block} was registered twice under different keys.")
        self._allocator.keep(block)
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def picture(self) -> tuple[object, ...]:
        """A copy of all keys: `check` is decided by what is in it and in the allocator's."""
        return self._block_of.copy(), self._key_of.copy()

    def check(self) -> None:
        """Raises BlockStateError unless keys and blocks agree, and every cached block has a key."""
        if dict(zip(self._block_of.values(), self._block_of, strict=True)) != self._key_of:
            raise BlockStateError("The prefix cache's keys and blocks do not name each other.")
        states = list(map(self._allocator.state, self._key_of))
        if BlockState.FREE in states:
            block = list(self._key_of)[states.index(BlockState.FREE)]
            raise BlockStateError(f"Block {block} is free but still in the prefix cache.")
        cached = self._allocator.accounting().cached
        idle = states.count(BlockState.CACHED)
        if cached != idle:
            raise BlockStateError(f"{cached} blocks are cached but only {idle} have a key.")

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
