"""Which kernels of ours a model's programs call, and so what XLA does alone."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.arena import slot_shape
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.model import model_defs
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.programs import ProgramBuilder

_ROWS, _CHUNK, _SEQUENCES, _BLOCKS = 8, 32, 4, 64
_FUNCTION = re.compile(r"^  func\.func \w+ @(\w+?)(?:_\d+)?\(", re.MULTILINE)
_CALL = "custom_call @mosaic_gpu"


def kernels(
    config: ModelConfig,
    dtype: Any,
    block_size: int,
    target: Target,
    platform: str,
    devices: int = 1,
) -> dict[str, dict[str, int]]:
    """Of a decode and a prefill unit: the functions that call a kernel, and how many calls.

    platform: to lower for, as JAX names it, whatever devices are here. devices: that share a layer.
    Layers of a program share kernels, so these are not launches.
    """
    heads = HeadLayout(config.num_heads, config.num_kv_heads, devices)
    layout = ArenaLayout(
        _BLOCKS, config.num_layers * heads.kv_per_device, heads.kv_per_device, block_size,
        slot_shape(block_size, config.head_dim, target), jnp.dtype(dtype),
    )  # fmt: skip
    mesh = Mesh(np.array(jax.devices()[:devices]), (TENSOR_AXIS,))
    shapes = ProgramShapes(
        config, model_defs(config, heads, jnp.dtype(dtype)), mesh, jnp.dtype(dtype), layout, _ROWS,
        _BLOCKS, 1,
    )  # fmt: skip
    lowerings = ProgramBuilder(shapes, target, (platform,)).lowerings([_ROWS], {_CHUNK: _SEQUENCES})
    return {
        "decode": calls(lowerings["decode_unit", _ROWS]().as_text()),
        "prefill": calls(lowerings["prefill_unit", _CHUNK]().as_text()),
    }


def calls(text: str) -> dict[str, int]:
    """Kernel calls of a lowered program by the function that makes them."""
    found: Counter[str] = Counter()
    starts = list(_FUNCTION.finditer(text))
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        body = text[start.end() : after.start() if after else len(text)]
        if count := body.count(_CALL):
            found[start[1]] += count
    return dict(found)
