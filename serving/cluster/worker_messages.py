"""What a worker says to gateways, in its own name."""

from serving.cluster.messages import (
    LoadReport,
    ReplicaInfo,
    RequestAccepted,
    RequestUnknown,
    StepOutputs,
    WorkerHello,
)
from serving.cluster.worker_attempts import AttemptKey
from serving.cluster.worker_events import WorkerConfig
from serving.engine.request import RequestOutput
from serving.policy.snapshot import ReplicaLoad


def hello(config: WorkerConfig) -> WorkerHello:
    """Who this worker is."""
    return WorkerHello(
        config.worker_id,
        config.incarnation,
        config.model_id,
        config.model_revision,
        config.vocab_size,
        config.replicas,
    )


def load_report(config: WorkerConfig, loads: tuple[ReplicaLoad, ...]) -> LoadReport:
    """How loaded its replicas are."""
    return LoadReport(config.worker_id, config.incarnation, loads)


def step_outputs(
    config: WorkerConfig, replica: int, outputs: tuple[RequestOutput, ...]
) -> StepOutputs:
    """What a step gave, or what is said again of it."""
    return StepOutputs(config.worker_id, config.incarnation, replica, outputs)


def accepted(config: WorkerConfig, key: AttemptKey) -> RequestAccepted:
    """The attempt is here."""
    return RequestAccepted(config.worker_id, config.incarnation, *key)


def unknown(config: WorkerConfig, key: AttemptKey) -> RequestUnknown:
    """The attempt is not here."""
    return RequestUnknown(config.worker_id, config.incarnation, *key)


def idle_load(info: ReplicaInfo) -> ReplicaLoad:
    """The load of a replica that has taken no step yet."""
    return ReplicaLoad(
        replica=info.replica,
        running=0,
        waiting=0,
        waiting_tokens=0,
        total_blocks=info.num_blocks,
        free_blocks=info.num_blocks,
        cached_blocks=0,
        block_size=info.block_size,
    )
