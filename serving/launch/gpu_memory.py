"""--memory_fraction on a GPU: of all its memory, what JAX takes, and what weights and KV get.

JAX takes its share of a GPU at once, by default three quarters. Lumen has it take what
--memory_fraction names and a little more: room for what programs need while they run. The rest of
the GPU is left to CUDA itself and to libraries that allocate beside JAX.
"""

from collections.abc import Mapping, MutableMapping

from serving.errors import ConfigurationError

JAX_SHARE = "XLA_CLIENT_MEM_FRACTION"
_OLD_JAX_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX refuses to find both

_WORKING_SHARE = 0.05
"""Of a GPU, for temporaries: less where as little is left outside JAX, but never nothing."""
_LEAST_WORKING_SHARE = 0.01


def claim_for_jax(memory_fraction: float, environ: MutableMapping[str, str]) -> None:
    """Have JAX take its share of each GPU, unless the environment already says what that is.

    Call before the backend starts. Raises ConfigurationError if the environment makes no sense.
    """
    share = jax_share(memory_fraction, environ)
    if not (environ.get(JAX_SHARE) or environ.get(_OLD_JAX_SHARE)):
        environ[JAX_SHARE] = str(share)


def jax_share(memory_fraction: float, environ: Mapping[str, str]) -> float:
    """Share of each GPU that JAX takes: as the environment says, else by `memory_fraction`.

    Raises ConfigurationError if the environment makes no sense.
    """
    for name in (JAX_SHARE, _OLD_JAX_SHARE):
        text = environ.get(name)
        if not text:
            continue
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0.0 < share <= 1.0:
            raise ConfigurationError(
                f"{name} is {text!r} in the environment; it must be a share of the GPU's memory, "
                "more than 0 and at most 1. Without it, --memory_fraction decides."
            )
        return share
    return round(memory_fraction + min(_WORKING_SHARE, (1.0 - memory_fraction) / 2), 6)


def share_of_jax(memory_fraction: float, environ: Mapping[str, str]) -> float:
    """The same bytes as `memory_fraction` of the GPU, as a share of what JAX takes of it.

    Less if the environment leaves JAX too little for them and for temporaries.
    """
    share = jax_share(memory_fraction, environ)
    working = min(_WORKING_SHARE, max(1.0 - share, _LEAST_WORKING_SHARE), share / 2)
    return min(memory_fraction, share - working) / share
