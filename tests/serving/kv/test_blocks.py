import random

import pytest

from serving.kv.blocks import BlockAccounting, BlockAllocator, BlockState, BlockStateError


def test_all_blocks_are_free_at_first():
    allocator = BlockAllocator(4, slots_per_block=6)
    books = allocator.accounting()
    assert (books.total, books.free, books.cached, books.in_use, books.in_flight) == (4, 4, 0, 0, 0)
    assert books.slots_per_block == 6
    allocator.check()


def test_allocation_order_is_the_smallest_free_id():
    allocator = BlockAllocator(4, 1)
    assert [allocator.allocate() for _ in range(3)] == [0, 1, 2]
    allocator.release([2, 0], in_flight=False)
    assert [allocator.allocate() for _ in range(3)] == [0, 2, 3]


def test_a_shared_block_stays_until_the_last_reference_goes():
    allocator = BlockAllocator(2, 1)
    block = allocator.allocate()
    allocator.keep(block)
    allocator.share(block)
    allocator.release([block], in_flight=False)
    assert allocator.state(block) is BlockState.IN_USE
    allocator.release([block], in_flight=False)
    assert allocator.state(block) is BlockState.CACHED
    allocator.check()


def test_released_blocks_stay_in_flight_until_they_land():
    allocator = BlockAllocator(2, 1)
    first, second = allocator.allocate(), allocator.allocate()
    allocator.keep(first)
    allocator.release([second, first], in_flight=True)
    assert allocator.available == 0
    assert allocator.in_flight == 2
    allocator.check()
    allocator.land([second, first])
    assert allocator.state(first) is BlockState.CACHED
    assert allocator.state(second) is BlockState.FREE
    allocator.check()


def test_a_kept_block_in_flight_can_be_shared_and_outlives_its_hold():
    allocator = BlockAllocator(1, 1)
    block = allocator.allocate()
    allocator.keep(block)
    allocator.release([block], in_flight=True)
    allocator.share(block)
    allocator.land([block])
    assert allocator.state(block) is BlockState.IN_USE
    allocator.check()


def test_every_hold_must_land():
    allocator = BlockAllocator(1, 1)
    block = allocator.allocate()
    allocator.keep(block)
    allocator.share(block)
    allocator.release([block], in_flight=True)
    allocator.release([block], in_flight=True)
    allocator.land([block])
    assert allocator.state(block) is BlockState.IN_FLIGHT
    allocator.land([block])
    assert allocator.state(block) is BlockState.CACHED


def test_eviction_takes_the_least_recently_released_and_tells():
    allocator = BlockAllocator(3, 1)
    evicted = []
    allocator.on_evict = evicted.append
    blocks = [allocator.allocate() for _ in range(3)]
    for block in blocks:
        allocator.keep(block)
    allocator.release([1, 0, 2], in_flight=False)
    allocator.share(1)  # used again, so it is the youngest afterwards
    allocator.release([1], in_flight=False)
    assert [allocator.allocate() for _ in range(3)] == [0, 2, 1]
    assert evicted == [0, 2, 1]
    assert not allocator.available
    allocator.check()


def test_illegal_moves_raise():
    allocator = BlockAllocator(2, 1)
    block = allocator.allocate()
    with pytest.raises(BlockStateError, match="nobody references"):
        allocator.release([1], in_flight=False)
    with pytest.raises(BlockStateError, match="was not in flight"):
        allocator.land([block])
    with pytest.raises(BlockStateError, match="holds nothing"):
        allocator.share(1)
    with pytest.raises(BlockStateError, match="holds nothing"):
        allocator.share(block)  # in use, but its contents are private
    with pytest.raises(BlockStateError, match="cannot be kept"):
        allocator.keep(1)
    with pytest.raises(BlockStateError, match="FREE to CACHED"):
        allocator._move(1, BlockState.CACHED)
    allocator.allocate()
    with pytest.raises(BlockStateError, match="none is free"):
        allocator.allocate()


def test_books_that_do_not_add_up_are_refused():
    with pytest.raises(BlockStateError, match="add up"):
        BlockAccounting(total=3, free=1, cached=1, in_use=0, in_flight=0, slots_per_block=1)


def test_check_finds_a_block_in_the_wrong_state():
    allocator = BlockAllocator(2, 1)
    allocator.allocate()
    allocator._references[0] = 0
    with pytest.raises(BlockStateError, match="against its counts"):
        allocator.check()


@pytest.mark.parametrize("seed", range(5))
def test_books_add_up_after_any_sequence(seed):
    rng = random.Random(seed)
    allocator = BlockAllocator(12, 3)
    references: list[int] = []
    holds: list[int] = []
    for _ in range(500):
        choice = rng.random()
        if choice < 0.4 and allocator.available:
            references.append(allocator.allocate())
        elif choice < 0.5 and references:
            allocator.keep(rng.choice(references))
        elif choice < 0.6 and references:
            block = rng.choice(references)
            if allocator._kept[block]:
                allocator.share(block)
                references.append(block)
        elif choice < 0.8 and references:
            block = references.pop(rng.randrange(len(references)))
            in_flight = rng.random() < 0.5
            allocator.release([block], in_flight=in_flight)
            if in_flight:
                holds.append(block)
        elif holds:
            allocator.land([holds.pop(rng.randrange(len(holds)))])
        allocator.check()
        books = allocator.accounting()
        assert books.in_use == len(set(references))
        assert books.in_flight == len(set(holds) - set(references))
