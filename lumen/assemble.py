"""From logical tensors to the fused, padded parameters of one device.

Works on whatever has slices and `astype`: numpy arrays read from files, or traced jax arrays that
are being generated on the device itself. `xp` is the array namespace, numpy or jax.numpy.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from lumen.checkpoint.layout import EMBEDDING, FINAL_NORM, HEAD, layer_shapes
from lumen.config import ModelConfig
from lumen.sharding import HeadLayout, padded

Read = Callable[[str], Any]
"""Canonical tensor name to array, as `TensorSource.read`."""

Parameters = dict[tuple[Hashable, ...], Any]
"""Path of a parameter inside its module, ("layers", 2, "qkv"), to one device's array."""


def embedding_parameters(
    read: Read, config: ModelConfig, heads: HeadLayout, device: int, dtype: Any, xp: Any
) -> Parameters:
    """Parameters of `lumen.decoder.Embedding` on one device."""
    table = _part(read(EMBEDDING), 0, device, heads.tensor, config.vocab_size, xp)
    return {("table",): table.astype(dtype)}


def head_parameters(
    read: Read, config: ModelConfig, heads: HeadLayout, device: int, dtype: Any, xp: Any
) -> Parameters:
    """Parameters of `lumen.decoder.Head` on one device, without the table if it is tied."""
    parameters: Parameters = {("norm",): read(FINAL_NORM).astype("float32")}
    if not config.tie_embeddings:
        table = _part(read(HEAD), 0, device, heads.tensor, config.vocab_size, xp)
        parameters["table",] = table.astype(dtype)
    return parameters


def unit_parameters(
    read: Read, config: ModelConfig, heads: HeadLayout, device: int, dtype: Any, xp: Any
) -> Parameters:
    """Parameters of one `lumen.decoder.DecoderUnit` on one device.

    read: takes the names of unit 0, whichever unit is being assembled, so that one traced program
    serves all.
    """
    parameters: Parameters = {}
    packed: dict[str, list[Any]] = {}
    for index in range(config.unit_layers):
        tensors = {name: read(f"model.layers.{index}.{name}") for name in layer_shapes(config)}
        for name, matrix in _layer_matrices(tensors, config, heads, device, xp).items():
            parameters["layers", index, name] = matrix.astype(dtype)
        for name, vector in _layer_vectors(tensors, config, heads, device, xp).items():
            packed.setdefault(name, []).append(vector.astype("float32"))
    return parameters | {(name,): xp.stack(vectors) for name, vectors in packed.items()}


def _layer_matrices(
    tensors: Mapping[str, Any], config: ModelConfig, heads: HeadLayout, device: int, xp: Any
) -> dict[str, Any]:
    """The four fused matrices of one layer on one device."""
    q_heads, kv_heads, dim = heads.q_heads(device), heads.kv_heads(device), config.head_dim
    inner, tensor = config.intermediate_size, heads.tensor
    qkv = [
        _pick_heads(tensors["self_attn.q_proj.weight"], q_heads, dim, 0, xp),
        _pick_heads(tensors["self_attn.k_proj.weight"], kv_heads, dim, 0, xp),
        _pick_heads(tensors["self_attn.v_proj.weight"], kv_heads, dim, 0, xp),
    ]
    gate_up = [
        _part(tensors["mlp.gate_proj.weight"], 0, device, tensor, inner, xp),
        _part(tensors["mlp.up_proj.weight"], 0, device, tensor, inner, xp),
    ]
    return {
        "qkv": xp.concatenate(qkv),
        "o": _pick_heads(tensors["self_attn.o_proj.weight"], q_heads, dim, 1, xp),
        "gate_up": xp.concatenate(gate_up),
        "down": _part(tensors["mlp.down_proj.weight"], 1, device, tensor, inner, xp),
    }


def _layer_vectors(
    tensors: Mapping[str, Any], config: ModelConfig, heads: HeadLayout, device: int, xp: Any
) -> dict[str, Any]:
    """The packed vectors of one layer on one device."""
    norms = [tensors["input_layernorm.weight"], tensors["post_attention_layernorm.weight"]]
    vectors = {"norms": xp.stack(norms)}
    if config.qkv_bias:
        q_heads, kv_heads, dim = heads.q_heads(device), heads.kv_heads(device), config.head_dim
        bias = [
            _pick_heads(tensors["self_attn.q_proj.bias"], q_heads, dim, 0, xp),
            _pick_heads(tensors["self_attn.k_proj.bias"], kv_heads, dim, 0, xp),
            _pick_heads(tensors["self_attn.v_proj.bias"], kv_heads, dim, 0, xp),
        ]
        vectors["qkv_bias"] = xp.concatenate(bias)
    if config.qk_norm:
        norms = [tensors["self_attn.q_norm.weight"], tensors["self_attn.k_norm.weight"]]
        vectors["qk_norms"] = xp.stack(norms)
    return vectors


def _slice(array: Any, axis: int, start: int, stop: int) -> Any:
    return array[start:stop] if axis == 0 else array[:, start:stop]


def _zeros(array: Any, axis: int, size: int, xp: Any) -> Any:
    shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
    return xp.zeros(shape, array.dtype)


def _part(array: Any, axis: int, device: int, tensor: int, size: int, xp: Any) -> Any:
    """Slice number `device` of `tensor` equal ones along an axis of `size`, padded with zeros."""
    width = padded(size, tensor) // tensor
    part = _slice(array, axis, min(device * width, size), min((device + 1) * width, size))
    missing = width - part.shape[axis]
    if not missing:
        return part
    return xp.concatenate([part, _zeros(array, axis, missing, xp)], axis=axis)


def _pick_heads(
    array: Any, heads: tuple[int | None, ...], head_dim: int, axis: int, xp: Any
) -> Any:
    """Heads of `head_dim` rows (or columns) in the given order, zeros for None."""
    if None not in heads and heads == tuple(range(heads[0] or 0, (heads[0] or 0) + len(heads))):
        first = heads[0] or 0
        return _slice(array, axis, first * head_dim, (first + len(heads)) * head_dim)
    pieces = [
        _zeros(array, axis, head_dim, xp)
        if head is None
        else _slice(array, axis, head * head_dim, (head + 1) * head_dim)
        for head in heads
    ]
    return xp.concatenate(pieces, axis=axis)
