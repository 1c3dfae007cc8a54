"""What results are checked against: float64 NumPy, and how far a bfloat16 result may be off."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tools.bench.kernels.case import WrongResultError

Float64 = npt.NDArray[np.float64]

LIMIT = 1e-2
"""Of a vector's relative error. Rounding results and softmax weights to bfloat16 gives 2e-3 to
4e-3; a wrong tile, mask or scale gives far more."""

_CHECKED_ROWS = 64


def some_rows(rows: int) -> slice:
    """Of an array of `rows` that need not see each other: as many as NumPy has time for."""
    return slice(None, None, -(-rows // _CHECKED_ROWS))


def float64(array: Any) -> Float64:
    """From any device array."""
    found: Float64 = np.asarray(array).astype(np.float64)
    return found


def require_close(what: str, found: Any, expected: Float64) -> None:
    """Compare vectors along the last axis. Raises WrongResultError, also for a NaN."""
    got = float64(found)
    if got.shape != expected.shape:
        raise WrongResultError(f"{what}: shape {got.shape}, expected {expected.shape}")
    off = np.linalg.norm(got - expected, axis=-1)
    # Where the reference is zero any difference is infinitely wrong.
    scale = np.linalg.norm(expected, axis=-1)
    error = np.divide(off, scale, out=np.where(off == 0, 0.0, np.inf), where=scale > 0)
    if not np.all(error <= LIMIT):
        worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        at = tuple(int(index) for index in worst)
        raise WrongResultError(
            f"{what}: relative error {error[worst]:.2g} at {at}, at most {LIMIT:g} is rounding"
        )


def require_equal(what: str, found: Any, expected: Any) -> None:
    """Compare bit by bit. Raises WrongResultError."""
    got, wanted = np.asarray(found), np.asarray(expected)
    if got.shape != wanted.shape or got.tobytes() != wanted.tobytes():
        raise WrongResultError(f"{what}: not the expected bits")


def attention(q: Float64, k: Float64, v: Float64, positions: Any, scale: float) -> Float64:
    """q [queries, heads, head_dim] at `positions` [queries], over k, v [tokens, kv heads,
    head_dim] up to their own position. Returns the output, shaped as q."""
    queries, heads, head_dim = q.shape
    tokens, kv_heads, _ = k.shape
    group = heads // kv_heads
    # [kv heads, queries * group, ...]: matrix products, which NumPy leaves to BLAS
    by_head = q.reshape(queries, kv_heads, group, head_dim).swapaxes(0, 1)
    grouped = by_head.reshape(kv_heads, queries * group, head_dim)
    scores = grouped @ k.transpose(1, 2, 0) * scale
    limits = np.repeat(np.asarray(positions), group)[:, None]
    scores = np.where(np.arange(tokens) > limits, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = weights @ v.swapaxes(0, 1) / weights.sum(axis=-1, keepdims=True)
    by_query = out.reshape(kv_heads, queries, group, head_dim).swapaxes(0, 1)
    result: Float64 = by_query.reshape(q.shape)
    return result


def rms_norm(x: Float64, weight: Float64, eps: float) -> Float64:
    """x [rows, n] scaled to unit mean square, times weight [n]."""
    mean: Float64 = np.mean(x * x, axis=1, keepdims=True)
    return x / np.sqrt(mean + eps) * weight


def merge(outs: Float64, lses: Float64) -> Float64:
    """Parts [parts, tokens, heads, head_dim] weighted by their log-sum-exp [parts, tokens, heads];
    parts of -inf count nothing, and zeros come out where all are."""
    best = lses.max(axis=0)
    weights = np.exp(lses - np.where(np.isneginf(best), 0.0, best))
    total = weights.sum(axis=0)
    weights /= np.where(total > 0, total, 1.0)
    kept = np.where((weights > 0)[..., None], outs, 0.0)
    merged: Float64 = (weights[..., None] * kept).sum(axis=0)
    return merged
