"""Takes in what a step sampled: tokens into contexts, computed blocks into the prefix cache."""

from collections.abc import Callable

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.memory import KVMemory
from serving.engine.plan import LogprobArrays, StepResult
from serving.engine.planner import SubmittedPlan
from serving.engine.request import FinishReason, RequestOutput, TokenLogprobs


def mismatch(submitted: SubmittedPlan, result: StepResult) -> str | None:
    """Why a result cannot be the one of the plan, if so."""
    plan = submitted.plan
    if result.step_id != plan.step_id:
        return f"The executor answered step {result.step_id} where {plan.step_id} was expected."
    rows, taken = result.tokens.shape
    fewest = 1 if submitted.sampling else 0
    if rows != len(submitted.sampling) or not fewest <= taken <= plan.steps:
        return (
            f"Step {plan.step_id} brought tokens of shape {rows} x {taken} for "
            f"{len(submitted.sampling)} rows and at most {plan.steps} steps."
        )
    return None


class TokenIntake:
    """Turns results into outputs and finds the ends of requests.

    on_end is called for a request that ends, after its last token was taken in.
    """

    def __init__(self, memory: KVMemory, on_end: Callable[[ActiveRequest], None]) -> None:
        self._memory = memory
        self._on_end = on_end

    def computed(self, request: ActiveRequest, tokens: int) -> None:
        """The KV of so many leading tokens of the context is complete."""
        if request.row < 0:
            return  # preempted or ended meanwhile: its blocks are no longer its own
        self._memory.register(request, tokens)
        request.check_len = min(request.end_len, self._memory.next_check(request))

    def tokens(self, sampling: list[ActiveRequest], result: StepResult) -> list[RequestOutput]:
        """One token for each request: the steady state, so every line of the loop counts."""
        outputs: list[RequestOutput] = []
        ended = RequestState.ENDED
        logprobs = result.logprobs
        tokens: list[int] = result.tokens[:, 0].tolist()
        for index, (request, token) in enumerate(zip(sampling, tokens, strict=True)):
            if request.state is ended:
                continue  # it ended while this step was running
            context = request.tokens
            context.append(token)
            length = len(context)
            finish = None
            if length >= request.check_len or token in request.stops:
                finish = self._after_token(request)
            details: tuple[TokenLogprobs, ...] = ()
            if logprobs is not None and request.sampling.logprobs is not None:
                details = (_token_logprobs(logprobs, index, 0, request.sampling.logprobs),)
            outputs.append(
                RequestOutput(
                    request.request_id,
                    request.attempt,
                    length - 1 - request.prompt_len,
                    (token,),
                    details,
                    finish,
                    "",
                    request.cached_tokens,
                )
            )
        return outputs

    def runs(self, sampling: list[ActiveRequest], result: StepResult) -> list[RequestOutput]:
        """Several tokens for each request; what follows its end is dropped."""
        outputs: list[RequestOutput] = []
        for index, (request, run) in enumerate(zip(sampling, result.tokens.tolist(), strict=True)):
            if request.state is RequestState.ENDED:
                continue
            start = request.generated
            taken = 0
            finish = None
            while finish is None and taken < len(run):
                request.tokens.append(run[taken])
                taken += 1
                finish = self._after_token(request)
            details: tuple[TokenLogprobs, ...] = ()
            wanted = request.sampling.logprobs
            if result.logprobs is not None and wanted is not None:
                details = tuple(
                    _token_logprobs(result.logprobs, index, step, wanted) for step in range(taken)
                )
            outputs.append(
                RequestOutput(
                    request.request_id,
                    request.attempt,
                    start,
                    tuple(run[:taken]),
                    details,
                    finish,
                    "",
                    request.cached_tokens,
                )
            )
        return outputs

    def _after_token(self, request: ActiveRequest) -> FinishReason | None:
        """Blocks for the prefix cache, and the end of the request if its last token is one."""
        tokens = request.tokens
        self.computed(request, len(tokens) - 1)
        finish = None
        if tokens[-1] in request.stops and request.generated > request.sampling.min_tokens:
            finish = FinishReason.STOP
        elif len(tokens) >= request.end_len:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._on_end(request)
        return finish


def _token_logprobs(arrays: LogprobArrays, row: int, step: int, count: int) -> TokenLogprobs:
    ids: list[int] = arrays.top_ids[row, step, :count].tolist()
    values: list[float] = arrays.top[row, step, :count].tolist()
    return TokenLogprobs(float(arrays.chosen[row, step]), tuple(zip(ids, values, strict=True)))
