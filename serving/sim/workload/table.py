"""Many requests in little memory: a column for each field, and requests made when asked for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import overload

import numpy as np
import numpy.typing as npt

from serving.sim.workload.requests import INTERACTIVE, ServiceClass, WorkloadRequest

Seconds = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice

_CHUNK = 4096  # requests made at a time while iterating


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable(Sequence[WorkloadRequest]):
    """Requests as columns; a sequence of WorkloadRequest, equal to any other with the same ones.

    at_s: float64 [requests]. prompt, output: int64 [requests]. service, tenant: int32 [requests],
    places in `services` and `tenants`. prefix: of each request; empty where no request has one.
    The columns are made read-only.
    """

    at_s: Seconds
    prompt: Tokens
    output: Tokens
    service: Codes
    tenant: Codes
    services: tuple[ServiceClass, ...] = (INTERACTIVE,)
    tenants: tuple[str, ...] = ("",)
    prefix: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for column in (self.at_s, self.prompt, self.output, self.service, self.tenant):
            column.flags.writeable = False

    @classmethod
    def plain(
        cls,
        at_s: Sequence[float] | Seconds,
        prompt: Sequence[int] | Tokens,
        output: Sequence[int] | Tokens,
        prefix: tuple[tuple[int, ...], ...] = (),
    ) -> "RequestTable":
        """Requests of nobody in particular, promised nothing."""
        nobody = np.zeros(len(at_s), np.int32)
        return cls(
            at_s=np.array(at_s, np.float64),
            prompt=np.array(prompt, np.int64),
            output=np.array(output, np.int64),
            service=nobody,
            tenant=nobody,
            prefix=prefix,
        )

    @classmethod
    def of(cls, requests: Iterable[WorkloadRequest]) -> "RequestTable":
        """The same requests as a table; a table itself is returned as it is."""
        if isinstance(requests, cls):
            return requests
        rows = list(requests)
        services, service = _coded([row.service for row in rows])
        tenants, tenant = _coded([row.tenant for row in rows])
        return replace(
            cls.plain(
                [row.at_s for row in rows],
                [row.prompt for row in rows],
                [row.output for row in rows],
                tuple(row.prefix for row in rows) if any(row.prefix for row in rows) else (),
            ),
            service=service,
            services=services,
            tenant=tenant,
            tenants=tenants,
        )

    @classmethod
    def joined(cls, tables: Sequence["RequestTable"]) -> "RequestTable":
        """All requests, one table after the other, whatever their times."""
        if not tables:
            return cls.of(())
        services, service = _recoded([(one.services, one.service) for one in tables])
        tenants, tenant = _recoded([(one.tenants, one.tenant) for one in tables])
        prefixed = any(one.prefix for one in tables)
        return cls(
            at_s=np.concatenate([one.at_s for one in tables]),
            prompt=np.concatenate([one.prompt for one in tables]),
            output=np.concatenate([one.output for one in tables]),
            service=service,
            services=services,
            tenant=tenant,
            tenants=tenants,
            prefix=tuple(
                prefix for one in tables for prefix in (one.prefix or repeat((), len(one)))
            )
            if prefixed
            else (),
        )

    def rows(self, which: Rows) -> "RequestTable":
        """Some of the requests: a slice, places in any order, or a truth value for each."""
        prefix = self.prefix
        if prefix:
            places = np.arange(len(self))[which].tolist()
            prefix = tuple(prefix[place] for place in places)
        return replace(
            self,
            at_s=self.at_s[which],
            prompt=self.prompt[which],
            output=self.output[which],
            service=self.service[which],
            tenant=self.tenant[which],
            prefix=prefix,
        )

    def __len__(self) -> int:
        return len(self.at_s)

    @overload
    def __getitem__(self, index: int) -> WorkloadRequest: ...
    @overload
    def __getitem__(self, index: slice) -> "RequestTable": ...
    def __getitem__(self, index: int | slice) -> "WorkloadRequest | RequestTable":
        if isinstance(index, slice):
            return self.rows(index)
        return WorkloadRequest(
            self.at_s.item(index),
            self.prompt.item(index),
            self.output.item(index),
            self.services[self.service.item(index)],
            self.tenants[self.tenant.item(index)],
            self.prefix[index] if self.prefix else (),
        )

    def __iter__(self) -> Iterator[WorkloadRequest]:
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield from map(
                WorkloadRequest,
                self.at_s[part].tolist(),
                self.prompt[part].tolist(),
                self.output[part].tolist(),
                map(self.services.__getitem__, self.service[part].tolist()),
                map(self.tenants.__getitem__, self.tenant[part].tolist()),
                self.prefix[part] or repeat(()),
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # columns are not worth hashing

    def __repr__(self) -> str:
        return f"RequestTable({len(self)} requests)"


def _coded[T: (ServiceClass, str)](values: Sequence[T]) -> tuple[tuple[T, ...], Codes]:
    """The different values in order of appearance, and the place of each one."""
    places: dict[T, int] = {}
    codes = [places.setdefault(value, len(places)) for value in values]
    return tuple(places), np.array(codes, np.int32)


def _recoded[T: (ServiceClass, str)](
    columns: Sequence[tuple[tuple[T, ...], Codes]],
) -> tuple[tuple[T, ...], Codes]:
    """Columns of codes with values of their own as one column with common values."""
    places: dict[T, int] = {}
    parts = []
    for values, codes in columns:
        new = [places.setdefault(value, len(places)) for value in values]
        parts.append(np.array(new, np.int32)[codes])
    return tuple(places), np.concatenate(parts)
