"""The decoder of the Llama family and its close relatives, in units of layers.

Llama 2/3.x, Mistral, SmolLM2, Qwen2/2.5 (QKV bias), Qwen3 (QK norm). Modules see the shapes of
one device: under tensor parallelism they run inside `jax.shard_map` and sum over `axis_name`
themselves. What attention reads and writes is the caller's business, and so are positions: a unit
hands a layer's projections and an opaque arena to an `attend` function.

Matrices are [out, in], Hugging Face's orientation. Norms and biases are float32, everything else
has the model's dtype; sums inside norms, rotations and activations are in float32.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from lumen_kernels.dense_chain import Weights, dense_chain, first_norm, rms_norm
from lumen_kernels.matmul import matmul
from lumen_kernels.reduce_norm import Mail, SumOverDevices
from lumen_kernels.rotary_write import Projections
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.sharding import HeadLayout, padded


class Attend(Protocol):
    """Attention of one layer: writes k and v to the arena and returns what q reads from it."""

    def __call__(
        self, layer_in_unit: int, projections: Projections, arena: Any
    ) -> tuple[jax.Array, Any]:
        """Attend.

        projections: q, k and v of the layer, to be rotated, in the model's dtype. Returns the
        outputs [tokens, q heads, head_dim] and the arena. Scores are q·k times head_dim ** -0.5.
        """
        ...


def _sum_over(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.psum(x, axis_name)


class Embedding(nnx.Module):
    """Token ids to hidden states. `table`: [padded vocabulary, hidden]."""

    def __init__(self, config: ModelConfig, heads: HeadLayout, dtype: Any) -> None:
        shape = (padded(config.vocab_size, heads.tensor), config.hidden_size)
        self.table = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(self, tokens: jax.Array, axis_name: str | None = None) -> jax.Array:
        """int32 [tokens], all in the vocabulary, to [tokens, hidden] in the model's dtype."""
        table = self.table[...]
        if axis_name is None:
            return table.at[tokens].get(mode="clip")
        rows = table.shape[0]
        local = tokens - lax.axis_index(axis_name) * rows
        mine = (local >= 0) & (local < rows)
        found = table.at[jnp.where(mine, local, 0)].get(mode="clip")
        return _sum_over(jnp.where(mine[:, None], found, 0), axis_name)


class DecoderLayer(nnx.Module):
    """The matrices of one layer, fused: qkv = [q | k | v], gate_up = [gate | up] per device."""

    def __init__(self, config: ModelConfig, heads: HeadLayout, dtype: Any) -> None:
        hidden, tensor = config.hidden_size, heads.tensor
        q_width = tensor * heads.q_per_device * config.head_dim
        kv_width = tensor * heads.kv_per_device * config.head_dim
        inner = padded(config.intermediate_size, tensor)
        self.qkv = nnx.Param(jnp.zeros((q_width + 2 * kv_width, hidden), dtype))
        self.o = nnx.Param(jnp.zeros((hidden, q_width), dtype))
        self.gate_up = nnx.Param(jnp.zeros((2 * inner, hidden), dtype))
        self.down = nnx.Param(jnp.zeros((hidden, inner), dtype))


class DecoderUnit(nnx.Module):
    """`config.unit_layers` consecutive decoder layers.

    norms float32 [layers, 2, hidden]: before attention, before the feed-forward block.
    qkv_bias float32 [layers, qkv rows], if the family has it.
    qk_norms float32 [layers, 2, head_dim]: of queries, of keys; if the family has them.
    """

    def __init__(self, config: ModelConfig, heads: HeadLayout, dtype: Any) -> None:
        self.config = config
        layers = config.unit_layers
        self.layers = nnx.List([DecoderLayer(config, heads, dtype) for _ in range(layers)])
        self.norms = nnx.Param(jnp.zeros((layers, 2, config.hidden_size), jnp.float32))
        if config.qkv_bias:
            rows = heads.tensor * (heads.q_per_device + 2 * heads.kv_per_device) * config.head_dim
            self.qkv_bias = nnx.Param(jnp.zeros((layers, rows), jnp.float32))
        if config.qk_norm:
            self.qk_norms = nnx.Param(jnp.zeros((layers, 2, config.head_dim), jnp.float32))

    def __call__(
        self,
        hidden: jax.Array,
        arena: Any,
        attend: Attend,
        target: Target,
        axis_name: str | None = None,
        kept: jax.Array | None = None,
        mail: Mail | None = None,
    ) -> tuple[jax.Array, Any]:
        """Run the unit's layers.

        hidden [tokens, hidden] in the model's dtype; target: of the mesh this is traced for.
        kept: int32 [k], the tokens whose hidden states are wanted; None: all. Of the others the
        last layer computes keys and values and no more, and `attend` returns its outputs for those
        kept. mail: for sums over devices by a kernel. Returns the new hidden states and the arena
        as `attend` left it.
        """
        eps, layers = self.config.rms_norm_eps, list(self.layers)
        reduce = None if axis_name is None else SumOverDevices(axis_name, mail)
        norms = self.norms[...].reshape(2 * len(layers), -1)
        x, meetings = first_norm(hidden, norms, eps=eps, target=target)
        projected: jax.Array | None = matmul(x, layers[0].qkv[...], target=target)
        for index, layer in enumerate(layers):
            assert projected is not None  # a layer that has one after it projects for it
            attended, arena = attend(index, self._projections(index, projected), arena)
            if kept is not None and index + 1 == len(layers):
                hidden = hidden[kept]
            following = layers[index + 1].qkv[...] if index + 1 < len(layers) else None
            hidden, projected, meetings = dense_chain(
                attended.reshape(attended.shape[0], -1),
                hidden,
                Weights(layer.o[...], layer.gate_up[...], layer.down[...], following),
                norms,
                meetings,
                norm=2 * index + 1,
                eps=eps,
                target=target,
                reduce=reduce,
            )
        return hidden, arena

    def _projections(self, index: int, fused: jax.Array) -> Projections:
        """A layer's projections [tokens, qkv rows] with what the family adds to them."""
        config = self.config
        bias = self.qkv_bias[index] if config.qkv_bias else None
        norms = self.qk_norms[index] if config.qk_norm else None
        return Projections(fused, bias, norms)


class Head(nnx.Module):
    """Final norm and lm head. `table`: [padded vocabulary, hidden], the embedding's if tied."""

    def __init__(self, config: ModelConfig, heads: HeadLayout, dtype: Any) -> None:
        self.config = config
        self.norm = nnx.Param(jnp.zeros((config.hidden_size,), jnp.float32))
        shape = (padded(config.vocab_size, heads.tensor), config.hidden_size)
        self.table = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(
        self, hidden: jax.Array, target: Target, axis_name: str | None = None
    ) -> jax.Array:
        """[tokens, hidden] to logits float32 [tokens, vocabulary], whole on every device."""
        x = rms_norm(hidden, self.norm[...], self.config.rms_norm_eps)
        logits = matmul(x, self.table[...], target=target, out_dtype=jnp.float32)
        if axis_name is not None:
            logits = lax.all_gather(logits, axis_name, axis=1, tiled=True)
        return logits[:, : self.config.vocab_size]
