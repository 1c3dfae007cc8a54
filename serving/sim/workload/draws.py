"""Random numbers of workloads, and checks of what describes them."""

import math

import numpy as np

from serving.errors import ConfigurationError

MOST_REQUESTS = 100_000_000  # of a workload: of more, the columns alone are gigabytes


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers of one purpose; those of another do not depend on how many were drawn.

    Raises ConfigurationError if the seed is negative.
    """
    whole("seed", seed, least=0)
    return np.random.default_rng((seed, *purpose.encode()))


def positive(name: str, value: float) -> None:
    """Raise ConfigurationError unless `value` is more than 0 and finite."""
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be more than 0 and finite, not {value:g}.")


def not_negative(name: str, value: float) -> None:
    """Raise ConfigurationError unless `value` is at least 0 and finite."""
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"{name} must be at least 0 and finite, not {value:g}.")


def whole(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Raise ConfigurationError unless `value` is at least `least` and at most `most`."""
    if value < least:
        raise ConfigurationError(f"{name} must be at least {least}, not {value}.")
    if most is not None and value > most:
        raise ConfigurationError(f"{name} must be at most {most}, not {value}.")
