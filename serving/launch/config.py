"""The configuration of a deployment: one tree of frozen dataclasses.

Every leaf is one flag of the same name (`serving.launch.flags`) and one key of a preset file in
`configs/`. Values are checked here, whoever sets them; a wrong one raises ConfigurationError
naming its flag.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from serving.errors import ConfigurationError

DEFAULT_MAX_MODEL_LEN = 4096

SettingValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """What is known of one setting: its help and the values it takes."""

    help: str
    kind: type
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    unset: str = ""  # for a None default: what then happens


def _setting(default: SettingValue, text: str, kind: Any = None, **more: Any) -> Any:
    info = SettingInfo(text, type(default) if kind is None else kind, **more)
    return field(default=default, metadata={"info": info})


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and where its files lie."""

    model: str = _setting(
        "",
        "Hugging Face folder, .gguf file, Lumen checkpoint, or random:PRESET. Empty: "
        "SmolLM2-135M-Instruct, fetched once.",
    )
    model_name: str = _setting("", "Name clients use. Empty: the model's own.")
    max_model_len: int | None = _setting(
        None,
        "Longest prompt and output of one request together, in tokens.",
        int,
        minimum=2,
        unset=f"the model's own limit, at most {DEFAULT_MAX_MODEL_LEN}",
    )
    cache_dir: str = _setting(
        "",
        "Folder for converted checkpoints and compiled programs; the latter are trusted like Lumen "
        "itself, so nobody else may write there. Empty: lumen in the user's cache folder.",
    )


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """Where the model runs, and in how many copies."""

    platform: str = _setting(
        "auto",
        "What to run on; auto takes the best there is.",
        choices=("auto", "cpu", "gpu", "tpu"),
    )
    replicas: int | None = _setting(
        None,
        "Copies of the model, each on devices of its own.",
        int,
        minimum=1,
        maximum=64,
        unset="two on a CPU, else as many as the devices hold",
    )
    tensor_parallel: int = _setting(1, "Devices of one replica.", minimum=1, maximum=64)
    dtype: str = _setting(
        "auto",
        "Numbers the model computes with; auto is float32 on a CPU, else bfloat16.",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How much one replica takes on at a time."""

    num_rows: int = _setting(16, "Requests a replica runs at once.", minimum=1, maximum=4096)
    token_budget: int = _setting(
        512, "Tokens of one step; longer prompts are prefilled in chunks.", minimum=1
    )
    max_prefills: int = _setting(
        16, "Prompts that one step prefills, packed together.", minimum=1, maximum=256
    )
    mixed_calls: bool = _setting(
        True, "On a GPU, run a step's decodes and short prompt chunks in one pass over the weights."
    )
    decode_steps: int = _setting(
        1, "Decode steps taken without returning to the host when nothing waits.", minimum=1
    )
    block_size: int = _setting(16, "Tokens of one KV block.", minimum=1, maximum=1024)
    num_blocks: int | None = _setting(
        None,
        "KV blocks of one replica.",
        int,
        minimum=1,
        unset="what memory leaves; on a CPU, enough for all rows at full length, at most 1 GiB",
    )
    memory_fraction: float = _setting(
        0.9,
        "Share of a GPU's or TPU's memory for weights and KV. Of a GPU, JAX takes at most a "
        "twentieth more to work in, unless XLA_CLIENT_MEM_FRACTION in the environment says how "
        "much.",
        minimum=0.05,
        maximum=0.98,
    )
    prefix_cache: bool = _setting(True, "Reuse the KV of prompts that start alike.")


@dataclass(frozen=True, slots=True)
class FrontDoorSettings:
    """Where clients knock, and how much they may ask for."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network.")
    http_port: int = _setting(
        8000, "OpenAI-compatible HTTP; 0 takes a free port.", minimum=0, maximum=65535
    )
    grpc_port: int = _setting(8001, "gRPC; 0 takes a free port.", minimum=0, maximum=65535)
    max_queued_requests: int = _setting(
        256, "Requests that may wait for a replica; more are refused.", minimum=0
    )
    max_body_mib: float = _setting(
        4.0, "Largest HTTP body or gRPC message, in MiB.", minimum=0.01, maximum=256
    )
    max_resume_lease_s: float = _setting(
        600.0, "Longest a request may live on without its client, in seconds.", minimum=0.0
    )


@dataclass(frozen=True, slots=True)
class WorkerLinkSettings:
    """How gateway and worker find each other (set by lumen-serve on one machine)."""

    worker_id: str = _setting("worker-0", "Name of this worker; stays the same over restarts.")
    listen: str = _setting("127.0.0.1:0", "Address the worker listens on for gateways.")
    lease_s: float = _setting(
        60.0, "How long a worker keeps output of a gateway that went silent.", minimum=1.0
    )


