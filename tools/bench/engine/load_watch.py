"""What a worker says of its replicas while they work, report by report."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from serving.api.channel_options import LINK_OPTIONS
from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.proto import lumen_internal_v1_pb2_grpc as pb_grpc
from tools.bench.engine.lock_watch import LockShares, LockWatch


@dataclass(frozen=True, slots=True)
class Load:
    """One replica in a report. steps: taken since it started. running, waiting: requests."""

    steps: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Report:
    """at_s: when it came, on `time.perf_counter`. loads: by replica. lock: what was seen of the
    worker's interpreter lock up to then; None: it is not watched."""

    at_s: float
    loads: Mapping[int, Load]
    lock: LockShares | None = None


class LoadWatch:
    """Listens to a worker's load reports on a thread of its own. Use as a context manager.

    To the worker it is one more gateway, which asks for nothing: what the other one is sent may
    wait there for long, and this must not. address: of the worker. lock: of the worker, to be read
    with every report; it must run as long.
    """

    def __init__(self, address: str, lock: LockWatch | None) -> None:
        self.reports: list[Report] = []
        self._lock = lock
        self._ended = threading.Event()
        self._channel = grpc.insecure_channel(address, options=LINK_OPTIONS)
        self._call: Any = pb_grpc.WorkerLinkStub(self._channel).Connect(self._nothing())  # type: ignore[no-untyped-call]  # generated
        self._listener = threading.Thread(target=self._listen, name="load-watch", daemon=True)

    def __enter__(self) -> Self:
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._call.cancel()
        self._listener.join()
        self._channel.close()

    def _nothing(self) -> Iterator[pb.WorkerBatch]:
        self._ended.wait()
        yield from ()

    def _listen(self) -> None:
        # When the worker is gone, whoever sends it requests will say so.
        with contextlib.suppress(grpc.RpcError):
            for batch in self._call:
                for message in batch.messages:
                    if message.WhichOneof("message") == "load":
                        self._take(message.load)

    def _take(self, load: pb.LoadReport) -> None:
        loads = {one.replica: Load(one.steps, one.running, one.waiting) for one in load.replicas}
        lock = None if self._lock is None else self._lock.shares()
        self.reports.append(Report(time.perf_counter(), loads, lock))


def steady(reports: Sequence[Report], batch: int) -> list[Report]:
    """The longest row of reports in which every replica runs so many requests.

    Without the first of them: a prompt may still have been under way.
    """
    longest: list[Report] = []
    found: list[Report] = []
    for report in reports:
        if all(load.running == batch for load in report.loads.values()):
            found.append(report)
            longest = max(longest, found, key=len)
        else:
            found = []
    return longest[1:]


def step_ms(reports: Sequence[Report], replica: int) -> float:
    """Milliseconds of a step of a replica, from the slope of its steps over the reports' times.

    A report counts steps that have ended, so it lags by up to one of them: the slope of all is
    closer than the difference of two. Needs two reports.
    """
    times = np.array([report.at_s for report in reports])
    steps = np.array([report.loads[replica].steps for report in reports], float)
    return 1e3 / float(np.polyfit(times - times[0], steps, 1)[0])
