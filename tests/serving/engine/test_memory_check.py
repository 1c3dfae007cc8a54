"""The recount of blocks is left out only where nothing changed since the books were right."""

import pytest

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import AddRequest, PlanStep
from serving.engine.executor import ExecutorLimits
from serving.engine.request import EngineRequest, SamplingParams
from serving.errors import InternalError
from serving.kv.blocks import BlockAllocator

LIMITS = ExecutorLimits(
    num_rows=2, num_blocks=8, slots_per_block=1, block_size=4, max_model_len=32,
    max_prefill_tokens=16, max_prefills=2, vocab_size=97, max_logprobs=0, model_revision="r",
)  # fmt: skip


@pytest.fixture
def core():
    """An engine with one request of three blocks on its way, looked over once."""
    core = EngineCore(LIMITS, EngineConfig())
    request = EngineRequest("r", 1, tuple(range(10)), SamplingParams(max_tokens=8))
    core.handle(AddRequest(request), 0.0)
    core.handle(PlanStep(), 0.0)
    core.check_invariants()
    return core


def spoil(core, what):
    memory = core._memory
    allocator, request = memory._allocator, core._batch.requests[0]
    match what:
        case "state":
            allocator._states[1], allocator._states[7] = allocator._states[7], allocator._states[1]
        case "reference":
            allocator._references[request.blocks[0]] += 1
        case "hold":
            allocator._holds[7] += 1
        case "kept":
            allocator._kept[7] = True
        case "counts":
            allocator._counts[0] -= 1
        case "free list":
            allocator._free.pop()
        case "eviction order":
            allocator._cached[7] = None
        case "key":
            memory._cache._block_of[b"key"] = request.blocks[0]
        case "block of a key":
            memory._cache._key_of[request.blocks[0]] = b"key"
        case "free block of a key":
            memory._cache._key_of[7], memory._cache._block_of[b"key"] = b"key", 7
        case "block twice":
            request.blocks[1] = request.blocks[0]
        case "plan that is back":
            memory._held[0] = []


SPOILT = (
    "state", "reference", "hold", "kept", "counts", "free list", "eviction order", "key",
    "block of a key", "free block of a key", "block twice", "plan that is back",
)  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_whatever_is_spoilt_is_noticed_after_a_good_check(core, what):
    spoil(core, what)
    for _ in range(2):
        with pytest.raises(InternalError):
            core.check_invariants()


def test_books_are_recounted_only_when_they_changed(core, monkeypatch):
    recounts = []
    check = BlockAllocator.check
    monkeypatch.setattr(BlockAllocator, "check", lambda self: (recounts.append(self), check(self)))
    core.check_invariants()
    assert not recounts
    request = core._batch.requests[0]
    core._batch.grow(request, 1)
    core._memory.check([request])
    core._memory.check([request])
    assert len(recounts) == 1
