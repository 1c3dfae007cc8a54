"""One simulated run: gateway, worker and engine cores under the faults of a seed.

    python -m serving.sim.faults.run 17        replays seed 17 and prints its log

The cores check themselves after every event, the clients check every token; at the end nothing
may be left anywhere.
"""

import argparse
from dataclasses import dataclass
from functools import partial

from serving.engine.request import FinishReason
from serving.errors import InternalError
from serving.sim.faults.client import Client
from serving.sim.faults.coverage import Coverage, CoverageWatch
from serving.sim.faults.oracle import Oracle
from serving.sim.faults.scenario import FAULTS_UNTIL_S, Fault, FaultPlan, Scenario, draw_scenario
from serving.sim.faults.worker_site import WorkerSite
from serving.sim.gateway_node import GatewayNode
from serving.sim.world import World

_ENDS_WITHIN_S = 20.0  # of the last fault: many times what the slowest scenario needs
_LOOKS_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class FaultRunResult:
    """What a run came to.

    ends: what clients saw (None: they stayed away), by request. attempts: the newest attempt
    that each heard of. seconds: of virtual time.
    """

    ends: dict[str, FinishReason | None]
    attempts: dict[str, int]
    tokens: int
    events: int
    seconds: float


class FaultRun:
    """A world built from a seed. `run` once.

    scenario: instead of the seed's own; the network still draws from the seed. coverage: gets
    what befalls requests in this run.
    """

    def __init__(
        self,
        seed: int,
        scenario: Scenario | None = None,
        *,
        keep_log: bool = False,
        coverage: Coverage | None = None,
    ) -> None:
        self.world = World(seed, keep_log=keep_log)
        if scenario is None:
            scenario = draw_scenario(self.world.chance("scenario"))
        self.scenario = scenario
        oracle = Oracle(scenario.numerics)
        self.gateway = GatewayNode(self.world, scenario.gateway)
        self.sites = [
            WorkerSite(self.world, self.gateway, setup, scenario.network, oracle)
            for setup in scenario.workers
        ]
        self.clients = [Client(self.world, self.gateway, plan, oracle) for plan in scenario.clients]
        self._watch = None
        if coverage is not None:
            self._watch = CoverageWatch(coverage, self.gateway, self.sites)
            self.world.watch = self._watch
        for fault in scenario.faults:
            self.world.time.at(fault.at, partial(self._strike, fault))

    def run(self) -> FaultRunResult:
        """Until nothing is left to do. Raises InternalError (InvariantViolated)."""
        time = self.world.time
        end = FAULTS_UNTIL_S + _ENDS_WITHIN_S
        look_at = FAULTS_UNTIL_S
        while time.now < end:
            if time.now >= look_at:
                look_at += _LOOKS_EVERY_S
                if self._unrest() is None:
                    break
            time.step()
        unrest = self._unrest()
        self.world.require(unrest is None, f"{unrest}, {_ENDS_WITHIN_S:g} s after the last fault")
        return FaultRunResult(
            ends={client.name: client.finish for client in self.clients},
            attempts={client.name: client.attempt for client in self.clients},
            tokens=sum(len(client.received) for client in self.clients),
            events=time.events_run,
            seconds=time.now,
        )

    def _unrest(self) -> str | None:
        """What has not come to rest yet, or None."""
        for client in self.clients:
            if not client.satisfied:
                return f"request {client.name} has not ended"
        if not self.gateway.core.is_idle():
            return "the gateway remembers a request or has something to say"
        for site in self.sites:
            if site.node is None:
                return f"worker {site.setup.worker_id} is down"
            if not site.node.core.is_idle():
                return f"worker {site.node.name} keeps an attempt"
            for replica in site.node.replicas:
                # Its own invariants say that an idle engine has no block in use or in flight.
                if not replica.core.is_idle():
                    return f"replica {replica.name} has a request"
        return None

    def _strike(self, plan: FaultPlan) -> None:
        if self._watch is not None:
            self._watch.struck(plan)
        site = self.sites[plan.worker]
        match plan.fault:
            case Fault.CRASH:
                site.crash(plan.seconds)
            case Fault.CUT:
                site.cut()
            case Fault.PARTITION:
                site.partition(plan.seconds)
            case Fault.STALL:
                site.stall(plan.seconds)
            case Fault.REPLICA:
                site.break_replica(plan.replica)


def main() -> int:
    """Replay one seed. The exit status is 1 if it breaks an invariant."""
    parser = argparse.ArgumentParser(description="Replay one seed of the fault test.")
    parser.add_argument("seed", type=int)
    run = FaultRun(parser.parse_args().seed, keep_log=True)
    try:
        outcome: FaultRunResult | InternalError = run.run()
    except InternalError as violated:
        outcome = violated
    assert run.world.log is not None
    print("\n".join(run.world.log))
    print(outcome)
    return int(isinstance(outcome, InternalError))


if __name__ == "__main__":
    raise SystemExit(main())
