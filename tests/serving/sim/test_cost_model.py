"""The cost model: the published profile, the fit, and what a profile's file may not say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.errors import ConfigurationError
from serving.sim.cost_fit import Measured, fit, non_negative_least_squares
from serving.sim.cost_model import (
    CallWork,
    CostModel,
    Curve,
    DecodeTimes,
    StepWork,
    attention_pairs,
)
from serving.sim.profile import ProfileError, read_profile, write_profile

H200 = Path(__file__).parents[3] / "configs/profiles/h200_llama_8b.json"


@pytest.mark.parametrize(
    ("rows", "milliseconds"),
    [(1, 4.30), (8, 4.63), (32, 5.55), (64, 6.83), (128, 9.85), (256, 16.3), (512, 30.0)],
)
def test_the_h200_profile_gives_the_published_decode_steps(rows, milliseconds):
    work = StepWork(rows=rows, decoding=rows, context=1088 * rows)
    assert 1e3 * read_profile(H200).cost.seconds(work) == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "start", "low", "high"),
    [(1024, 0, 22.9, 23.1), (4096, 0, 86, 91), (4096, 12288, 148, 152), (256, 0, 7.6, 7.9)],
)
def test_the_h200_profile_gives_the_published_prefill_calls(tokens, start, low, high):
    call = CallWork(tokens, attention_pairs(start, tokens))
    seconds = read_profile(H200).cost.seconds(StepWork(calls=(call,)))
    assert low <= 1e3 * seconds <= high


def test_a_curve_is_flat_before_and_straight_after():
    curve = Curve(((2.0, 10.0), (4.0, 20.0), (8.0, 24.0)))
    assert [curve(x) for x in (1, 2, 3, 4, 6, 8, 12)] == [10, 10, 15, 20, 22, 24, 28]


def test_attention_pairs_count_every_token_before():
    assert attention_pairs(3, 2) == 4 + 5


def test_several_steps_read_more_each_time():
    model = CostModel(Curve(((1, 1.0),)), Curve(((1, 0.1),)), Curve(((1, 0.0),)), 0.0, plan_s=5.0)
    work = StepWork(rows=2, decoding=2, context=10, steps=3)
    assert model.seconds(work) == pytest.approx(5 + 3 + 0.1 * (10 + 12 + 14))


def test_a_series_has_the_bits_of_single_steps():
    times = DecodeTimes(read_profile(H200).cost, (1, 2, 4, 8))
    series = times.series(7, 12345, 100).tolist()
    assert series == [times.step(7, 12345 + 7 * step) for step in range(100)]
    assert times.step(5, 10) == times.step(8, 10)  # padded


def made_up_grid(model):
    """Steps and what they take, every third held out; a percent of noise."""
    noise = np.random.default_rng(0)
    works = [
        StepWork(rows=rows, decoding=rows, context=rows * context)
        for rows in (1, 8, 64)
        for context in (16, 256, 1024, 4096)
    ]
    works += [
        StepWork(calls=(CallWork(tokens, attention_pairs(start, tokens)),))
        for tokens in (128, 1024)
        for start in (0, 1024, 8192)
    ]
    works += [
        StepWork(64, 32, 32 * context, mixed=CallWork(512, attention_pairs(start, 400)))
        for context in (64, 2048)
        for start in (0, 4096)
    ]
    return [
        Measured(
            work,
            tuple((model.seconds(work) * noise.uniform(0.99, 1.01, 5)).tolist()),
            held_out=index % 3 == 2,
        )
        for index, work in enumerate(works)
    ]


def test_a_fit_finds_what_made_the_measurements():
    made = CostModel(
        decode_s=Curve(((1, 4e-3), (8, 4.2e-3), (64, 4.5e-3))),
        read_s=Curve(((1, 2e-7), (8, 6e-8), (64, 4e-8))),
        call_s=Curve(((128, 5e-3), (1024, 22e-3))),
        mixed_s=Curve(((512, 13e-3),)),
        pair_s=1.2e-9,
    )
    found = fit(made_up_grid(made))
    assert found.held_out is not None
    assert found.held_out.points == 7
    assert found.held_out.largest < 0.02
    assert found.model.call_s(1024) == pytest.approx(22e-3, rel=0.02)
    assert found.model.pair_s == pytest.approx(1.2e-9, rel=0.05)


def test_a_fit_needs_decodes_and_prefills():
    with pytest.raises(ConfigurationError, match="prefill call"):
        fit([Measured(StepWork(rows=1, decoding=1, context=1), (1.0,))])


def test_least_squares_stay_positive():
    chance = np.random.default_rng(1)
    for _ in range(20):
        matrix = chance.normal(size=(12, 5)) * 10.0 ** chance.integers(-6, 6, 5)
        target = chance.normal(size=12)
        found = non_negative_least_squares(matrix, target)
        assert (found >= 0).all()
        # Karush, Kuhn and Tucker: downhill only against the bounds.
        gradient = matrix.T @ (target - matrix @ found) / np.linalg.norm(matrix, axis=0)
        assert (gradient < 1e-8).all()
        assert (np.abs(gradient[found > 0]) < 1e-8).all()


def test_a_profile_survives_its_file(tmp_path):
    measured = made_up_grid(read_profile(H200).cost)
    for steps in ((), tuple(measured)):
        profile = replace(read_profile(H200), measured=steps)
        path = tmp_path / "again.json"
        write_profile(path, profile)
        assert read_profile(path) == profile
    assert len(path.read_text().splitlines()) < 100 + len(measured)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("nmae",), 1, "has not the fields of Profile; unknown: nmae"),
        (("name",), None, "has not the fields of Profile; missing: name"),
        (("tensor_parallel",), "1", "tensor_parallel is '1'; it must be a whole number"),
        (("tensor_parallel",), True, "tensor_parallel is True; it must be a whole number"),
        (("assumed",), "nothing", "assumed is 'nothing'; it must be a list"),
        (("cost", "pair_s"), -1.0, "cost.pair_s is -1.0; it must be finite and not negative"),
        (("cost", "pair_s"), float("nan"), "cost.pair_s is nan"),
        (("cost", "call_s"), [], "cost.call_s must have points"),
        (("cost", "call_s"), [[2, 1.0], [1, 1.0]], "cost.call_s must have points"),
        (("cost", "call_s"), [[2, 1.0], [3]], r"cost.call_s\[1\] is \[3\]; it must be a list of 2"),
        (("executor", "mixed_calls"), [[256, 63]], "mixed_calls has"),
        (("executor", "num_rows"), 10**30, "executor.num_rows is 10+; it must be at most 65536"),
        (("executor", "num_blocks"), 10**30, "executor.num_blocks is 10+; it must be at most"),
        (("executor", "prefill_buckets"), [], "max_prefill_tokens is 0"),
        (("moves",), 3, "moves is 3; it must be the fields of Moves"),
        (
            ("held_out",),
            {"points": 1},
            "held_out has not the fields of FitError; missing: largest, mean",
        ),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path, path, value, says):
    content = json.loads(H200.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value is None:
        del inner[path[-1]]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=says):
        read_profile(file)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ProfileError, match="is no JSON"):
        read_profile(tmp_path / "text.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ProfileError, match="is no JSON"):
        read_profile(tmp_path / "deep.json")
