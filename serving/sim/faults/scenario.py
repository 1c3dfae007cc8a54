"""A random small fleet, its clients and its misfortunes, drawn from one seed."""

import enum
import random
from dataclasses import dataclass

from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.generation import GenerationRequest
from serving.engine.config import EngineConfig
from serving.engine.executor import ExecutorLimits
from serving.engine.request import Priority, SamplingParams
from serving.sim.faults.client import Act, ClientPlan
from serving.sim.faults.oracle import Numerics
from serving.sim.faults.worker_node import WorkerSetup
from serving.sim.transport import NetworkFaults

EOS = (7,)
FAULTS_UNTIL_S = 1.0
# Timeouts as in a fleet, but short beside a run of a second. The gateway is more patient than
# any fault lasts, so no request may fail.
GATEWAY = GatewayConfig(
    gateway_id="gateway",
    max_queued_requests=8,
    accept_timeout_s=0.05,
    progress_timeout_s=0.2,
    gap_retry_s=0.03,
    abort_retry_s=0.06,
    heartbeat_interval_s=0.1,
    reconnect_grace_s=0.05,
    worker_silent_s=0.35,
    unplaced_timeout_s=30.0,
    max_fruitless_attempts=1000,
    remember_finished_s=0.4,
    worker_lease_s=1.5,
)
REPORT_INTERVAL_S = 0.1
GATEWAY_LEASE_S = 1.2
RETAIN_ENDED_S = 0.8


class Fault(enum.Enum):
    """What happens to a worker or its link."""

    CRASH = "crash"
    CUT = "cut"
    PARTITION = "partition"  # messages are swallowed
    STALL = "stall"  # messages are held back
    REPLICA = "replica"


# A crash hides more than it shows (the new incarnation knows nothing), so it is not the rule.
FAULTS = (*Fault, Fault.STALL, Fault.CUT)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """One fault. worker, replica: indices. seconds: how long it lasts, where that applies."""

    at: float
    fault: Fault
    worker: int
    replica: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that one run is made of."""

    gateway: GatewayConfig
    workers: tuple[WorkerSetup, ...]
    network: NetworkFaults
    clients: tuple[ClientPlan, ...]
    faults: tuple[FaultPlan, ...]
    numerics: Numerics


def draw_scenario(chance: random.Random) -> Scenario:
    """The scenario of a generator's state."""
    limits = _limits(chance)
    engine = EngineConfig(
        eos_token_ids=EOS,
        pipeline_depth=chance.choice([1, 2, 2]),
        decode_steps=chance.choice([1, 1, 4]),
        watermark=chance.choice([0.0, 0.1]),
        prefix_caching=chance.random() < 0.8,
    )
    numerics = Numerics(limits, EOS, eos_every=chance.choice([0, 20]), drift=chance.random() < 0.5)
    workers = tuple(
        WorkerSetup(
            worker_id=f"w{index}",
            numerics=numerics,
            engine=engine,
            replicas=chance.choice([1, 1, 2]),
            report_interval_s=REPORT_INTERVAL_S,
            gateway_lease_s=GATEWAY_LEASE_S,
            retain_ended_s=RETAIN_ENDED_S,
            replica_restored_after_s=0.1,
        )
        for index in range(chance.randint(1, 3))
    )
    network = NetworkFaults(
        loss=chance.choice([0.0, 0.02, 0.2]),
        duplication=chance.choice([0.0, 0.05, 0.3]),
        delay=chance.choice([(0.0003, 0.0006), (0.0005, 0.005), (0.001, 0.04)]),
        until=FAULTS_UNTIL_S,
    )
    most = numerics.max_context_tokens
    clients = tuple(_client(chance, f"r{index}", most) for index in range(chance.randint(8, 24)))
    faults = tuple(
        FaultPlan(
            at=chance.uniform(0.0, 0.6),
            fault=chance.choice(FAULTS),
            worker=(worker := chance.randrange(len(workers))),
            replica=chance.randrange(workers[worker].replicas),
            seconds=chance.choice([chance.uniform(0.01, 0.1), chance.uniform(0.1, 0.7)]),
        )
        for _ in range(chance.randint(0, 10))
    )  # fmt: skip
    return Scenario(GATEWAY, workers, network, clients, faults, numerics)


def _limits(chance: random.Random) -> ExecutorLimits:
    return ExecutorLimits(
        num_rows=chance.randint(2, 4),
        num_blocks=chance.choice([10, 16, 32]),
        slots_per_block=6,
        block_size=4,
        max_model_len=chance.choice([40, 56]),
        max_prefill_tokens=chance.choice([8, 16]),
        max_prefills=2,
        vocab_size=97,
        max_logprobs=2,
        model_revision="r1",
    )


def _client(chance: random.Random, name: str, max_context_tokens: int) -> ClientPlan:
    family = chance.randrange(3)  # prompts of a family share a prefix
    shared = [family + 10] * chance.choice([0, 4, 8])
    prompt = [*shared, *(chance.randrange(97) for _ in range(chance.randint(1, 14)))]
    sampling = SamplingParams(
        temperature=chance.choice([0.0, 1.0]),
        seed=chance.randrange(2**32),
        logprobs=chance.choice([None, None, 1]),
        max_tokens=chance.randint(1, 40),
        min_tokens=chance.choice([0, 0, 3]),
        stop_token_ids=chance.choice([(), (11, 12)]),
        ignore_eos=chance.random() < 0.3,
    )
    lease = chance.choice([0.0, 0.3, 2.0])
    return ClientPlan(
        submit_at=chance.uniform(0.0, 0.4),
        request=GenerationRequest(
            request_id=name,
            prompt=tuple(prompt[: max_context_tokens - 1]),
            sampling=sampling,
            priority=chance.choice([Priority.HIGH, Priority.LOW]),
            deadline_s=chance.choice([None, None, None, None, None, 0.02, 0.4]),
            resume_lease_s=lease,
        ),
        acts=_acts(chance, lease),
    )


def _acts(chance: random.Random, lease: float) -> tuple[tuple[float, Act], ...]:
    at = chance.uniform(0.0, 0.3)
    match chance.randrange(8):
        case 0:
            return ((at, Act.CANCEL),)
        case 1:
            return ((at, Act.BREAK),)
        case 2 | 3 if lease > 0:
            return ((at, Act.BREAK), (at + chance.uniform(0.0, 0.4), Act.RESUME))
        case 4:
            return ((at, Act.REWIND), (at + chance.uniform(0.0, 0.1), Act.REWIND))
        case _:
            return ()
