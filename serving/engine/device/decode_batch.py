"""Device copies of what a decode step reads of its rows, kept for as long as they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from serving.engine.device.head_programs import HeadKind
from serving.engine.device.rows import RowState
from serving.engine.plan import Int32


@dataclass(slots=True)
class DecodeBatch:
    """Some rows on the device, padded to a bucket.

    rows: int32 [n]; padded: int32 [bucket]. lengths: tokens including the one to be decoded; each
    step returns those of the next. versions: of the host's tables, lengths and sampling parameters
    when they were copied.
    """

    rows: Int32
    bucket: int
    padded: Int32
    device_rows: jax.Array
    tables: jax.Array
    lengths: jax.Array
    sampling: jax.Array
    kind: HeadKind
    versions: tuple[int, int, int]


class DecodeBatches:
    """Keeps the last batch: a steady decode step copies nothing to the device."""

    def __init__(
        self, state: RowState, buckets: Sequence[int], put: Callable[[Any], jax.Array]
    ) -> None:
        self._state = state
        self._buckets = buckets
        self._put = put
        self._last: DecodeBatch | None = None

    def of(self, rows: Int32) -> DecodeBatch:
        """The batch of these rows, with what changed on the host since it was last used."""
        state, batch, put = self._state, self._last, self._put
        versions = (state.tables_version, state.lengths_version, state.sampling_version)
        if batch is None or not np.array_equal(batch.rows, rows):
            bucket = bucket_of(self._buckets, rows.size)
            padded: Int32 = np.full(bucket, state.padding, np.int32)
            padded[: rows.size] = rows
            batch = DecodeBatch(
                rows.copy(), bucket, padded, put(padded), put(state.tables(padded)),
                put(state.next_lengths(padded)), put(state.sampling(padded)),
                state.head_kind(rows, masked=False), versions,
            )  # fmt: skip
            self._last = batch
            return batch
        if versions != batch.versions:
            tables, lengths, sampling = batch.versions
            if versions[0] != tables:
                batch.tables = put(state.tables(batch.padded))
            if versions[1] != lengths:
                batch.lengths = put(state.next_lengths(batch.padded))
            if versions[2] != sampling:
                batch.sampling = put(state.sampling(batch.padded))
                batch.kind = state.head_kind(rows, masked=False)
            batch.versions = versions
        return batch

    def forget(self) -> None:
        """Keep no batch."""
        self._last = None


def bucket_of(buckets: Sequence[int], size: int) -> int:
    """The smallest of the ascending buckets that holds so many."""
    return next(bucket for bucket in buckets if bucket >= size)
