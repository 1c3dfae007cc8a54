"""What a plan has the device do: which sizes of batches and calls, and how much KV they read."""

from bisect import bisect_left

from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.mixed_call import mixed_size_of
from serving.engine.device.prefill_calls import CallSize, pack_chunks
from serving.engine.plan import PrefillChunk, StepPlan
from serving.sim.cost_model import CallWork, StepWork, attention_pairs


class PlanWork:
    """Turns plans into the work of a device executor of these settings."""

    def __init__(self, config: DeviceExecutorConfig) -> None:
        self._buckets = config.decode_buckets
        self._mixed_sizes = config.mixed_sizes
        self._call_sizes = [CallSize(*size) for size in config.chunk_buckets.items()]

    def __call__(self, plan: StepPlan, context: int) -> StepWork:
        """The plan's work; context: KV tokens of its decode rows before it."""
        decoding = plan.decode_rows.size
        rows = self._buckets[bisect_left(self._buckets, decoding)] if decoding else 0
        mixed = mixed_size_of(plan, self._mixed_sizes)
        if mixed is not None:
            call = CallWork(mixed.tokens, _pairs(plan.prefills))
            return StepWork(rows, decoding, context, mixed=call)
        calls = tuple(
            CallWork(call.size.tokens, _pairs(call.chunks))
            for call in pack_chunks(plan.prefills, self._call_sizes)
        )
        return StepWork(rows, decoding, context, plan.steps, calls)


def _pairs(chunks: tuple[PrefillChunk, ...]) -> int:
    return sum(attention_pairs(chunk.start, chunk.tokens.size) for chunk in chunks)
