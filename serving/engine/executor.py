"""The executor seam: the engine plans, an executor runs.

`DeviceExecutor` (JAX) and `ModelledExecutor` (virtual time) implement it. Moves of blocks and
weights join this seam with migration and elastic weights.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serving.engine.plan import StepPlan, StepResult


class MixedSize(NamedTuple):
    """What one call takes at most that runs decode rows and prompt chunks together.

    tokens: in all, of which the first `rows` are kept for decode rows. rows: that draw a token:
    decode rows and those whose prompts end. sequences: that chunks belong to.
    """

    tokens: int
    rows: int
    sequences: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all chunks."""
        return self.tokens - self.rows


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """What plans may ask of an executor.

    num_rows: batch rows. num_blocks, slots_per_block: the arena. block_size: tokens per block.
    max_model_len: tokens of prompt and output together; a row's table has
    ceil(max_model_len / block_size) columns. max_prefill_tokens: tokens of one chunk, and of all
    chunks that it runs in one call. max_prefills: chunks of one plan. max_logprobs: most
    alternatives per token.
    model_revision: identifies weights and numerics for the prefix cache. mixed_sizes: ascending; a
    plan that fits one costs one pass over the weights, any other two or more if it has both decode
    rows and chunks.
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
    mixed_sizes: tuple[MixedSize, ...] = ()

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
