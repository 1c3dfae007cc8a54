"""A deployment on a TPU slice: its weights and its KV arena, laid out as serving would."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.errors import LumenError
from lumen.model import ModelDefs, model_defs
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device.arena import ArenaLayout, arena_layout
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.memory import DeviceMemory
from serving.engine.device.program_shapes import ProgramShapes
from serving.errors import ConfigurationError
from tools.aot.hlo_checks import memory_of
from tools.aot.topologies import HBM_BYTES, Slice, device_count, devices_of, host_count


class DoesNotFitError(LumenError):
    """A deployment needs more memory than a device of the slice has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is to run where. name: of the model, for people."""

    name: str
    model: ModelConfig
    settings: DeviceExecutorConfig
    tensor_parallel: int
    slice: Slice


@dataclass(frozen=True, slots=True)
class ModuleBytes:
    """Weights on each device, in bytes, as the compiler lays them out. unit: of one unit."""

    embedding: int
    unit: int
    head: int
    whole: int  # of the model; tied embeddings count once


@dataclass(frozen=True, slots=True)
class Plan:
    """A deployment with its arena decided: all that compiling needs.

    hosts: of the whole slice. replica_hosts: that the first replica's devices belong to.
    """

    deployment: Deployment
    shapes: ProgramShapes
    weights: ModuleBytes
    hosts: int
    replica_hosts: int

    @property
    def hbm_bytes(self) -> int:
        """What programs may use on one device."""
        return HBM_BYTES[self.deployment.slice.generation]

    @property
    def arena_bytes(self) -> int:
        """The arena of one device."""
        layout = self.shapes.arena_layout
        return layout.num_blocks * layout.block_bytes

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV one replica holds."""
        return self.shapes.arena_layout.num_blocks * self.shapes.arena_layout.block_size

    @property
    def replicas(self) -> int:
        """Copies of the model on the slice."""
        return device_count(self.deployment.slice) // self.deployment.tensor_parallel


def plan(deployment: Deployment) -> Plan:
    """Lay a deployment out on its slice as serving would on the devices themselves.

    Raises ConfigurationError if libtpu is missing or settings contradict the model,
    DoesNotFitError if weights and the KV of one request do not fit.
    """
    devices = devices_of(deployment.slice)
    mesh = Mesh(np.array(devices[: deployment.tensor_parallel]), (TENSOR_AXIS,))
    model, settings = deployment.model, deployment.settings
    heads = HeadLayout(model.num_heads, model.num_kv_heads, deployment.tensor_parallel)
    dtype = jnp.dtype(settings.dtype)
    defs = model_defs(model, heads, dtype)
    target = Target.of(devices)

    def shapes(layout: ArenaLayout) -> ProgramShapes:
        return ProgramShapes(
            model, defs, mesh, dtype, layout, settings.num_rows,
            -(-settings.max_model_len // settings.block_size),
            min(settings.max_logprobs, model.vocab_size),
        )  # fmt: skip

    one_request = dataclasses.replace(
        settings, arena_bytes=None, num_blocks=-(-settings.max_model_len // settings.block_size)
    )
    smallest = arena_layout(model, heads, dtype, one_request, None, target)
    weights = _module_bytes(model, defs, shapes(smallest))
    hbm = HBM_BYTES[deployment.slice.generation]
    _check_weights(deployment, weights.whole, smallest)
    memory = DeviceMemory(
        f"a {deployment.slice.generation} device", hbm, hbm - weights.whole, shared_with_host=False
    )
    try:
        layout = arena_layout(model, heads, dtype, settings, memory, target)
    except ConfigurationError as error:
        raise DoesNotFitError(str(error)) from error
    mine = list(mesh.devices.flat)
    return Plan(deployment, shapes(layout), weights, host_count(devices), host_count(mine))


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"


def argument_bytes(weights: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    """Bytes of arrays on one device, padding of their layout included.

    Raises JaxRuntimeError if they do not fit it.
    """

    def nothing(*weights: jax.Array) -> None:
        return None

    compiled = jax.jit(nothing, keep_unused=True).lower(*weights).compile()
    size: int = memory_of(compiled).argument_size_in_bytes
    return size


def _module_bytes(model: ModelConfig, defs: ModelDefs, shapes: ProgramShapes) -> ModuleBytes:
    embedding, unit, head = (
        argument_bytes(shapes.weights(module)) for module in (defs.embedding, defs.unit, defs.head)
    )
    tied = embedding if model.tie_embeddings else 0
    return ModuleBytes(embedding, unit, head, embedding + unit * model.num_units + head - tied)


def _check_weights(deployment: Deployment, weights: int, one_request: ArenaLayout) -> None:
    """Raise DoesNotFitError if the weights leave no room for the KV of one request."""
    settings, generation = deployment.settings, deployment.slice.generation
    budget = int(HBM_BYTES[generation] * settings.memory_fraction)
    request = one_request.num_blocks * one_request.block_bytes
    if weights + request <= budget:
        return
    # Weights and KV both shrink with the number of devices, as far as heads divide.
    width = deployment.tensor_parallel
    enough = next(w for w in (width * 2**n for n in range(1, 20)) if
                  (weights + request) * width <= budget * w)  # fmt: skip
    raise DoesNotFitError(
        f"Weights take {gib(weights)} of each {generation} device and the KV of one request of "
        f"{settings.max_model_len} tokens {gib(request)}, but --memory_fraction="
        f"{settings.memory_fraction} allows {gib(budget)} of its {gib(HBM_BYTES[generation])}; "
        f"try --tensor_parallel={enough}."
    )
