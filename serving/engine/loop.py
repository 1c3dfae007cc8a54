"""The thin shell around an engine core: a thread that carries events in and effects out."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from serving.engine.core import EngineCore
from serving.engine.event_sink import EventSink, handle_recorded
from serving.engine.events import (
    AddRequest,
    CancelRequest,
    EngineEvent,
    Fail,
    Interrupt,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.executor import Executor
from serving.engine.mailbox import Mailbox
from serving.engine.request import RequestOutput
from serving.errors import ExecutorError
from serving.policy.snapshot import ReplicaLoad

_log = logging.getLogger(__name__)

Publisher = Callable[[tuple[RequestOutput, ...], ReplicaLoad], None]


@dataclass(frozen=True, slots=True)
class LoopPorts:
    """Whom a loop speaks to.

    publish: gets the outputs of a step (or of a cancellation) and the load after it, once per
        step; on the loop's thread, so it must not block. clock: seconds, monotonic.
    record: told of every event and answer.
    """

    core: EngineCore
    executor: Executor
    publish: Publisher
    clock: Callable[[], float]
    record: EventSink | None = None

    def tell(self, event: EngineEvent) -> bool:
        """Give the core an event and carry out what it answers; whether a plan was submitted.

        Raises ExecutorError if the executor has failed.
        """
        submitted = False
        outputs: tuple[RequestOutput, ...] = ()
        for effect in handle_recorded(self.core.handle, event, self.clock(), self.record):
            if isinstance(effect, Submit):
                self.executor.submit(effect.plan)
                submitted = True
            elif isinstance(effect, Publish):
                outputs += effect.outputs
            elif isinstance(effect, Interrupt):
                self.executor.interrupt()
            elif isinstance(effect, Fail):
                raise ExecutorError(effect.reason)
        if outputs or isinstance(event, StepDone):
            self.publish(outputs, self.core.load())
        return submitted


def run_plain(ports: LoopPorts, mailbox: Mailbox) -> None:
    """One step after the other, until the mailbox closes; what the overlapped loop must equal.

    The core's pipeline_depth must be 1. Raises ExecutorError if the executor fails.
    """
    while (events := mailbox.receive(wait=ports.core.is_idle())) is not None:
        for event in events:
            ports.tell(event)
        if ports.tell(PlanStep()):
            ports.tell(StepDone(ports.executor.collect()))


def run_overlapped(ports: LoopPorts, mailbox: Mailbox) -> None:
    """Step n+1 is planned and submitted while step n runs, until the mailbox closes.

    Raises ExecutorError if the executor fails.
    """
    in_flight = 0
    while (events := mailbox.receive(wait=ports.core.is_idle())) is not None:
        for event in events:
            ports.tell(event)
        while ports.tell(PlanStep()):
            in_flight += 1
        if in_flight:
            in_flight -= 1
            ports.tell(StepDone(ports.executor.collect()))
    for _ in range(in_flight):
        ports.executor.collect()  # leave the device quiet


class ReplicaThread:
    """Runs one replica on a thread of its own.

    on_failure gets a sentence, on that thread, if the executor or the loop fails; the thread then
    ends, and what ran on it is lost and for the gateway to place again.
    """

    def __init__(self, ports: LoopPorts, on_failure: Callable[[str], None]) -> None:
        self._ports = ports
        self._on_failure = on_failure
        self._mailbox = Mailbox()
        name = f"replica-{ports.core.config.replica}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, event: AddRequest | CancelRequest) -> None:
        """Hand an event to the replica; from any thread, never blocks."""
        self._mailbox.put(event)
        # The loop may be waiting for several steps; it reads its mail when they end.
        if self._ports.core.config.decode_steps > 1:
            self._ports.executor.interrupt()

    def stop(self) -> None:
        """Ask the thread to end after the steps in flight; requests that run get no end."""
        self._mailbox.close()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        overlapped = self._ports.core.config.pipeline_depth > 1
        try:
            (run_overlapped if overlapped else run_plain)(self._ports, self._mailbox)
        except Exception as error:  # the thread's last words, whatever went wrong
            _log.exception("Replica %d failed.", self._ports.core.config.replica)
            self._mailbox.close()
            self._on_failure(str(error) or type(error).__name__)
