"""What the simulator needs of an executor: a device whose time is foretold instead of waited for.

`ModelledExecutor` remembers what is stored where and finds every wrong plan; `TimedExecutor` knows
lengths alone and is many times faster.
"""

from typing import Protocol

from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepPlan, StepResult


class SimExecutor(Protocol):
    """Runs plans in the order submitted, in no time: its shell lets the time pass.

    violations: sentences about plans that a device would have run into garbage with.
    """

    violations: list[str]

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Take a plan."""
        ...

    def predicted_duration(self, plan: StepPlan, steps: int | None = None) -> float:
        """Seconds that a submitted, not yet collected plan takes on the device.

        steps: decode steps it takes before it ends early; None for all planned.
        """
        ...

    def collect(self) -> StepResult:
        """What the oldest plan sampled, or its error. Raises ExecutorError if there is no plan."""
        ...

    def interrupt(self, steps_taken: int = 0) -> None:
        """End the oldest plan after the step in flight, the one after so many."""
        ...

    def fail(self, reason: str) -> None:
        """From now on every result is this error, as after a device fault."""
        ...