@dataclass(frozen=True, slots=True)
class GatewayLinkSettings:
    """Which workers a gateway dispatches to."""

    gateway_id: str = _setting("gateway-0", "Name of this gateway; unique in the fleet.")
    workers: str = _setting("", "Addresses of the workers, separated by commas.")


@dataclass(frozen=True, slots=True)
class LifeSettings:
    """Starting and stopping."""

    drain_s: float = _setting(
        10.0, "On SIGTERM, how long running requests may go on, in seconds.", minimum=0.0
    )
    verbosity: str = _setting(
        "warning", "How much the log says.", choices=("debug", "info", "warning", "error")
    )


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """Event logs for `tools/replay_incident.py`. They hold what clients ask and are answered."""

    record_dir: str = _setting(
        "",
        "Folder for event logs, one per gateway, worker and replica; they hold prompts and answers "
        "as tokens. Empty: none are kept.",
    )
    record_answers: bool = _setting(
        False,
        "Keep what the cores answered too, not its digest alone: logs several times as large, in "
        "which a difference can be read.",
    )
    record_limit_mib: int = _setting(
        1024, "Size at which a log ends, in MiB; serving goes on.", minimum=1
    )


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """The first prompt lumen-serve answers by itself, to show that all works."""

    check_prompt: str = _setting(
        "The capital of France is", "Prompt completed once when ready; empty for none."
    )


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The whole tree. Programs use the sections they need; see `SECTIONS`."""

    model: ModelSettings = ModelSettings()
    devices: DeviceSettings = DeviceSettings()
    batching: BatchSettings = BatchSettings()
    front_door: FrontDoorSettings = FrontDoorSettings()
    worker: WorkerLinkSettings = WorkerLinkSettings()
    gateway: GatewayLinkSettings = GatewayLinkSettings()
    life: LifeSettings = LifeSettings()
    record: RecordSettings = RecordSettings()
    check: CheckSettings = CheckSettings()

    def __post_init__(self) -> None:
        """Refuse values out of range and contradictions. Raises ConfigurationError."""
        for section, name, info in settings():
            check_value(name, info, getattr(getattr(self, section), name))
        _check_contradictions(self)


# Sections of the tree that each program has flags for, in the order of its --help.
SECTIONS: dict[str, tuple[str, ...]] = {
    "lumen-serve": ("model", "devices", "batching", "front_door", "life", "record", "check"),
    "lumen-worker": ("model", "devices", "batching", "worker", "life", "record"),
    "lumen-gateway": ("model", "front_door", "gateway", "life", "record"),
}


def settings(sections: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, SettingInfo]]:
    """(section, setting name, what is known of it) of the sections named, or of the whole tree."""
    for section in dataclasses.fields(ServeConfig):
        if sections is None or section.name in sections:
            for leaf in dataclasses.fields(_section_type(section)):
                yield section.name, leaf.name, leaf.metadata["info"]


def _section_type(section: dataclasses.Field[Any]) -> Any:
    return type(section.default)


def check_value(name: str, info: SettingInfo, value: SettingValue) -> None:
    """Raise ConfigurationError unless the setting takes this value."""
    if value is None and info.unset:
        return
    number = info.kind is float and isinstance(value, int) and not isinstance(value, bool)
    if type(value) is not info.kind and not number:
        raise ConfigurationError(f"--{name} is {value!r}; it must be {_KIND_WORDS[info.kind]}.")
    if info.choices and value not in info.choices:
        raise ConfigurationError(
            f"--{name} is {value!r}; it must be one of {', '.join(info.choices)}."
        )
    if isinstance(value, int | float):
        if info.minimum is not None and not value >= info.minimum:
            raise ConfigurationError(f"--{name} is {value}; it must be at least {info.minimum}.")
        if info.maximum is not None and not value <= info.maximum:
            raise ConfigurationError(f"--{name} is {value}; it must be at most {info.maximum}.")


_KIND_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _check_contradictions(config: ServeConfig) -> None:
    door, batching = config.front_door, config.batching
    if door.http_port == door.grpc_port != 0:
        raise ConfigurationError(
            f"--http_port and --grpc_port are both {door.http_port}; each needs a port of its own."
        )
    if not door.host:
        raise ConfigurationError("--host is empty; name an address, for example 127.0.0.1.")
    if batching.token_budget <= batching.num_rows:
        raise ConfigurationError(
            f"--token_budget={batching.token_budget} is not more than --num_rows="
            f"{batching.num_rows}: decoding alone would fill every step; raise the one or lower "
            "the other."
        )
