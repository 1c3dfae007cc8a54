"""Events into and effects out of the engine core."""

from dataclasses import dataclass

from serving.engine.plan import Int32, StepPlan, StepResult
from serving.engine.request import EngineRequest, RequestOutput


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A request arrives. It was validated; its id and attempt are new to this engine."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Stop a request in whatever state it is. Unknown or ended ones are ignored.

    Its end (CANCELLED) is reported at once; its blocks are free when the step in flight ends.
    """

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class PlanStep:
    """The shell has delivered all events at hand: plan a step if the pipeline has room."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """The oldest submitted plan came back."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class Coast:
    """Many times in a row the oldest plan came back and another decode step was planned.

    For virtual time, where such a stretch costs one event; at most `EngineCore.quiet_steps()`
    times. tokens: int32 [rows, times], of the rows that decode in all plans in flight. Answered by
    Coasted.
    """

    tokens: Int32


EngineEvent = AddRequest | CancelRequest | PlanStep | StepDone | Coast


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand this plan to the executor."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Publish:
    """Runs of tokens and ends of requests: one message per step, never one per token."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Tell the executor to end its multi-step plan: something arrived that should not wait."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The executor failed; the replica must be rebuilt. Every request was published as FAILED
    or is left for the gateway to place again, as `requests_lost` says.
    """

    reason: str
    requests_lost: tuple[tuple[str, int], ...]  # (request_id, attempt), not published


@dataclass(frozen=True, slots=True)
class Coasted:
    """After Coast, these plans are in flight. The last one's table has all entries since."""

    plans: tuple[StepPlan, ...]


EngineEffect = Submit | Publish | Interrupt | Fail | Coasted
