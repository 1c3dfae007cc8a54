"""Makes a failing scenario small: what is left out was not needed to break the rule.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002)
over clients, faults and workers, then plainer values for what is left, until nothing can go.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from serving.engine.request import Priority
from serving.sim.faults.chaos import run_seed
from serving.sim.faults.client import ClientPlan
from serving.sim.faults.scenario import FaultPlan, Scenario
from serving.sim.faults.worker_node import WorkerSetup

type Breaks = Callable[[Scenario], bool]
type Change = Callable[[Scenario], Scenario]


# Whoever is left out takes draws from the network, and the rest may be unlucky at other times. So
# a smaller scenario is tried under some other networks too.
_OTHER_SEEDS = range(6)


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest scenario found, the seed of a network that breaks it, and the runs it took."""

    seed: int
    scenario: Scenario
    runs: int


def shrink(seed: int, scenario: Scenario, rule: str, *, most_runs: int = 1000) -> Shrunk:
    """Shrink a scenario that breaks `rule` under that seed, while it still breaks that rule.

    Another rule does not count: it may be another fault. Stops after `most_runs` runs.
    """
    runs = 0

    def breaks_under(candidate: Scenario, network: int) -> bool:
        nonlocal runs, seed
        if runs >= most_runs:
            return False
        runs += 1
        failure = run_seed(network, candidate)
        if failure is None or failure.rule != rule:
            return False
        seed = network
        return True

    def breaks(candidate: Scenario) -> bool:
        return breaks_under(candidate, seed)

    def breaks_somewhere(candidate: Scenario) -> bool:
        others = [other for other in _OTHER_SEEDS if other != seed]
        return breaks(candidate) or any(breaks_under(candidate, other) for other in others)

    before = None
    while scenario != before and runs < most_runs:
        before = scenario
        scenario = _fewer(scenario, scenario.clients, _with_clients, breaks_somewhere)
        scenario = _fewer(scenario, scenario.faults, _with_faults, breaks_somewhere)
        scenario = _fewer(scenario, scenario.workers, _with_workers, breaks_somewhere)
        scenario = _plainer(scenario, breaks)
    return Shrunk(seed, scenario, runs)


def _fewer[Part](
    scenario: Scenario,
    parts: tuple[Part, ...],
    with_parts: Callable[[Scenario, tuple[Part, ...]], Scenario],
    breaks: Breaks,
) -> Scenario:
    """Leave out as many parts as can be: halves first, single ones last."""
    size = len(parts)
    while size:
        start = 0
        while start < len(parts):
            kept = parts[:start] + parts[start + size :]
            candidate = with_parts(scenario, kept)
            if candidate != scenario and breaks(candidate):
                scenario, parts = candidate, kept
            else:
                start += size
        size //= 2
    return scenario


def _with_clients(scenario: Scenario, kept: tuple[ClientPlan, ...]) -> Scenario:
    return replace(scenario, clients=kept)


def _with_faults(scenario: Scenario, kept: tuple[FaultPlan, ...]) -> Scenario:
    return replace(scenario, faults=kept)


def _with_workers(scenario: Scenario, kept: tuple[WorkerSetup, ...]) -> Scenario:
    """Only these workers, and the faults that strike them; a scenario has at least one."""
    if not kept:
        return scenario
    places = {setup.worker_id: place for place, setup in enumerate(kept)}
    faults = tuple(
        replace(fault, worker=places[name])
        for fault in scenario.faults
        if (name := scenario.workers[fault.worker].worker_id) in places
    )
    return replace(scenario, workers=kept, faults=faults)


def _plainer(scenario: Scenario, breaks: Breaks) -> Scenario:
    """Take every change that still breaks the rule, each as often as it does."""
    for change in _changes(scenario):
        while True:
            candidate = change(scenario)
            if candidate == scenario or not breaks(candidate):
                break
            scenario = candidate
    return scenario


def _changes(scenario: Scenario) -> Iterator[Change]:
    yield lambda it: replace(it, network=replace(it.network, loss=0.0))
    yield lambda it: replace(it, network=replace(it.network, duplication=0.0))
    yield lambda it: replace(it, network=replace(it.network, delay=(0.0003, 0.0006)))
    yield _one_replica
    yield _plain_engine
    yield lambda it: _with_numerics(it, eos_every=0)
    yield lambda it: _with_numerics(it, drift=False)
    for place in range(len(scenario.clients)):
        for simpler in _CLIENT_CHANGES:
            yield _of_client(place, simpler)
    for place in range(len(scenario.faults)):
        for milder in _FAULT_CHANGES:
            yield _of_fault(place, milder)


