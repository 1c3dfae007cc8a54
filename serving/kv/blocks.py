"""The block allocator: every block of the arena is in exactly one state, always.

A block is `slots_per_block` consecutive slots (one per layer and KV head held), so what holds for
blocks here holds for the slots of invariant 3.
"""

import enum
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from serving.errors import InternalError


class BlockState(enum.IntEnum):
    """What a block is to the arena.

    FREE: holds nothing. CACHED: no request uses it, its KV is known to the prefix cache and may
    be evicted. IN_USE: at least one request references it. IN_FLIGHT: no request references it,
    but work submitted to the device (or a transfer) may still touch it.
    """

    FREE = 0
    CACHED = 1
    IN_USE = 2
    IN_FLIGHT = 3


_LEGAL_MOVES = frozenset(
    {
        (BlockState.FREE, BlockState.IN_USE),
        (BlockState.CACHED, BlockState.IN_USE),
        (BlockState.CACHED, BlockState.FREE),
        (BlockState.IN_USE, BlockState.FREE),
        (BlockState.IN_USE, BlockState.CACHED),
        (BlockState.IN_USE, BlockState.IN_FLIGHT),
        (BlockState.IN_FLIGHT, BlockState.FREE),
        (BlockState.IN_FLIGHT, BlockState.CACHED),
        (BlockState.IN_FLIGHT, BlockState.IN_USE),
    }
)


class BlockStateError(InternalError):
    """A block was asked to make an illegal transition, or the books do not add up."""


@dataclass(frozen=True, slots=True)
class BlockAccounting:
    """Blocks by state; the states add up to `total`. Times `slots_per_block` these are slots."""

    total: int
    free: int
    cached: int
    in_use: int
    in_flight: int
    slots_per_block: int

    def __post_init__(self) -> None:
        """Raise BlockStateError if the states do not add up (invariant 3)."""
        if self.free + self.cached + self.in_use + self.in_flight != self.total:
            raise BlockStateError(f"Blocks by state do not add up to the total: {self}.")


