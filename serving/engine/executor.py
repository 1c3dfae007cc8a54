"""The executor seam: the engine plans, an executor runs.

`DeviceExecutor` (JAX) and `ModelledExecutor` (virtual time) implement it. Moves of blocks and
weights join this seam with migration and elastic weights.
"""

from dataclasses import dataclass
from typing import Protocol

from serving.engine.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """What plans may ask of an executor.

    num_rows: batch rows. num_blocks, slots_per_block: the arena. block_size: tokens per block.
    max_model_len: tokens of prompt and output together; a row's table has
    ceil(max_model_len / block_size) columns. max_prefill_tokens: tokens of one chunk, and of all
    chunks that it runs in one call. max_prefills: chunks of one plan. max_logprobs: most
    alternatives per token.
    model_revision: identifies weights and numerics for the prefix cache.
    """

    num_rows: int
    num_blocks: int
    slots_per_block: int
    block_size: int
    max_model_len: int
    max_prefill_tokens: int
    max_prefills: int
    vocab_size: int
    max_logprobs: int
    model_revision: str

    @property
    def max_blocks_per_row(self) -> int:
        """Columns of the block table."""
        return -(-self.max_model_len // self.block_size)


class Executor(Protocol):
    """Runs plans in the order submitted. One thread calls `submit` and `collect`."""

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Dispatch the plan and return without waiting for the device."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest plan not yet collected.

        A failure comes back as `StepResult.error`, never as an exception.
        """
        ...

    def interrupt(self) -> None:
        """End the current multi-step plan after its step in flight. Any thread may call this."""
        ...
