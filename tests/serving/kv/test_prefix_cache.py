import pytest

from serving.kv.blocks import BlockAllocator, BlockState, BlockStateError
from serving.kv.prefix_cache import PrefixCache

SIZE = 4


class Room:
    """An arena with a cache, and requests that compute their whole context at once."""

    def __init__(self, num_blocks=8, revision="r1"):
        self.allocator = BlockAllocator(num_blocks, 1)
        self.cache = PrefixCache(self.allocator, SIZE, revision)

    def chain(self, tokens):
        chain = []
        self.cache.extend_chain(chain, tokens)
        return chain

    def match(self, tokens):
        return self.cache.match(self.chain(tokens), len(tokens))

    def compute(self, tokens):
        """Blocks of a context: what is cached is shared, the rest computed and registered."""
        matched = self.match(tokens)
        self.cache.share(matched)
        total = -(-len(tokens) // SIZE)
        blocks = matched + [self.allocator.allocate() for _ in range(total - len(matched))]
        for block, key in list(zip(blocks, self.chain(tokens), strict=False))[len(matched) :]:
            self.cache.register(block, key)
        self.check()
        return blocks

    def drop(self, blocks):
        self.allocator.release(blocks[::-1], in_flight=False)
        self.check()

    def check(self):
        self.allocator.check()
        self.cache.check()


def test_keys_depend_on_every_token_before_and_on_the_revision():
    room = Room()
    chain = room.chain(range(12))
    assert len(chain) == 3
    assert room.chain(range(14)) == chain  # the last block is not whole
    other = room.chain([99, *range(1, 12)])
    assert all(a != b for a, b in zip(chain, other, strict=True))
    assert Room(revision="r2").chain(range(12))[0] != chain[0]


def test_a_chain_grows_as_if_made_at_once():
    room = Room()
    chain = []
    for end in (3, 4, 9, 9, 16):
        room.cache.extend_chain(chain, list(range(end)))
    assert chain == room.chain(range(16))


def test_the_longest_prefix_of_whole_blocks_is_found():
    room = Room()
    blocks = room.compute(list(range(11)))
    room.drop(blocks)
    assert room.match([*range(10), 77, 78, 79]) == blocks[:2]
    assert room.match([*range(5), 99, 99, 99, 99]) == blocks[:1]
    assert room.match([5, *range(1, 12)]) == []


def test_at_least_one_token_is_left_to_compute():
    room = Room()
    blocks = room.compute(list(range(8)))
    assert room.match(list(range(8))) == blocks[:1]
    assert room.match(list(range(9))) == blocks[:2]
    assert room.match([0]) == []


def test_another_revision_shares_nothing():
    room = Room()
    room.compute(list(range(8)))
    stranger = []
    PrefixCache(BlockAllocator(1, 1), SIZE, "r2").extend_chain(stranger, list(range(8)))
    assert room.cache.match(stranger, 100) == []


def test_blocks_in_use_are_shared():
    room = Room()
    first = room.compute(list(range(9)))
    second = room.compute(list(range(9)))
    assert second[:2] == first[:2]
    assert room.allocator.references(first[0]) == 2
    room.drop(first)
    room.drop(second)
    assert room.allocator.accounting().cached == 2


def test_a_duplicate_stays_private_and_becomes_free():
    room = Room()
    one, other = room.allocator.allocate(), room.allocator.allocate()
    key = room.chain(range(4))[0]
    assert room.cache.register(one, key)
    assert not room.cache.register(other, key)
    room.drop([other])
    assert room.allocator.state(other) is BlockState.FREE
    room.drop([one])
    assert room.allocator.state(one) is BlockState.CACHED


def test_one_block_cannot_have_two_keys():
    room = Room()
    block = room.allocator.allocate()
    first, second = room.chain(range(8))
    room.cache.register(block, first)
    with pytest.raises(BlockStateError, match="registered twice"):
        room.cache.register(block, second)


def test_leaves_are_evicted_first_and_old_chains_before_young_ones():
    room = Room(num_blocks=6)
    old = room.compute([1] * 12)
    young = room.compute([2] * 12)
    room.drop(old)
    room.drop(young)
    order = []
    forget = room.allocator.on_evict
    room.allocator.on_evict = lambda block: (order.append(block), forget(block))
    for _ in range(6):
        room.allocator.allocate()
    assert order == old[::-1] + young[::-1]
    assert len(room.cache) == 0
    room.check()


def test_use_makes_young():
    room = Room(num_blocks=4)
    first = room.compute([1] * 8)
    room.drop(first)
    second = room.compute([2] * 8)
    room.drop(second)
    # The oldest chain is used again; its third block costs the other chain its leaf.
    room.drop(room.compute([1] * 8 + [3]))
    assert room.match([1] * 9) == first
    assert room.match([2] * 9) == second[:1]
