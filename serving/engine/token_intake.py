"""Takes in what a step sampled: tokens into contexts, computed blocks into the prefix cache."""

from collections import deque
from collections.abc import Callable

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.memory import KVMemory
from serving.engine.plan import Int32, LogprobArrays, StepResult
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

    on_end is called for a request that ends, after its last token was taken in. publish_every: see
    EngineConfig.
    """

    def __init__(
        self, memory: KVMemory, on_end: Callable[[ActiveRequest], None], publish_every: int = 1
    ) -> None:
        self._memory = memory
        self._on_end = on_end
        self._publish_every = publish_every

    def arrived(self, request: ActiveRequest) -> None:
        """Tokens that come from now on are to be published."""
        request.published = len(request.tokens)
        request.publish_at = request.published + 1

    def computed(self, request: ActiveRequest, tokens: int) -> None:
        """The KV of so many leading tokens of the context is complete."""
        if request.row < 0:
            return  # preempted or ended meanwhile: its blocks are no longer its own
        self._memory.register(request, tokens)
        self._next_check(request)

    def tokens(self, sampling: list[ActiveRequest], result: StepResult) -> list[RequestOutput]:
        """One token for each request: the steady state, so every line of the loop counts."""
        if self._publish_every > 1:
            return self._rare_outputs(sampling, result)
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

    def blocks_to_come(
        self, requests: list[ActiveRequest], steps: int
    ) -> deque[tuple[int, int, ActiveRequest, int]]:
        """Blocks that the next steps compute as a whole, in the order in which they come.

        Each as: the step that samples behind it, place of the request, request, its tokens computed
        by then.
        """
        coming: list[tuple[int, int, ActiveRequest, int]] = []
        if self._memory.caches_prefixes:
            size = self._memory.block_size
            for place, request in enumerate(requests):
                length = len(request.tokens)
                at = range(self._memory.next_check(request), length + steps + 1, size)
                coming += [(whole - length, place, request, whole - 1) for whole in at]
            coming.sort(key=lambda block: block[:2])
        return deque(coming)

    def coast(self, requests: list[ActiveRequest], tokens: Int32) -> list[RequestOutput]:
        """Runs of tokens, int32 [requests, steps], none of which ends anything."""
        outputs: list[RequestOutput] = []
        every = self._publish_every
        for request, run in zip(requests, tokens.tolist(), strict=True):
            context = request.tokens
            if every == 1:
                request.published = len(context)
            context.extend(run)
            if every == 1 or len(context) >= request.publish_at:
                outputs.append(self._output(request, None, ()))
        return outputs

    def unpublished(self, request: ActiveRequest) -> tuple[int, tuple[int, ...]]:
        """The tokens that no output had yet: the index of the first, and all of them."""
        start = request.published if self._publish_every > 1 else len(request.tokens)
        request.published = len(request.tokens)
        return start - request.prompt_len, tuple(request.tokens[start:])

    def _rare_outputs(
        self, sampling: list[ActiveRequest], result: StepResult
    ) -> list[RequestOutput]:
        """`tokens` where most tokens wait for later ones to be published with.

        Those of requests with stop tokens, or with log-probabilities, are looked at one by one.
        """
        outputs: list[RequestOutput] = []
        logprobs = result.logprobs
        tokens: list[int] = result.tokens[:, 0].tolist()
        for index, (request, token) in enumerate(zip(sampling, tokens, strict=True)):
            context = request.tokens
            context.append(token)
            if len(context) < request.check_len:
                continue
            if request.state is RequestState.ENDED:
                context.pop()  # it ended while this step was running
                continue
            finish = self._after_token(request)
            wanted = request.sampling.logprobs
            details: tuple[TokenLogprobs, ...] = ()
            if logprobs is not None and wanted is not None:
                details = (_token_logprobs(logprobs, index, 0, wanted),)
            if finish is not None or len(context) >= request.publish_at:
                outputs.append(self._output(request, finish, details))
        return outputs

    def _output(
        self,
        request: ActiveRequest,
        finish: FinishReason | None,
        details: tuple[TokenLogprobs, ...],
    ) -> RequestOutput:
        start = request.published
        tokens = tuple(request.tokens[start:])
        request.published = len(request.tokens)
        each = request.sampling.logprobs is not None
        request.publish_at = request.published + (1 if each else self._publish_every)
        if finish is None:
            self._next_check(request)
        return RequestOutput(
            request.request_id,
            request.attempt,
            start - request.prompt_len,
            tokens,
            details,
            finish,
            "",
            request.cached_tokens,
        )

    def _next_check(self, request: ActiveRequest) -> None:
        if self._publish_every == 1:
            request.check_len = min(request.end_len, self._memory.next_check(request))
        elif request.stops or request.sampling.logprobs is not None:
            request.check_len = 0
        else:
            next_check = self._memory.next_check(request)
            request.check_len = min(request.end_len, next_check, request.publish_at)

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
