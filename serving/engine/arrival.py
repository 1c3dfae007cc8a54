"""What becomes of a request the moment it arrives: its limits, and an end if it has none left."""

from serving.engine.active import ActiveRequest, stop_tokens
from serving.engine.config import EngineConfig
from serving.engine.executor import ExecutorLimits
from serving.engine.masks import mask_without
from serving.engine.request import EngineRequest, FinishReason


def max_context_tokens(limits: ExecutorLimits) -> int:
    """Tokens of prompt and output that one request can have when it is alone on the replica."""
    return min(limits.max_model_len, limits.num_blocks * limits.block_size)


def receive(
    request: EngineRequest, arrival: int, limits: ExecutorLimits, config: EngineConfig
) -> ActiveRequest:
    """The engine's own record of a request."""
    sampling = request.sampling
    stops = stop_tokens(request, config.eos_token_ids)
    prompt_len = len(request.prompt)
    end_len = prompt_len + sampling.max_tokens
    masked = bool(stops) and sampling.min_tokens > len(request.emitted)
    return ActiveRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        arrival=arrival,
        priority=request.priority,
        sampling=sampling,
        deadline=request.deadline,
        prompt_len=prompt_len,
        tokens=[*request.prompt, *request.emitted],
        end_len=min(end_len, max_context_tokens(limits)),
        stops=stops,
        mask=mask_without(limits.vocab_size, stops) if masked else None,
        check_len=min(end_len, max_context_tokens(limits)),
    )


def end_on_arrival(
    request: ActiveRequest, limits: ExecutorLimits, now: float
) -> tuple[FinishReason, str] | None:
    """The end of a request that cannot go on, with a sentence for the failures; else None.

    The gateway refuses what can never fit; the engine defends itself against what it missed. A
    request that an earlier attempt had already completed ends as that attempt would have.
    """
    most = max_context_tokens(limits)
    if request.prompt_len == 0:
        return FinishReason.FAILED, "The prompt is empty; it needs at least one token."
    if request.prompt_len >= most:
        return FinishReason.FAILED, (
            f"The prompt has {request.prompt_len} tokens; this replica takes at most {most - 1}, "
            "so that there is room for one more. Shorten the prompt."
        )
    if request.mask is not None and not request.mask.any():
        return FinishReason.FAILED, (
            "min_tokens asks for tokens that are not stop tokens, but every token of the "
            "vocabulary is one. Give fewer stop_token_ids."
        )
    stopped = (
        request.generated > request.sampling.min_tokens and request.tokens[-1] in request.stops
    )
    if request.generated and stopped:
        return FinishReason.STOP, ""
    if len(request.tokens) >= request.end_len:
        return FinishReason.LENGTH, ""
    if request.deadline is not None and request.deadline <= now:
        return FinishReason.DEADLINE, "The deadline had passed when the request arrived."
    return None
