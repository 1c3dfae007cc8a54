import json

import pytest

from serving.engine.request import Priority
from serving.errors import ConfigurationError, WorkloadFileError
from serving.sim.workload.arrivals import Gamma
from serving.sim.workload.azure import read_azure
from serving.sim.workload.generated import generated
from serving.sim.workload.lengths import Fixed, LogNormal, llumnix_mix
from serving.sim.workload.requests import ServiceClass
from serving.sim.workload.spec import from_spec
from serving.sim.workload.transforms import at_rate, fitting, window
from tools.make_workload_samples import FOLDER

AZURE = {"kind": "azure", "path": "azure.csv"}
MIX = {
    "kind": "generated", "lengths": "llumnix:M-M", "arrivals": {"gamma": {"rate": 10, "cv": 4}},
    "count": 100, "seed": 1,
}  # fmt: skip


def made(spec, **more):
    return from_spec(json.loads(json.dumps({**spec, **more})), FOLDER)


def test_a_trace():
    whole = read_azure(FOLDER / "azure.csv")
    assert made(AZURE) == whole
    part = window(whole, 10, 50)
    most = part.requests[5].prompt + part.requests[5].output
    for tokens in (most - 1, most):
        expected = at_rate(fitting(part, tokens), 16.6)
        assert expected.left_out > 0
        assert made(AZURE, window=[10, 50], max_tokens=tokens, rate=16.6) == expected
    assert made(AZURE, repeat=2, name="twice").name == "twice"
    assert len(made(AZURE, repeat=2).requests) == 480
    assert len(made(AZURE, share=0.5, seed=3).requests) == pytest.approx(120, abs=30)


def test_each_kind_of_trace():
    assert made({"kind": "mooncake", "path": "mooncake.jsonl"}).prefix_tokens == 512
    burst = {"kind": "burstgpt", "path": "burstgpt.csv"}
    gpt4 = made(burst, model="GPT-4")
    assert 0 < len(gpt4.requests) < len(made(burst).requests)
    assert len(made(burst, model="GPT-4", log_type="API log").requests) < len(gpt4.requests)
    share = {"kind": "sharegpt", "path": "sharegpt.json"}
    assert made(share, arrivals="at_once", seed=0).seconds == 0.0
    timed = made(share, arrivals={"poisson": {"rate": 2}}, seed=0, tokens_per_word=2)
    assert timed.rate == pytest.approx(2.0, rel=0.5)
    assert timed.name == "sharegpt.json (2 tokens a word)"
    counted = from_spec(share, FOLDER, count_tokens=len)
    assert counted.requests[0].prompt > 2 * timed.requests[0].prompt


def test_generated():
    prompts, outputs = llumnix_mix("M-M")
    assert made(MIX) == generated("llumnix:M-M", prompts, outputs, Gamma(10, 4), 100, 1)
    lengths = {"prompt": {"lognormal": {"median": 50, "sigma": 1, "most": 90}}, "output": 7}
    assert made(MIX, lengths=lengths) == generated(
        "generated", LogNormal(50, 1, 1, 90), Fixed(7), Gamma(10, 4), 100, 1
    )
    lengths = {"prompt": "llumnix:S", "output": {"uniform": {"least": 2, "most": 3}}}
    assert {one.output for one in made(MIX, lengths=lengths).requests} == {2, 3}
    step = {"step": {"rate": 1, "start_s": 5, "seconds": 5, "cv": 0}}
    assert made(MIX, arrivals=step).requests[15].at_s == 10.0