class BlockAllocator:
    """States, reference counts and holds of all blocks.

    A *reference* is a request that uses the block (several, when they share a prefix). A *hold*
    is submitted work that outlives a reference. The order of allocation is deterministic: the
    free block with the smallest id, else the least recently used cached one.
    """

    def __init__(self, num_blocks: int, slots_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.slots_per_block = slots_per_block
        self.on_evict: Callable[[int], None] = _nobody_to_tell
        self._states = [BlockState.FREE] * num_blocks
        self._counts = [num_blocks, 0, 0, 0]
        self._references = [0] * num_blocks
        self._holds = [0] * num_blocks
        self._kept = [False] * num_blocks
        self._free = list(range(num_blocks))  # a heap
        self._cached: dict[int, None] = {}  # insertion order is least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: the free and the cached ones."""
        return self._counts[BlockState.FREE] + self._counts[BlockState.CACHED]

    @property
    def in_flight(self) -> int:
        """Blocks that become available when the work that touches them ends."""
        return self._counts[BlockState.IN_FLIGHT]

    def state(self, block: int) -> BlockState:
        """The state of one block."""
        return self._states[block]

    def references(self, block: int) -> int:
        """How many requests use the block."""
        return self._references[block]

    def books(self) -> tuple[Sequence[BlockState], Sequence[int]]:
        """States and references of all blocks, by block; to look at."""
        return self._states, self._references

    def picture(self) -> tuple[object, ...]:
        """A copy of all books: `check` is decided by what is in it."""
        return (
            self._states.copy(),
            self._references.copy(),
            self._holds.copy(),
            self._kept.copy(),
            self._counts.copy(),
            self._free.copy(),
            self._cached.copy(),
        )

    def accounting(self) -> BlockAccounting:
        """All blocks by state."""
        free, cached, in_use, in_flight = self._counts
        return BlockAccounting(
            self.num_blocks, free, cached, in_use, in_flight, self.slots_per_block
        )

    def allocate(self) -> int:
        """A block with one reference; evicts the least recently used cached block if none is free.

        Raises BlockStateError if nothing is available: callers look at `available` first.
        """
        if not self._free:
            if not self._cached:
                raise BlockStateError("A block was asked for, but none is free or cached.")
            self._evict(next(iter(self._cached)))
        block = heapq.heappop(self._free)
        self._references[block] = 1
        self._move(block, BlockState.IN_USE)
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that holds KV: cached, in use, or in flight and kept."""
        state = self._states[block]
        if state is BlockState.FREE or not self._kept[block]:
            raise BlockStateError(f"Block {block} ({state.name}) holds nothing that can be shared.")
        self._references[block] += 1
        if state is not BlockState.IN_USE:
            self._move(block, BlockState.IN_USE)

    def keep(self, block: int) -> None:
        """From now on the block becomes cached, not free, when nothing uses it any more."""
        if self._references[block] == 0 and self._holds[block] == 0:
            raise BlockStateError(
                f"Block {block} ({self._states[block].name}) is not in use, so its contents "
                "cannot be kept."
            )
        self._kept[block] = True

    def release(self, blocks: Iterable[int], *, in_flight: bool) -> None:
        """Drop one reference to each block, in the order given (leaves of a prefix first).

        in_flight: submitted work still touches the blocks; each gets a hold until `land`.
        """
        for block in blocks:
            if self._references[block] == 0:
                raise BlockStateError(f"Block {block} was released but nobody references it.")
            self._references[block] -= 1
            if in_flight:
                self._holds[block] += 1
            self._settle(block)

    def land(self, blocks: Iterable[int]) -> None:
        """End one hold on each block: the work that touched them has ended."""
        for block in blocks:
            if self._holds[block] == 0:
                raise BlockStateError(f"Block {block} landed but was not in flight.")
            self._holds[block] -= 1
            self._settle(block)

    def check(self) -> None:
        """Recount everything. Raises BlockStateError if the books disagree with themselves."""
        # The simulator does this after every event, so whole lists are compared.
        free, cached, in_use, in_flight = BlockState
        states = self._states
        expected = [
            in_use if references else in_flight if holds else cached if kept else free
            for references, holds, kept in zip(
                self._references, self._holds, self._kept, strict=True
            )
        ]
        if states != expected:
            block = next(b for b, state in enumerate(states) if state is not expected[b])
            raise BlockStateError(
                f"Block {block} is {states[block].name} against its counts; references, holds and "
                f"whether it is kept ask for {expected[block].name}."
            )
        counts = [states.count(state) for state in BlockState]
        if counts != self._counts:
            raise BlockStateError(f"Blocks by state are {counts}, the books say {self._counts}.")
        if sorted(self._cached) != [b for b, state in enumerate(states) if state is cached]:
            raise BlockStateError("The eviction order differs from the cached blocks.")
        if sorted(self._free) != [b for b, state in enumerate(states) if state is free]:
            raise BlockStateError("The free list differs from the free blocks.")
        self.accounting()

    def _state_by_counts(self, block: int, idle: BlockState) -> BlockState:
        if self._references[block]:
            return BlockState.IN_USE
        if self._holds[block]:
            return BlockState.IN_FLIGHT
        return idle if idle in (BlockState.FREE, BlockState.CACHED) else BlockState.FREE

    def _settle(self, block: int) -> None:
        """Move to the state that references and holds ask for, if that is another one."""
        idle = BlockState.CACHED if self._kept[block] else BlockState.FREE
        target = self._state_by_counts(block, idle)
        if target is not self._states[block]:
            self._move(block, target)

    def _evict(self, block: int) -> None:
        self._kept[block] = False
        self._move(block, BlockState.FREE)
        self.on_evict(block)

    def _move(self, block: int, to: BlockState) -> None:
        """The one place where a block changes its state."""
        state = self._states[block]
        if (state, to) not in _LEGAL_MOVES:
            raise BlockStateError(f"Block {block} cannot go from {state.name} to {to.name}.")
        if state is BlockState.CACHED:
            del self._cached[block]
        if to is BlockState.CACHED:
            self._cached[block] = None
        elif to is BlockState.FREE:
            heapq.heappush(self._free, block)
        self._counts[state] -= 1
        self._counts[to] += 1
        self._states[block] = to


def _nobody_to_tell(_block: int) -> None:
    """Without a prefix cache nothing is ever kept, so nothing is evicted."""
