"""A model placed on the devices of one replica, ready to be called by compiled programs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lumen.checkpoint.validation import check
from lumen.config import ModelConfig
from lumen.decoder import DecoderUnit, Embedding, Head
from lumen.errors import ModelConfigError
from lumen.placement import Path, Placement, Weights
from lumen.sharding import PARAMETER_SPECS, TENSOR_AXIS, HeadLayout
from lumen.tensor_source import TensorSource

Progress = Callable[[int, int], None]
"""Called with (modules loaded, modules in all): embedding, each unit, head."""


@dataclass(frozen=True, slots=True)
class ModuleDef[M: nnx.Module]:
    """A module without its weights. All units of a model share one.

    paths: of each parameter inside the module, in the order of `Weights`.
    global_shapes, dtypes: of the same parameters over the whole mesh.
    """

    graphdef: nnx.GraphDef[M]
    treedef: jax.tree_util.PyTreeDef
    paths: tuple[Path, ...]
    global_shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @property
    def specs(self) -> tuple[PartitionSpec, ...]:
        """Partition spec of each parameter: `in_specs` of a shard_map that takes `Weights`."""
        return tuple(PARAMETER_SPECS[str(path[-1])] for path in self.paths)

    def merge(self, weights: Sequence[jax.Array]) -> M:
        """The module with these weights: one device's, inside a shard_map."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))


def module_def[M: nnx.Module](build: Callable[[], M]) -> ModuleDef[M]:
    """Describe the module that `build` makes, without allocating it."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves, treedef = jax.tree.flatten(state)
    flat = nnx.to_flat_state(state)
    assert [param.get_value() for _, param in flat] == leaves, "two orders of one state"
    return ModuleDef(
        graphdef,
        treedef,
        tuple(path for path, _ in flat),
        tuple(leaf.shape for leaf in leaves),
        tuple(leaf.dtype for leaf in leaves),
    )


@dataclass(frozen=True, slots=True)
class ModelDefs:
    """The three kinds of module a model consists of, without weights."""

    embedding: ModuleDef[Embedding]
    unit: ModuleDef[DecoderUnit]
    head: ModuleDef[Head]


def model_defs(config: ModelConfig, heads: HeadLayout, dtype: Any) -> ModelDefs:
    """Describe a model's modules: all that compiling its programs needs."""
    return ModelDefs(
        module_def(lambda: Embedding(config, heads, dtype)),
        module_def(lambda: DecoderUnit(config, heads, dtype)),
        module_def(lambda: Head(config, heads, dtype)),
    )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on devices, and what is needed to run them.

    mesh: one axis, `lumen.sharding.TENSOR_AXIS`. dtype: of matrices and activations.
    units: weights of each unit, in layer order. If embeddings are tied, `embedding` and `head`
    hold the same table array. revision: identifies weights and dtype, for the prefix cache.
    """

    config: ModelConfig
    heads: HeadLayout
    mesh: Mesh
    dtype: Any
    defs: ModelDefs
    embedding: Weights
    units: tuple[Weights, ...]
    head: Weights
    revision: str


def load_model(
    source: TensorSource,
    mesh: Mesh,
    dtype: Any,
    progress: Progress | None = None,
    places: Mapping[int, Weights] | None = None,
) -> LoadedModel:
    """Read, fuse, cut and place all weights, one unit at a time.

    mesh: one axis named "tensor". dtype: float32, bfloat16 or float16. places: by number, of units
    that go where other arrays are now, like them in shapes, dtypes and sharding, and used up. At
    most one unit is held on the host. Raises CheckpointError if tensors are missing, extra,
    mis-shaped or truncated, ModelConfigError if mesh or dtype do not fit.
    """
    if mesh.axis_names != (TENSOR_AXIS,):
        raise ModelConfigError(
            f"The mesh has axes {mesh.axis_names}; a replica needs exactly ({TENSOR_AXIS!r},)."
        )
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ModelConfigError(
            f"Weights cannot be served as {dtype}; choose float32, bfloat16 or float16."
        )
    check(source)
    config = source.config
    heads = HeadLayout(config.num_heads, config.num_kv_heads, mesh.shape[TENSOR_AXIS])
    defs = model_defs(config, heads, dtype)
    placement = Placement(source, mesh, heads, dtype)
    total = config.num_units + 2

    def done(count: int) -> None:
        if progress is not None:
            progress(count, total)

    embedding = placement.embedding(defs.embedding.paths)
    done(1)
    units = []
    for unit in range(config.num_units):
        weights = placement.unit(defs.unit.paths, unit)
        place = (places or {}).get(unit)
        units.append(weights if place is None else _in_place_of(place, weights))
        done(2 + unit)
    tied_table = embedding[0] if config.tie_embeddings else None
    head = placement.head(defs.head.paths, tied_table)
    done(total)
    return LoadedModel(
        config, heads, mesh, dtype, defs, embedding, tuple(units), head,
        f"{source.revision}:{dtype}",
    )  # fmt: skip


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def _in_place_of(place: Weights, weights: Weights) -> Weights:
    """The same weights in the memory of `place`, which is donated."""
    return weights
