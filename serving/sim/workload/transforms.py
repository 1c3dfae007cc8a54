"""From one workload to another: pieces of it, at other rates, for other people."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from serving.errors import ConfigurationError
from serving.sim.workload.arrivals import Arrivals
from serving.sim.workload.draws import MOST_REQUESTS, not_negative, positive, stream, whole
from serving.sim.workload.requests import ServiceClass, Workload
from serving.sim.workload.table import Codes, RequestTable


def window(workload: Workload, start_s: float, seconds: float) -> Workload:
    """What comes in `seconds` from `start_s` on; times count from there, the end is not in it.

    Of what the source left out nothing is known but the number, so that is 0 now. Raises
    ConfigurationError.
    """
    not_negative("start of a window", start_s)
    positive("seconds of a window", seconds)
    table = RequestTable.of(workload.requests)
    first, end = np.searchsorted(table.at_s, (start_s, start_s + seconds)).tolist()
    there = table.rows(slice(first, end))
    moved = replace(there, at_s=there.at_s - start_s)
    return replace(workload, seconds=seconds, requests=moved, left_out=0)


def at_rate(workload: Workload, rate: float) -> Workload:
    """Played faster or slower, so that `rate` requests come per second; bursts keep their shape.

    Raises ConfigurationError if the workload has no rate that could be scaled.
    """
    positive("rate", rate)
    if not 0 < workload.rate < math.inf:
        raise ConfigurationError(
            f"The {len(workload.requests)} requests of {workload.name} in {workload.seconds:g} s "
            "have no rate that could be scaled; give them arrivals."
        )
    factor = workload.rate / rate
    table = RequestTable.of(workload.requests)
    return replace(
        workload,
        seconds=workload.seconds * factor,
        requests=replace(table, at_s=table.at_s * factor),
    )


def thinned(workload: Workload, share: float, seed: int) -> Workload:
    """Each request is kept with a probability of `share`, at its own time.

    Unlike `at_rate`, it leaves the shape in time as it was (a burst lasts as long), but makes the
    fewer requests look more like a Poisson process. Raises ConfigurationError.
    """
    positive("share of requests", share)
    if share > 1:
        raise ConfigurationError(f"share of requests must be at most 1, not {share:g}.")
    table = RequestTable.of(workload.requests)
    kept = stream(seed, "thinned").random(len(table)) < share
    return replace(workload, requests=table.rows(kept))


def fitting(workload: Workload, max_tokens: int) -> Workload:
    """Without requests of more than `max_tokens` in and out, which are counted as left out."""
    whole("max_tokens", max_tokens)
    table = RequestTable.of(workload.requests)
    fits = table.prompt + table.output <= max_tokens
    left_out = workload.left_out + len(table) - int(fits.sum())
    return replace(workload, requests=table.rows(fits), left_out=left_out)


def with_arrivals(workload: Workload, arrivals: Arrivals, seed: int) -> Workload:
    """The same requests in the same order at other times."""
    table = RequestTable.of(workload.requests)
    times = arrivals.draw(len(table), stream(seed, "arrivals"))
    return replace(workload, seconds=times.item(-1), requests=replace(table, at_s=times[:-1]))


def with_services(workload: Workload, shares: Mapping[ServiceClass, float], seed: int) -> Workload:
    """Service classes drawn for each request: `shares` of them, in any unit.

    Raises ConfigurationError if a share is negative or none is more than 0.
    """
    table = RequestTable.of(workload.requests)
    drawn = _drawn(shares.values(), len(table), stream(seed, "services"), "classes")
    return replace(workload, requests=replace(table, services=tuple(shares), service=drawn))


def with_services_of_tenants(workload: Workload, services: Mapping[str, ServiceClass]) -> Workload:
    """Each tenant's requests in its service class.

    Raises ConfigurationError if a tenant has none.
    """
    table = RequestTable.of(workload.requests)
    present = [table.tenants[code] for code in np.unique(table.tenant).tolist()]
    if missing := [tenant for tenant in present if tenant not in services]:
        raise ConfigurationError(
            f"No service class for tenant {missing[0]!r}; there are some for "
            f"{', '.join(map(repr, services)) or 'none'}."
        )
    classes = tuple(services.values())
    places = {tenant: place for place, tenant in enumerate(services)}
    of_tenant = np.array([places.get(tenant, 0) for tenant in table.tenants], np.int32)
    return replace(
        workload, requests=replace(table, services=classes, service=of_tenant[table.tenant])
    )


def with_tenants(workload: Workload, shares: Mapping[str, float], seed: int) -> Workload:
    """Tenants drawn for each request: `shares` of them, in any unit; errors as in with_services."""
    table = RequestTable.of(workload.requests)
    drawn = _drawn(shares.values(), len(table), stream(seed, "tenants"), "tenants")
    return replace(workload, requests=replace(table, tenants=tuple(shares), tenant=drawn))


def merged(name: str, workloads: Sequence[Workload]) -> Workload:
    """All of them at once; requests of different workloads have no prefix in common.

    Of requests that come at the same time, those of the earlier workload are first. Raises
    ConfigurationError if there is none, or pieces of their prefixes differ in length.
    """
    if not workloads:
        raise ConfigurationError("There is no workload to merge.")
    pieces = sorted({one.prefix_tokens for one in workloads if one.prefix_tokens})
    if len(pieces) > 1:
        raise ConfigurationError(
            f"Workloads with prefixes in pieces of {' and '.join(map(str, pieces))} tokens cannot "
            "be merged."
        )
    table = _with_own_prefixes([RequestTable.of(one.requests) for one in workloads])
    return Workload(
        name,
        max(one.seconds for one in workloads),
        table.rows(np.argsort(table.at_s, kind="stable")),
        pieces[0] if pieces else 0,
        left_out=sum(one.left_out for one in workloads),
    )


def repeated(workload: Workload, times: int) -> Workload:
    """One time after another, with the same lengths and gaps but other prompts.

    What is left out is counted each time. Raises ConfigurationError.
    """
    table = RequestTable.of(workload.requests)
    whole("repeat", times, most=MOST_REQUESTS // max(len(table), 1))
    again = [replace(table, at_s=table.at_s + number * workload.seconds) for number in range(times)]
    return replace(
        workload,
        seconds=times * workload.seconds,
        requests=_with_own_prefixes(again),
        left_out=times * workload.left_out,
    )


def _with_own_prefixes(tables: Sequence[RequestTable]) -> RequestTable:
    """The tables joined, prefixes renumbered so that none is of two tables."""
    taken = 0
    parts = []
    for table in tables:
        new = {one: 0 for prefix in table.prefix for one in prefix}
        new = dict(zip(new, range(taken, taken + len(new)), strict=True))
        taken += len(new)
        prefixes = tuple(tuple(new[one] for one in prefix) for prefix in table.prefix)
        parts.append(replace(table, prefix=prefixes))
    return RequestTable.joined(parts)


def _drawn(shares: Iterable[float], count: int, random: np.random.Generator, what: str) -> Codes:
    """Places of shares, each as often as it is large, int32 [count]."""
    weights = np.array(list(shares), np.float64)
    for weight in weights.tolist():
        not_negative(f"share of {what}", weight)
    if not weights.sum():
        raise ConfigurationError(f"Shares of {what} must not all be 0.")
    upto = np.cumsum(weights)
    places: Codes = np.searchsorted(upto, random.random(count) * upto[-1], side="right").astype(
        np.int32
    )
    return places
