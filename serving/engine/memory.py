"""The engine's side of KV memory: who holds which blocks, and until which step."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from serving.engine.active import ActiveRequest
from serving.engine.executor import ExecutorLimits
from serving.errors import InternalError
from serving.kv.blocks import BlockAccounting, BlockAllocator, BlockState
from serving.kv.prefix_cache import PrefixCache


class KVMemory:
    """Blocks for requests, the prefix cache, and holds for plans that are still running.

    collected_step: the last plan whose result came back. A block that a later plan touches is in
    flight when its request lets go of it, until that plan comes back.
    """

    def __init__(self, limits: ExecutorLimits, *, prefix_caching: bool) -> None:
        self.block_size = limits.block_size
        self.collected_step = 0
        self._allocator = BlockAllocator(limits.num_blocks, limits.slots_per_block)
        self._cache = (
            PrefixCache(self._allocator, limits.block_size, limits.model_revision)
            if prefix_caching
            else None
        )
        self._held: dict[int, list[int]] = {}
        self._checked: tuple[object, ...] = ()  # the books when `check` last found them right

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return self._allocator.available

    @property
    def in_flight(self) -> int:
        """Blocks that can be taken once plans that are running come back."""
        return self._allocator.in_flight

    @property
    def caches_prefixes(self) -> bool:
        """Whether a waiting request may find blocks that others computed."""
        return self._cache is not None

    def accounting(self) -> BlockAccounting:
        """All blocks by state."""
        return self._allocator.accounting()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of so many tokens."""
        return -(-tokens // self.block_size)

    def match(self, request: ActiveRequest) -> list[int]:
        """Blocks of the longest cached prefix of the request's context."""
        if self._cache is None:
            return []
        self._cache.extend_chain(request.chain, request.tokens)
        return self._cache.match(request.chain, len(request.tokens))

    def available_beside(self, matched: Iterable[int]) -> int:
        """Blocks that can be taken once `matched` are shared."""
        cached = sum(self._allocator.state(block) is BlockState.CACHED for block in matched)
        return self._allocator.available - cached

    def in_flight_beside(self, matched: Iterable[int]) -> int:
        """Blocks in flight that do not belong to `matched`."""
        held = sum(self._allocator.state(block) is BlockState.IN_FLIGHT for block in matched)
        return self._allocator.in_flight - held

    def gain(self, blocks: Sequence[int], matched: Collection[int], let_go: Counter[int]) -> int:
        """Blocks nobody would use if one more request let go of these.

        let_go: references given up so far in this thought experiment; updated.
        """
        gained = 0
        for block in blocks:
            let_go[block] += 1
            if let_go[block] == self._allocator.references(block) and block not in matched:
                gained += 1
        return gained

    def take(self, count: int) -> list[int]:
        """Allocate blocks; callers looked at `available`."""
        return [self._allocator.allocate() for _ in range(count)]

    def share(self, blocks: Sequence[int]) -> None:
        """Reference blocks that `match` found."""
        if self._cache is not None:
            self._cache.share(blocks)

    def let_go(self, request: ActiveRequest) -> None:
        """Release all blocks of a request, leaves first; `last_step` is the last plan with them."""
        blocks = request.blocks[::-1]
        in_flight = request.last_step > self.collected_step
        if in_flight:
            self._held.setdefault(request.last_step, []).extend(blocks)
        self._allocator.release(blocks, in_flight=in_flight)
        request.blocks = []
        request.registered = 0

    def register(self, request: ActiveRequest, computed_tokens: int) -> None:
        """Tell the prefix cache which of the request's blocks are now computed as a whole."""
        if self._cache is None:
            return
        whole = computed_tokens // self.block_size
        if whole <= request.registered:
            return
        self._cache.extend_chain(request.chain, request.tokens)
        for index in range(request.registered, whole):
            self._cache.register(request.blocks[index], request.chain[index])
        request.registered = whole

    def next_check(self, request: ActiveRequest) -> int:
        """len(tokens) at which the next block of a decoding request is computed as a whole."""
        if self._cache is None:
            return request.end_len
        return (request.registered + 1) * self.block_size + 1

    def step_collected(self, step_id: int) -> None:
        """A plan came back: what only it still touched is free or cached now."""
        self.collected_step = step_id
        self._allocator.land(self._held.pop(step_id, ()))

    def any_held(self) -> bool:
        """Whether blocks wait for a plan to come back."""
        return bool(self._held)

    def check_idle(self) -> None:
        """Raises InternalError if an idle engine has blocks in use or in flight (invariant 3)."""
        books = self.accounting()
        if books.in_use or books.in_flight:
            raise InternalError(f"The engine is idle but blocks are not: {books}.")

    def check(self, holders: Iterable[ActiveRequest]) -> None:
        """Raises InternalError unless states, references and holds match the holders."""
        if any(step <= self.collected_step for step in self._held):
            raise InternalError("Blocks wait for a plan that has already come back.")
        holders = list(holders)
        # Most events leave blocks alone, and books that were right still are.
        picture = (
            self._allocator.picture(),
            None if self._cache is None else self._cache.picture(),
            [request.blocks.copy() for request in holders],
            {step: blocks.copy() for step, blocks in self._held.items()},
        )
        if picture == self._checked:
            return
        self._allocator.check()
        if self._cache is not None:
            self._cache.check()
        counted = [0] * self._allocator.num_blocks
        for request in holders:
            if len(set(request.blocks)) != len(request.blocks):
                raise InternalError(f"{request.request_id} has a block twice in its table.")
            for block in request.blocks:
                counted[block] += 1
        held = {block for blocks in self._held.values() for block in blocks}
        states, references = self._allocator.books()
        if counted != references:
            block = next(b for b, count in enumerate(counted) if count != references[b])
            raise InternalError(
                f"Block {block} has {references[block]} references but {counted[block]} requests "
                "hold it."
            )
        in_flight = [b for b, state in enumerate(states) if state is BlockState.IN_FLIGHT]
        if in_flight != sorted(block for block in held if not counted[block]):
            raise InternalError(f"Blocks {in_flight} are in flight against the plans that run.")
        self._checked = picture