def _one_replica(scenario: Scenario) -> Scenario:
    workers = tuple(replace(setup, replicas=1) for setup in scenario.workers)
    faults = tuple(replace(fault, replica=0) for fault in scenario.faults)
    return replace(scenario, workers=workers, faults=faults)


def _plain_engine(scenario: Scenario) -> Scenario:
    workers = tuple(
        replace(
            setup,
            engine=replace(
                setup.engine,
                pipeline_depth=1,
                decode_steps=1,
                watermark=0.0,
                prefix_caching=False,
            ),
        )
        for setup in scenario.workers
    )
    return replace(scenario, workers=workers)


def _with_numerics(
    scenario: Scenario, *, eos_every: int | None = None, drift: bool | None = None
) -> Scenario:
    numerics = scenario.numerics
    if eos_every is not None:
        numerics = replace(numerics, eos_every=eos_every)
    if drift is not None:
        numerics = replace(numerics, drift=drift)
    workers = tuple(replace(setup, numerics=numerics) for setup in scenario.workers)
    return replace(scenario, numerics=numerics, workers=workers)


def _of_client(place: int, simpler: Callable[[ClientPlan], ClientPlan]) -> Change:
    def change(scenario: Scenario) -> Scenario:
        clients = list(scenario.clients)
        clients[place] = simpler(clients[place])
        return replace(scenario, clients=tuple(clients))

    return change


def _of_fault(place: int, milder: Callable[[FaultPlan], FaultPlan]) -> Change:
    def change(scenario: Scenario) -> Scenario:
        faults = list(scenario.faults)
        faults[place] = milder(faults[place])
        return replace(scenario, faults=tuple(faults))

    return change


def _without_acts(plan: ClientPlan) -> ClientPlan:
    return replace(plan, acts=())


def _one_act_less(plan: ClientPlan) -> ClientPlan:
    return replace(plan, acts=plan.acts[:-1])


def _shorter_prompt(plan: ClientPlan) -> ClientPlan:
    prompt = plan.request.prompt
    return replace(plan, request=replace(plan.request, prompt=prompt[: (len(prompt) + 1) // 2]))


def _fewer_tokens(plan: ClientPlan) -> ClientPlan:
    sampling = plan.request.sampling
    return _with_sampling(plan, max_tokens=(sampling.max_tokens + 1) // 2)


def _greedy(plan: ClientPlan) -> ClientPlan:
    return _with_sampling(plan, temperature=0.0, seed=0)


def _without_stops(plan: ClientPlan) -> ClientPlan:
    return _with_sampling(plan, logprobs=None, min_tokens=0, stop_token_ids=())


def _without_times(plan: ClientPlan) -> ClientPlan:
    return replace(plan, request=replace(plan.request, deadline_s=None, resume_lease_s=0.0))


def _high(plan: ClientPlan) -> ClientPlan:
    return replace(plan, request=replace(plan.request, priority=Priority.HIGH))


def _at_once(plan: ClientPlan) -> ClientPlan:
    return replace(plan, submit_at=0.0)


def _round_times(plan: ClientPlan) -> ClientPlan:
    acts = tuple((round(at, 3), act) for at, act in plan.acts)
    return replace(plan, submit_at=round(plan.submit_at, 3), acts=acts)


def _with_sampling(plan: ClientPlan, **changes: object) -> ClientPlan:
    sampling = replace(plan.request.sampling, **changes)  # type: ignore[arg-type]
    return replace(plan, request=replace(plan.request, sampling=sampling))


def _round_fault(fault: FaultPlan) -> FaultPlan:
    return replace(fault, at=round(fault.at, 3), seconds=round(fault.seconds, 3))


def _shorter_fault(fault: FaultPlan) -> FaultPlan:
    shorter = fault.seconds / 2
    return replace(fault, seconds=shorter) if shorter >= 0.01 else fault


_CLIENT_CHANGES = (
    _without_acts,
    _one_act_less,
    _shorter_prompt,
    _fewer_tokens,
    _greedy,
    _without_stops,
    _without_times,
    _high,
    _at_once,
    _round_times,
)
_FAULT_CHANGES = (_shorter_fault, _round_fault)
