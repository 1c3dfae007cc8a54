"""Operands of a chain of small layers, and what it should make of them, in float64."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from lumen_kernels.dense_chain import Weights, cut, dense_chain, no_meetings
from lumen_kernels.target import HOPPER, interpreted

EPS = 0.3  # large enough to be missed if it were left out
ROWS_OF_NORMS = 6


@dataclass(frozen=True)
class Shape:
    """Widths of a layer. qkv: None where no layer follows."""

    hidden: int
    q: int
    inner: int
    qkv: int | None

    def cut(self, m, cores):
        phases = cut.layer_phases(self.hidden, self.q, self.inner, self.qkv)
        return cut.fitted(m, phases, cores)


def on(cores):
    """A Hopper of few cores, interpreted: small layers are cut like large ones on a chip."""
    return interpreted(dataclasses.replace(HOPPER, cores=cores))


def operands(shape, m, dtype=jnp.bfloat16, seed=0):
    """attended, hidden, weights, norms: every part of the chain counts about as much."""
    random = np.random.default_rng(seed)

    def normal(*size):
        return jnp.asarray(random.normal(size=size), dtype)

    def matrix(*size):
        return jnp.asarray(random.normal(size=size) / np.sqrt(size[1]), dtype)

    weights = Weights(
        o=matrix(shape.hidden, shape.q),
        gate_up=matrix(2 * shape.inner, shape.hidden),
        down=matrix(shape.hidden, shape.inner),
        qkv=None if shape.qkv is None else matrix(shape.qkv, shape.hidden),
    )
    norms = random.uniform(0.5, 1.5, size=(ROWS_OF_NORMS, shape.hidden))
    return normal(m, shape.q), normal(m, shape.hidden), weights, jnp.asarray(norms, jnp.float32)


def run(given, norm, target, **options):
    """Hidden states and projections."""
    out, projected, _ = dense_chain(
        *given, no_meetings(), norm=norm, eps=EPS, target=target, **options
    )
    return out, projected


def exact(given, norm):
    """The same in float64."""
    attended, hidden, weights, norms = jax.tree.map(lambda x: np.asarray(x, np.float64), given)

    def normed(x, row):
        return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS) * norms[row]

    hidden = hidden + attended @ weights.o.T
    gate, up = np.split(normed(hidden, norm) @ weights.gate_up.T, 2, axis=1)
    hidden = hidden + (gate * up / (1 + np.exp(-gate))) @ weights.down.T
    if weights.qkv is None:
        return hidden, None
    return hidden, normed(hidden, norm + 1) @ weights.qkv.T


def worst_row(found, expected):
    """The largest relative error of any row; infinite where it is not a number."""
    expected = np.asarray(expected, np.float64)
    off = np.linalg.norm(np.asarray(found, np.float64) - expected, axis=1)
    return np.nan_to_num(off / np.linalg.norm(expected, axis=1), nan=np.inf).max()
