"""What a gateway says of its replicas while they work, report by report."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import numpy as np

from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from tools.bench.engine.lock_watch import LockShares, LockWatch

_EVERY_S = 0.1  # the worker reports twice a second
_SAME_S = 0.05  # two answers about the same report disagree about its age by less


@dataclass(frozen=True, slots=True)
class Load:
    """One replica in a report. steps: taken since it started. running, waiting: requests."""

    steps: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Report:
    """at_s: when it reached the gateway, on `time.perf_counter`. loads: by replica. lock: what was
    seen of the worker's interpreter lock up to about then; None: it is not watched."""

    at_s: float
    loads: Mapping[int, Load]
    lock: LockShares | None = None


class LoadWatch:
    """Asks a gateway for its load reports, from a thread of its own. Use as a context manager.

    lock: of the worker, to be read with every report; it must run as long.
    """

    def __init__(self, address: str, lock: LockWatch | None) -> None:
        self.reports: list[Report] = []
        self._address = address
        self._lock = lock
        self._ended = threading.Event()
        self._asker = threading.Thread(target=self._ask, name="load-watch", daemon=True)

    def __enter__(self) -> Self:
        self._asker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._asker.join()

    def _ask(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated
            while not self._ended.wait(_EVERY_S):
                try:
                    self._take(stub.LoadReport(pb.LoadReportRequest(), timeout=5.0))
                except grpc.RpcError:
                    return  # the gateway is gone, and whoever sends it requests will say so

    def _take(self, answer: pb.LoadReportResponse) -> None:
        if not answer.replicas:
            return
        at_s = time.perf_counter() - answer.replicas[0].report_age_s
        if self.reports and at_s - self.reports[-1].at_s < _SAME_S:
            return
        loads = {one.replica: Load(one.steps, one.running, one.waiting) for one in answer.replicas}
        self.reports.append(
            Report(at_s, loads, None if self._lock is None else self._lock.shares())
        )


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
