"""Settings of one replica's engine."""

from dataclasses import dataclass

from serving.engine.executor import ExecutorLimits
from serving.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine batches.

    eos_token_ids: the model's own end tokens.
    replica: the replica's number in its worker, for load reports.
    pipeline_depth: plans submitted at a time. 1: plain; 2: step n+1 is planned and submitted
        while step n runs.
    decode_steps: decode steps of one plan when nothing waits; more than 1 delays what arrives by
        up to one device step and saves returns to the host.
    max_step_tokens: token budget of a step, decodes first. None: every row and one whole prefill
        call of the executor, which several prompts share.
    spread_steps: while interactive requests decode, a step prefills that part of all prompt tokens
        not yet computed, so that a few prompts do not hold it up and many still go through at full
        speed; 1: as many as the budget takes, which it always does beside requests of class batch.
    min_prefill_tokens: but at least so many, if they are there and the budget takes them, or what
        a mixed call of so many tokens has room for beside its rows: smaller
        calls of a model that streams its weights cost more per token.
    prefill_first: where only requests of class batch decode, they wait while prompts fill whole
        prefill calls: a decode step streams the weights once for however many rows there are.
    watermark: share of the blocks that stays available when a request is admitted beside others,
        so that it is not preempted right away by their growth.
    prefix_caching: reuse the KV of equal prefixes.
    publish_every: tokens of one output, the first and the last ones of a request excepted, which
        never wait, and those with log-probabilities; more than 1 where nobody looks at each token.
    """

    eos_token_ids: tuple[int, ...] = ()
    replica: int = 0
    pipeline_depth: int = 2
    decode_steps: int = 1
    max_step_tokens: int | None = None
    spread_steps: int = 32
    min_prefill_tokens: int = 256
    prefill_first: bool = True
    watermark: float = 0.01
    prefix_caching: bool = True
    publish_every: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigurationError."""
        if self.pipeline_depth not in (1, 2):
            raise ConfigurationError(
                f"pipeline_depth is {self.pipeline_depth}; it must be 1 (plain) or 2 (overlapped)."
            )
        if self.decode_steps < 1:
            raise ConfigurationError(
                f"decode_steps is {self.decode_steps}; it must be 1 or more steps per plan."
            )
        for name in ("spread_steps", "min_prefill_tokens", "publish_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.publish_every > 1 and self.decode_steps > 1:
            raise ConfigurationError(
                f"publish_every is {self.publish_every} and decode_steps {self.decode_steps}; each "
                "puts several tokens into one output, so at most one of them can be more than 1."
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigurationError(
                f"watermark is {self.watermark}; it must be a share of the blocks from 0 to "
                "less than 1."
            )

    def step_tokens(self, limits: ExecutorLimits) -> int:
        """The token budget of a step on that executor.

        Raises ConfigurationError if decodes alone could fill it and no prefill would ever run.
        """
        if self.max_step_tokens is None:
            return limits.num_rows + limits.max_prefill_tokens
        if self.max_step_tokens <= limits.num_rows:
            raise ConfigurationError(
                f"max_step_tokens is {self.max_step_tokens}; it must be more than the "
                f"{limits.num_rows} rows of the batch, or prefills never get a turn."
            )
        return self.max_step_tokens
