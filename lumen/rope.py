"""Rotary position embeddings, with the context stretching of Llama 3.1.

RoFormer (Su et al., 2021), section 3.4; pairs are (i, i + head_dim / 2) as in Hugging Face's
Llama.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumen.config import ModelConfig
from lumen.errors import ModelConfigError


def inverse_frequencies(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Radians per position of each rotary pair, float32 [head_dim / 2].

    Raises ModelConfigError for an unknown scaling kind.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind == "llama3":
        # Turns that a pair makes over the original context decide how much it is slowed.
        turns = scaling.original_max_position * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        slowed = frequencies / scaling.factor
        return (kept * frequencies + (1 - kept) * slowed).astype(np.float32)
    raise ModelConfigError(
        f"Rope scaling {scaling.kind!r} is not supported; supported are 'linear' and 'llama3'."
    )


def rotation(positions: jax.Array, frequencies: np.ndarray[Any, np.dtype[np.float32]]) -> jax.Array:
    """Cosines, then sines, for int32 positions [tokens]: float32 [tokens, head_dim].

    What `lumen_kernels.rotary_write` takes: the same for all layers of a step.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
