"""A fleet in virtual time: the real gateway, worker and engine cores under a workload."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial

from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.messages import ReplicaInfo
from serving.cluster.worker_events import WorkerConfig
from serving.engine.active import ActiveRequest
from serving.engine.config import EngineConfig
from serving.engine.executor import ExecutorLimits
from serving.errors import ConfigurationError
from serving.policy.dispatch import Dispatch, dispatch
from serving.sim.fleet.clients import FleetClients
from serving.sim.fleet.records import FleetSample, GapHistogram, RequestTimes
from serving.sim.fleet.replica import FleetReplica
from serving.sim.fleet.worker import FleetWorker
from serving.sim.gateway_node import GatewayNode
from serving.sim.profile import MOST_BLOCKS, Profile
from serving.sim.timed_executor import TimedExecutor
from serving.sim.transport import Link, NetworkFaults
from serving.sim.workload.requests import Workload
from serving.sim.world import World

DEFAULT_ENGINE = EngineConfig(prefix_caching=False, publish_every=1 << 30)
"""Settings of a replica unless others are given. All tokens but the first come in one output:
nobody looks at those between, and their times are kept."""

_WARM_UP_S = 0.5  # until every worker has said hello and reported
_MOST_SAMPLES = 4096
_MOST = {"replicas": 1 << 16, "num_blocks": MOST_BLOCKS}
_LEAST_S = 1e-3  # between reports, and between looks
_MOST_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """A fleet of equal replicas. Times in seconds.

    num_blocks: of one replica; None: the profile's. engine: settings of every replica. queue:
    requests that the gateway lets wait for their first token. network_s: of one message.
    report_s: between two load reports. sample_s: between two looks at the fleet. dispatch: picks
    the replica of a request.
    """

    profile: Profile
    replicas: int = 1
    replicas_per_worker: int = 8
    num_blocks: int | None = None
    engine: EngineConfig = DEFAULT_ENGINE
    queue: int = 2048
    network_s: float = 0.0003
    report_s: float = 0.25
    sample_s: float = 1.0
    dispatch: Dispatch = dispatch

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigurationError."""
        for name in ("replicas", "replicas_per_worker", "num_blocks", "queue"):
            value, most = getattr(self, name), _MOST.get(name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}; it must be 1 or more.")
            if value is not None and most is not None and value > most:
                raise ConfigurationError(f"{name} is {value}; it must be at most {most}.")
        for name in ("report_s", "sample_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigurationError(f"{name} is {value}; it must be more than 0.")
            if value < _LEAST_S:
                raise ConfigurationError(
                    f"{name} is {value}; it must be at least {_LEAST_S:g}: the run would come to "
                    "nothing else."
                )
        for name in ("network_s", "report_s", "sample_s"):
            if (value := getattr(self, name)) > _MOST_S:
                raise ConfigurationError(f"{name} is {value}; it must be at most {_MOST_S:g}.")
        if not self.network_s >= 0:
            raise ConfigurationError(f"network_s is {self.network_s}; it must not be negative.")


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What a run came to.

    seconds: virtual, from the first request due to the last token. steps: of all replicas. events:
    of the heap. log: hash of the event log, if one was asked for.
    """

    times: RequestTimes
    gaps: GapHistogram
    samples: list[FleetSample]
    seconds: float
    steps: int
    events: int
    log: str | None


class FleetRun:
    """A world built from settings. `run` once.

    checked: see World. hash_log: keep a hash of all events. stretches: see FleetReplica.
    """

    def __init__(
        self,
        config: FleetConfig,
        workload: Workload,
        *,
        seed: int = 0,
        checked: bool = False,
        hash_log: bool = False,
        stretches: bool = True,
    ) -> None:
        self._config = config
        self._stretches = stretches
        self._workload = workload
        self.world = (
            _HashedWorld(seed, checked=checked) if hash_log else World(seed, checked=checked)
        )
        self.limits = config.profile.limits(config.num_blocks)
        self.times = RequestTimes.of(len(workload.requests))
        self.gaps = GapHistogram()
        self.samples: list[FleetSample] = []
        self._sample_s = config.sample_s
        # Nothing is lost here, so nobody asks again; outputs come seldom, so silence means nothing.
        gateway = GatewayConfig(
            gateway_id="gateway",
            max_queued_requests=config.queue,
            accept_timeout_s=3600.0,
            progress_timeout_s=1e9,
            unplaced_timeout_s=1e9,
            decisions_kept=16,
        )
        self.gateway = GatewayNode(self.world, gateway, config.dispatch)
        self.workers = self._workers()
        self.clients = FleetClients(self.world, self.gateway, workload, self.times)

    def run(self) -> FleetResult:
        """Until every request has ended. Raises InternalError."""
        world, clients = self.world, self.clients
        step = world.time.step
        begins = _WARM_UP_S
        clients.start(begins)
        world.time.at(begins, self._look)
        while not clients.done:
            step()
        for replica in self._replicas():
            replica.catch_up()
            replica.settle()
        return FleetResult(
            times=self.times,
            gaps=self.gaps,
            samples=self.samples,
            seconds=world.now - begins,
            steps=sum(replica.core.load().steps for replica in self._replicas()),
            events=world.time.events_run,
            log=world.digest() if isinstance(world, _HashedWorld) else None,
        )

    def _replicas(self) -> list[FleetReplica]:
        return [replica for worker in self.workers for replica in worker.replicas]

    def _workers(self) -> list[FleetWorker]:
        config, limits, world = self._config, self.limits, self.world
        chance = world.chance("network")
        delay = NetworkFaults(delay=(config.network_s, config.network_s))
        workers: list[FleetWorker] = []
        for first in range(0, config.replicas, config.replicas_per_worker):
            count = min(config.replicas_per_worker, config.replicas - first)
            number = len(workers)
            worker = FleetWorker(world, self._worker_config(f"w{number:03}", count, limits))
            for replica in range(count):
                worker.replicas.append(self._replica(worker, replica, limits))
            worker.connect(self.gateway, Link(world, delay, chance, world.number()))
            workers.append(worker)
        return workers

    def _worker_config(self, name: str, count: int, limits: ExecutorLimits) -> WorkerConfig:
        return WorkerConfig(
            worker_id=name,
            incarnation=name,
            model_id=self._config.profile.model,
            model_revision=limits.model_revision,
            vocab_size=limits.vocab_size,
            replicas=tuple(ReplicaInfo.of(replica, limits) for replica in range(count)),
            report_interval_s=self._config.report_s,
        )

    def _replica(self, worker: FleetWorker, replica: int, limits: ExecutorLimits) -> FleetReplica:
        return FleetReplica(
            self.world,
            f"{worker.name}/{replica}",
            TimedExecutor(self._config.profile, limits),
            replace(self._config.engine, replica=replica),
            publish=partial(worker.publish, replica),
            ended=self._ended,
            gaps=self.gaps,
            stretches=self._stretches,
        )

    def _ended(self, request: ActiveRequest) -> None:
        self.times.preempted[int(request.request_id)] = request.preemptions

    def _look(self) -> None:
        """Sample the fleet, and again in a while; with fewer samples the longer it takes."""
        if len(self.samples) == _MOST_SAMPLES:
            del self.samples[1::2]
            self._sample_s *= 2
        uses: list[float] = []
        running = waiting = 0
        for replica in self._replicas():
            replica.catch_up()
            load = replica.core.load()
            in_use = load.total_blocks - load.free_blocks - load.cached_blocks
            uses.append(in_use / load.total_blocks)
            running += load.running
            waiting += load.waiting
        mean = sum(uses) / len(uses)
        self.samples.append(FleetSample(self.world.now, mean, max(uses), running, waiting))
        self.world.time.after(self._sample_s, self._look)


class _HashedWorld(World):
    """A world whose log is a hash: it takes no memory."""

    def __init__(self, seed: int, *, checked: bool) -> None:
        super().__init__(seed, checked=checked)
        self._hash = hashlib.blake2b(digest_size=16)

    def note(self, who: str, what: object) -> None:
        """Write a line of the log."""
        self._hash.update(f"{self.now!r} {who} {what!r}\n".encode())

    def digest(self) -> str:
        """The hash of all lines so far."""
        return self._hash.hexdigest()
