"""Workloads as scenario files describe them: from_spec turns a dictionary into a Workload.

{"kind": "azure", "path": "conv.csv", "window": [0, 180], "rate": 16.6}
{"kind": "generated", "lengths": "llumnix:M-M", "arrivals": {"gamma": {"rate": 10, "cv": 4}},
 "count": 10000, "seed": 1, "classes": {"chat": {"share": 0.9, "ttft_s": 1, "tpot_s": 0.1},
 "offline": {"share": 0.1, "priority": "low"}}}

kind        the other keys that belong to it
azure       path
mooncake    path; block_tokens (512)
burstgpt    path; model, log_type (all)
sharegpt    path; arrivals; tokens_per_word (1.3), if no tokenizer is at hand
generated   lengths, arrivals, count, seed
merged      of: a list of workloads

Keys of every kind, in the order in which they take effect; all may be left out:
window      [start, seconds]: only what comes then
max_tokens  longer requests are left out, and counted
share       this share of the requests, drawn by seed
repeat      so many times, one after the other, with other prompts
rate        requests per second, by playing it faster or slower
arrivals    instead of the recorded times (so with neither window nor rate): {"poisson": {"rate"}},
            {"gamma": {"rate", "cv"}}, {"step": {"rate", "start_s", "seconds", "factor" (2),
            "cv" (1)}}, "at_once"
tenants     {name: share, ...}
classes     {name: {"share" or "tenants" (a list), "priority" ("high"), "ttft_s", "tpot_s"}, ...}
seed        of all that is drawn; must be there if anything is
name        for reports

lengths     "llumnix:M-M", or {"prompt": ..., "output": ...}, each of them a number of tokens,
            "llumnix:S", {"uniform": {"least", "most"}} or {"lognormal": {"median", "sigma",
            "least", "most"}}
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from serving.engine.request import Priority
from serving.errors import ConfigurationError
from serving.sim.workload import transforms
from serving.sim.workload.arrivals import AllAtOnce, Arrivals, Gamma, StepBurst, poisson
from serving.sim.workload.azure import read_azure
from serving.sim.workload.burstgpt import read_burstgpt
from serving.sim.workload.generated import generated
from serving.sim.workload.lengths import (
    LLUMNIX,
    Fixed,
    Lengths,
    LogNormal,
    Uniform,
    llumnix_mix,
)
from serving.sim.workload.mooncake import read_mooncake
from serving.sim.workload.requests import ServiceClass, Workload
from serving.sim.workload.sharegpt import TOKENS_PER_WORD, read_sharegpt
from serving.sim.workload.source_file import MOST_TOKENS
from serving.sim.workload.spec_section import Section, choice

_OF_KIND = {
    "azure": ("path",),
    "mooncake": ("path", "block_tokens"),
    "burstgpt": ("path", "model", "log_type"),
    "sharegpt": ("path", "tokens_per_word"),
    "generated": ("lengths", "count"),
    "merged": ("of",),
}
_COMMON = (
    "window", "max_tokens", "share", "repeat", "rate", "arrivals", "tenants", "classes", "seed",
    "name",
)  # fmt: skip
_CLASS = ("share", "tenants", "priority", "ttft_s", "tpot_s")
_PRIORITIES = {"high": Priority.HIGH, "low": Priority.LOW}


def from_spec(
    spec: Mapping[str, object],
    folder: Path = Path(),
    count_tokens: Callable[[str], int] | None = None,
    where: str = "workload",
) -> Workload:
    """The workload that `spec` describes; the module's docstring says what there is.

    folder: what paths are relative to. count_tokens: the tokenizer for texts. where: what `spec` is
    called in errors. Raises ConfigurationError, which names the key, and WorkloadFileError.
    """
    kinds = ", ".join(_OF_KIND)
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise ConfigurationError(f"{where}: missing key 'kind'; it is one of {kinds}.")
    kind = spec["kind"]
    if not isinstance(kind, str) or kind not in _OF_KIND:
        raise ConfigurationError(f"{where}.kind: found {kind!r}; expected one of {kinds}.")
    section = Section(where, spec, ("kind", *_OF_KIND[kind], *_COMMON))
    if kind == "generated":
        workload = _generated(section)
    elif kind == "merged":
        workload = _merged(section, folder, count_tokens)
    else:
        workload = _read(kind, section, folder, count_tokens)
    workload = _with_people(_in_time(workload, section, kind), section)
    return replace(workload, name=section.text("name")) if "name" in section else workload


def _read(
    kind: str, section: Section, folder: Path, count_tokens: Callable[[str], int] | None
) -> Workload:
    path = folder / section.text("path")
    if kind == "azure":
        return read_azure(path)
    if kind == "mooncake":
        return read_mooncake(path, section.whole("block_tokens", 512))
    if kind == "burstgpt":
        model, log_type = (
            section.text(key) if key in section else None for key in ("model", "log_type")
        )
        return read_burstgpt(path, model, log_type)
    return read_sharegpt(path, count_tokens, section.number("tokens_per_word", TOKENS_PER_WORD))


def _generated(section: Section) -> Workload:
    lengths = section.get("lengths")
    if isinstance(lengths, str):
        mix = lengths.removeprefix("llumnix:")
        if mix == lengths:
            raise section.wrong(
                "lengths", 'a mix as "llumnix:M-M", or an object with prompt, output'
            )
        prompts, outputs = llumnix_mix(mix)
        name = lengths
    else:
        both = section.section("lengths", ("prompt", "output"))
        prompts, outputs = _lengths(both, "prompt"), _lengths(both, "output")
        name = "generated"
    arrivals = _arrivals(section)
    return generated(
        name, prompts, outputs, arrivals, section.whole("count"), section.whole("seed")
    )


def _merged(section: Section, folder: Path, count_tokens: Callable[[str], int] | None) -> Workload:
    specs = section.get("of")
    if not isinstance(specs, list) or not specs:
        raise section.wrong("of", "a list of workloads")
    parts = [
        from_spec(spec, folder, count_tokens, f"{section.where}.of[{number}]")
        for number, spec in enumerate(specs)
    ]
    return transforms.merged(" + ".join(part.name for part in parts), parts)


def _lengths(section: Section, key: str) -> Lengths:
    value = section.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(section.whole(key))
    if isinstance(value, str):
        size = value.removeprefix("llumnix:")
        if size == value or size not in LLUMNIX:
            raise section.wrong(key, " or ".join(f'"llumnix:{size}"' for size in LLUMNIX))
        return LLUMNIX[size]
    kind, inner = choice(f"{section.where}.{key}", value, ("uniform", "lognormal"))
    if kind == "uniform":
        even = inner.section(kind, ("least", "most"))
        return Uniform(even.whole("least"), even.whole("most"))
    log = inner.section(kind, ("median", "sigma", "least", "most"))
    least, most = log.whole("least", 1), log.whole("most", MOST_TOKENS)
    return LogNormal(log.number("median"), log.number("sigma"), least, most)


def _arrivals(section: Section) -> Arrivals:
    value = section.get("arrivals")
    if value == "at_once":
        return AllAtOnce()
    if isinstance(value, str):
        raise section.wrong("arrivals", '"at_once", or an object with poisson, gamma or step')
    kind, inner = choice(f"{section.where}.arrivals", value, ("poisson", "gamma", "step"))
    if kind == "poisson":
        return poisson(inner.section(kind, ("rate",)).number("rate"))
    if kind == "gamma":
        gamma = inner.section(kind, ("rate", "cv"))
        return Gamma(gamma.number("rate"), gamma.number("cv"))
    step = inner.section(kind, ("rate", "start_s", "seconds", "factor", "cv"))
    return StepBurst(
        step.number("rate"),
        step.number("start_s"),
        step.number("seconds"),
        step.number("factor", 2.0),
        step.number("cv", 1.0),
    )


def _in_time(workload: Workload, section: Section, kind: str) -> Workload:
    """What comes, and when."""
    replaced = "arrivals" in section and kind != "generated"
    if replaced and (useless := [key for key in ("window", "rate") if key in section]):
        raise ConfigurationError(
            f"{section.where}: {useless[0]!r} is of recorded times, and 'arrivals' replaces them; "
            "leave out one of the two."
        )
    if "window" in section:
        workload = transforms.window(workload, *section.pair("window"))
    if "max_tokens" in section:
        workload = transforms.fitting(workload, section.whole("max_tokens"))
    if "share" in section:
        workload = transforms.thinned(workload, section.number("share"), section.whole("seed"))
    if not workload.requests:
        raise ConfigurationError(
            f"{section.where}: no request is left of {workload.name} after "
            f"{', '.join(key for key in ('window', 'max_tokens', 'share') if key in section)}."
        )
    if "repeat" in section:
        workload = transforms.repeated(workload, section.whole("repeat"))
    if "rate" in section:
        workload = transforms.at_rate(workload, section.number("rate"))
    if replaced:
        workload = transforms.with_arrivals(workload, _arrivals(section), section.whole("seed"))
    return workload


def _with_people(workload: Workload, section: Section) -> Workload:
    """Who asks, and what they are promised."""
    if "tenants" in section:
        named = section.named("tenants")
        shares = {name: named.number(name) for name in named.keys}
        workload = transforms.with_tenants(workload, shares, section.whole("seed"))
    return _with_classes(workload, section) if "classes" in section else workload


def _with_classes(workload: Workload, section: Section) -> Workload:
    shares: dict[ServiceClass, float] = {}
    of_tenant: dict[str, ServiceClass] = {}
    named = section.named("classes")
    for name in named.keys:
        one = named.section(name, _CLASS)
        service = _service(name, one)
        if "tenants" not in one:
            shares[service] = one.number("share")
            continue
        tenants = one.get("tenants")
        if not isinstance(tenants, list) or not all(isinstance(who, str) for who in tenants):
            raise one.wrong("tenants", "a list of tenants")
        of_tenant.update(dict.fromkeys(tenants, service))
        if "share" in one:
            raise one.wrong("share", "either share or tenants")
    if shares and of_tenant:
        raise ConfigurationError(
            f"{section.where}.classes: either all classes have 'share', or all have 'tenants'."
        )
    if shares:
        return transforms.with_services(workload, shares, section.whole("seed"))
    return transforms.with_services_of_tenants(workload, of_tenant)


def _service(name: str, section: Section) -> ServiceClass:
    priority = Priority.HIGH
    if "priority" in section:
        word = section.text("priority")
        if word not in _PRIORITIES:
            raise section.wrong("priority", " or ".join(_PRIORITIES))
        priority = _PRIORITIES[word]
    promised = {}
    for key in ("ttft_s", "tpot_s"):
        if key in section and (seconds := section.number(key)) <= 0:
            raise section.wrong(key, f"more than 0, not {seconds:g}")
        promised[key] = section.number(key) if key in section else None
    return ServiceClass(name, priority, promised["ttft_s"], promised["tpot_s"])
