"""`random:<preset>`: a model of a known shape with deterministic random weights.

The logical model is the same whatever the tensor parallelism, the platform, and whether tensors
are read on the host or generated on the devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumen.checkpoint.layout import required_shapes
from lumen.config import ModelConfig
from lumen.errors import CheckpointError
from lumen.presets import preset
from lumen.weight_rule import salt, weight_values

RANDOM_PREFIX = "random:"


class RandomWeights:
    """A TensorSource of random weights, which can also be traced into a program on a device."""

    def __init__(self, config: ModelConfig, name: str, seed: int = 0) -> None:
        self._config = config
        self._name = name
        self._seed = seed
        self._shapes = required_shapes(config)

    @property
    def config(self) -> ModelConfig:
        """The model these tensors belong to."""
        return self._config

    @property
    def revision(self) -> str:
        """The preset and the seed; the rule itself never changes under a name."""
        return f"{RANDOM_PREFIX}{self._name}:{self._seed}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name to shape."""
        return self._shapes

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor on the host, float32. Raises CheckpointError for an unknown name."""
        values: np.ndarray[Any, np.dtype[Any]] = weight_values(
            name, self._shape(name), np.uint32(self.salt(name)), np
        )
        return values

    def salt(self, name: str) -> int:
        """The uint32 that `generate` needs for this tensor."""
        return salt(self._seed, name)

    def generate(self, name: str, salt: jax.Array) -> jax.Array:
        """The same values as `read`, traceable.

        salt: uint32 scalar, that of the tensor wanted; `name` decides shape and kind only. So one
        compiled program makes the tensors of every layer.
        """
        values: jax.Array = weight_values(name, self._shape(name), salt, jnp)
        return values

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(
                f"The model {RANDOM_PREFIX}{self._name} has no tensor named {name!r}."
            )
        return self._shapes[name]


def random_weights(model: str, seed: int = 0) -> RandomWeights:
    """The source for a model name such as "random:llama-3.1-8b".

    Raises ModelConfigError for an unknown preset, naming the known ones.
    """
    name = model.removeprefix(RANDOM_PREFIX)
    return RandomWeights(preset(name), name, seed)