def test_classes_and_tenants():
    chat = {"share": 0.8, "ttft_s": 1, "tpot_s": 0.1}
    batch = {"share": 0.2, "priority": "low"}
    classes = made(MIX, classes={"chat": chat, "batch": batch}).requests
    assert {one.service for one in classes} == {
        ServiceClass("chat", Priority.HIGH, 1.0, 0.1),
        ServiceClass("batch", Priority.LOW),
    }
    of_tenants = made(
        MIX,
        tenants={"a": 1, "b": 1, "c": 2},
        classes={"gold": {"tenants": ["a"]}, "rest": {"tenants": ["b", "c"]}},
    )
    assert {(one.tenant, one.service.name) for one in of_tenants.requests} == {
        ("a", "gold"), ("b", "rest"), ("c", "rest"),
    }  # fmt: skip
    assert made(MIX, tenants={"a": 1, "b": 1}) != made({**MIX, "seed": 2}, tenants={"a": 1, "b": 1})


def test_merged():
    both = made({"kind": "merged", "of": [AZURE, {**MIX, "count": 50}]}, max_tokens=9000)
    assert len(both.requests) + both.left_out == 290
    assert both.name == "azure.csv + llumnix:M-M"


def without(spec, key):
    return {name: value for name, value in spec.items() if name != key}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "workload: missing key 'kind'; it is one of azure, mooncake, burstgpt, sharegpt, gen"),
        ([], "missing key 'kind'"),
        ({"kind": "x"}, "workload.kind: found 'x'; expected one of azure"),
        ({"kind": ["azure"]}, "workload.kind: found"),
        ({"kind": "azure"}, "missing key 'path'; allowed are kind, path, window, max_tokens"),
        ({**AZURE, "wimdow": 1}, "unknown key 'wimdow'; allowed are kind, path, window, max_"),
        ({**AZURE, "lengths": 1}, "unknown key 'lengths'"),
        ({**AZURE, "path": 3}, "workload.path: found 3; expected a text"),
        ({**AZURE, "window": 3}, "workload.window: found 3; expected two numbers"),
        ({**AZURE, "window": [1]}, r"workload.window: found \[1\]; expected two numbers"),
        ({**AZURE, "window": [0, "x"]}, "workload.window.second: found 'x'; expected a number"),
        ({**AZURE, "window": [-1, 5]}, "start of a window must be at least 0"),
        ({**AZURE, "window": [1e6, 5]}, "no request is left of azure.csv after window"),
        ({**AZURE, "max_tokens": 1}, "no request is left of azure.csv after max_tokens"),
        ({**AZURE, "max_tokens": 2.5}, "workload.max_tokens: found 2.5; expected a whole number"),
        ({**AZURE, "max_tokens": True}, "found True; expected a whole number"),
        ({**AZURE, "repeat": 0}, "repeat must be at least 1, not 0"),
        ({**AZURE, "repeat": 10**30}, "expected a whole number"),
        ({**AZURE, "rate": True}, "workload.rate: found True; expected a number"),
        ({**AZURE, "rate": -2}, "rate must be more than 0"),
        ({**AZURE, "rate": float("nan")}, "workload.rate: found nan"),
        ({**AZURE, "rate": 10**400}, "workload.rate: found 10+.*; expected a number"),
        ({**AZURE, "share": 0.5}, "missing key 'seed'"),
        ({**AZURE, "share": 0.5, "seed": -1}, "seed must be at least 0"),
        ({**AZURE, "arrivals": "at_once", "rate": 3, "seed": 1}, "'rate' is of recorded times"),
        ({**AZURE, "arrivals": {"poisson": {"rate": 3}}}, "missing key 'seed'"),
        ({**AZURE, "tenants": {}}, "workload.tenants: found {}; expected an object with at least"),
        ({**AZURE, "tenants": {"a": "x"}}, "workload.tenants.a: found 'x'; expected a number"),
        ({**AZURE, "tenants": {"a": 1}}, "missing key 'seed'"),
        ({**AZURE, "tenants": {1: 1}, "seed": 1}, "expected names that are texts"),
        ({**AZURE, "name": ""}, "workload.name: found ''; expected a text"),
        ({**AZURE, "classes": {"a": {"shares": 1}}}, "workload.classes.a: unknown key 'shares'; "
         "allowed are share, tenants, priority"),
        ({**AZURE, "classes": {"a": {}}}, "workload.classes.a: missing key 'share'"),
        ({**AZURE, "classes": {"a": 1}}, "workload.classes.a: found 1; expected an object with"),
        ({**AZURE, "classes": {"a": {"share": 1}}}, "missing key 'seed'"),
        ({**AZURE, "classes": {"a": {"share": 1, "tenants": ["a"]}}}, "either share or tenants"),
        ({**AZURE, "classes": {"a": {"tenants": "a"}}}, "expected a list of tenants"),
        ({**AZURE, "classes": {"a": {"tenants": ["a"]}}}, "No service class for tenant ''"),
        ({**AZURE, "classes": {"a": {"share": 1}, "b": {"tenants": ["a"]}}}, "either all classes"),
        ({**AZURE, "classes": {"a": {"share": 1, "priority": "mid"}}}, "expected high or low"),
        ({**AZURE, "classes": {"a": {"share": 1, "ttft_s": 0}}}, "expected more than 0"),
        (without(MIX, "count"), "missing key 'count'; allowed are kind, lengths, count, window"),
        (without(MIX, "seed"), "missing key 'seed'"),
        (without(MIX, "lengths"), "missing key 'lengths'"),
        (without(MIX, "arrivals"), "missing key 'arrivals'"),
        ({**MIX, "lengths": "M-M"}, 'found \'M-M\'; expected a mix as "llumnix:M-M"'),
        ({**MIX, "lengths": "llumnix:M-Q"}, "no mix 'M-Q'"),
        ({**MIX, "lengths": {"prompt": 5}}, "workload.lengths: missing key 'output'"),
        ({**MIX, "lengths": {"prompt": 0, "output": 1}}, "fixed length must be at least 1"),
        ({**MIX, "lengths": {"prompt": "M", "output": 1}}, 'expected "llumnix:S" or "llumnix:M"'),
        ({**MIX, "lengths": {"prompt": {"normal": 1}, "output": 1}}, "workload.lengths.prompt: "
         "unknown key 'normal'; allowed are uniform, lognormal"),
        ({**MIX, "lengths": {"prompt": {}, "output": 1}}, "an object with one of uniform, lognorm"),
        ({**MIX, "lengths": {"prompt": {"lognormal": {"median": 5}}, "output": 1}},
         "workload.lengths.prompt.lognormal: missing key 'sigma'"),
        ({**MIX, "arrivals": "now"}, 'expected "at_once", or an object with poisson, gamma or'),
        ({**MIX, "arrivals": {"gamma": {"rate": 1}}}, "workload.arrivals.gamma: missing key 'cv'"),
        ({**MIX, "arrivals": {"poisson": 5}}, "workload.arrivals.poisson: found 5; expected an ob"),
        ({**MIX, "arrivals": {"poisson": {"rate": 1}, "gamma": {"rate": 1, "cv": 1}}}, "one of"),
        ({"kind": "merged", "of": []}, "workload.of: found .*; expected a list of workloads"),
        ({"kind": "merged", "of": [{**AZURE, "x": 1}]}, r"workload.of\[0\]: unknown key 'x'"),
        ({"kind": "merged", "of": [5]}, r"workload.of\[0\]: missing key 'kind'"),
        ({"kind": "mooncake", "path": "mooncake.jsonl", "block_tokens": 0}, "block_tokens must be"),
        ({"kind": "sharegpt", "path": "sharegpt.json", "tokens_per_word": 0}, "tokens_per_word"),
        ({"kind": "sharegpt", "path": "sharegpt.json", "rate": 1}, "give them arrivals"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        from_spec(spec, FOLDER)


def test_a_file_that_is_not_there():
    with pytest.raises(WorkloadFileError, match=r"samples/nowhere.csv: found no readable file"):
        made({**AZURE, "path": "nowhere.csv"})
