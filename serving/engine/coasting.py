"""Stretches of decode steps in which nothing is decided: in virtual time they cost one event.

While all plans in flight decode the same rows, and nothing arrives, ends or runs short of blocks,
each next plan is the one before with another number. What is left to do is to append tokens, hand
out blocks and tell the prefix cache what is computed, in the order in which single steps would.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from serving.engine.active import ActiveRequest
from serving.engine.batch import Batch
from serving.engine.config import EngineConfig
from serving.engine.memory import KVMemory
from serving.engine.plan import NO_TABLE_UPDATE, Int32
from serving.engine.planner import Planner, SubmittedPlan
from serving.engine.request import RequestOutput
from serving.engine.token_intake import TokenIntake


class Coasting:
    """Finds how long such a stretch is, and takes it."""

    def __init__(
        self,
        config: EngineConfig,
        batch: Batch,
        planner: Planner,
        memory: KVMemory,
        intake: TokenIntake,
    ) -> None:
        self._config = config
        self._batch = batch
        self._planner = planner
        self._memory = memory
        self._intake = intake
        self._judged: list[ActiveRequest] | None = None  # members, and whether they may coast
        self._may_coast = False

    def quiet_steps(self, in_flight: Sequence[SubmittedPlan]) -> int:
        """How often in a row the oldest plan can come back without anything being decided."""
        batch = self._batch
        rows, requests = batch.members()
        if (
            not rows.size
            or self._config.decode_steps > 1
            or len(in_flight) < self._config.pipeline_depth
            or batch.running != rows.size  # somebody prefills, or its last token is on its way
            or any(it.plan.decode_rows is not rows or it.plan.prefills for it in in_flight)
            or any(it.plan.masks for it in in_flight)
            or self._memory.any_held()
            or not self._may(requests)
            or not self._planner.is_stuck()
        ):
            return 0
        # The plan that leaves a row nothing more to sample changes who decodes.
        steps = batch.fewest_left() - 1
        if steps < 1:
            return 0
        if batch.blocks_to_coast(steps) <= self._memory.available:
            return steps
        enough, too_many = 0, steps
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if batch.blocks_to_coast(middle) <= self._memory.available:
                enough = middle
            else:
                too_many = middle
        return enough

    def take(
        self, in_flight: deque[SubmittedPlan], tokens: Int32
    ) -> tuple[deque[SubmittedPlan], list[RequestOutput]]:
        """Take as many steps as there are tokens per row; the plans in flight afterwards."""
        steps = tokens.shape[1]
        batch = self._batch
        _, requests = batch.members()
        newest = in_flight[-1].plan.step_id + steps
        oldest = in_flight[0].plan.step_id + steps
        computed = self._intake.blocks_to_come(requests, steps)
        outputs = self._intake.coast(requests, tokens)

        def before_growth(step: int) -> None:
            while computed and computed[0][0] <= step:
                _, _, request, length = computed.popleft()
                self._intake.computed(request, length)

        table = batch.coast(steps, newest, before_growth)
        before_growth(steps)
        self._memory.step_collected(oldest - 1)
        plans: deque[SubmittedPlan] = deque()
        for it in in_flight:
            last = it is in_flight[-1]
            plan = replace(
                it.plan,
                step_id=it.plan.step_id + steps,
                assignments=(),
                table=table if last else NO_TABLE_UPDATE,
            )
            plans.append(SubmittedPlan(plan, it.sampling, ()))
        return plans, outputs

    def _may(self, requests: list[ActiveRequest]) -> bool:
        """Whether no token of these requests has to be looked at. Asked once per membership."""
        if self._judged is not requests:
            self._judged = requests
            self._may_coast = not any(
                request.stops or request.sampling.logprobs is not None for request in requests
            )
        return self._may_coast
