import numpy as np
import pytest

from serving.errors import ConfigurationError
from serving.sim.workload.arrivals import AllAtOnce, Gamma, StepBurst, poisson
from serving.sim.workload.generated import generated
from serving.sim.workload.lengths import (
    LLUMNIX,
    Fixed,
    LogNormal,
    Uniform,
    Zipf,
    llumnix_mix,
)
from serving.sim.workload.table import RequestTable

COUNT = 200_000


def random(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("size", "mean", "quantiles"),
    [
        # P50, P80, P95 and P99 of another program after the same description.
        ("S", 128, (35, 103, 400, 1691)),
        ("M", 256, (30, 168, 1284, 4548)),
        ("L", 512, (54, 594, 3125, 5261)),
    ],
)
def test_llumnix_lengths_have_the_known_quantiles(size, mean, quantiles):
    lengths = LLUMNIX[size].draw(COUNT, random())
    found = np.percentile(lengths, (50, 80, 95, 99))
    # A quantile of steps as wide as mean / sample mean may be off by one step.
    step = int(lengths.min())
    assert found == pytest.approx(quantiles, rel=0.03, abs=step)
    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    # The longest of L would be 1023 steps of 5.95; those of S and M are cut off.
    assert lengths.max() == (pytest.approx(6087, abs=60) if size == "L" else 6144)


@pytest.mark.parametrize(("mean", "alpha"), [(2, 1.0), (3, 2.0)])
def test_ranks_have_a_probability_of_rank_to_the_minus_alpha(mean, alpha):
    lengths = Zipf(mean, alpha).draw(COUNT, random())
    ranks = np.arange(1, 2 * mean)
    expected = ranks**-alpha / (ranks**-alpha).sum()
    values, counts = np.unique(lengths, return_counts=True)
    scale = mean / (ranks * expected).sum()
    assert values.tolist() == np.ceil(ranks * scale).tolist()
    assert counts / COUNT == pytest.approx(expected, abs=0.005)


def test_mixes_are_named_as_in_the_paper():
    assert llumnix_mix("S-L") == (Zipf(128, 2.0), Zipf(512, 1.15))
    assert llumnix_mix("L-M") == (Zipf(512, 1.15), Zipf(256, 1.5))
    for wrong in ("", "M", "M-X", "M-M-M", "m-m"):
        with pytest.raises(ConfigurationError, match="two of S, M, L"):
            llumnix_mix(wrong)


def test_other_lengths():
    assert Fixed(7).draw(3, random()).tolist() == [7, 7, 7]
    even = Uniform(3, 6).draw(COUNT, random())
    assert np.bincount(even)[3:] / COUNT == pytest.approx([0.25] * 4, abs=0.01)
    logs = np.log(LogNormal(1e5, 0.5).draw(COUNT, random()))
    assert (logs.mean(), logs.std()) == pytest.approx((np.log(1e5), 0.5), abs=0.01)
    cut = LogNormal(100, 2.0, 20, 300).draw(COUNT, random())
    assert (cut.min(), cut.max()) == (20, 300)
    assert (cut == 20).mean() == pytest.approx(0.21, abs=0.01)  # P(Z < ln(0.2) / 2), and some more


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fixed(0),
        lambda: Fixed(10**9),
        lambda: Uniform(0, 3),
        lambda: Uniform(4, 3),
        lambda: LogNormal(0, 1),
        lambda: LogNormal(5, -1),
        lambda: LogNormal(5, float("nan")),
        lambda: LogNormal(5, 1, 9, 8),
        lambda: Zipf(0, 1.0),
        lambda: Gamma(0),
        lambda: Gamma(float("inf")),
        lambda: Gamma(1, -1),
        lambda: Gamma(1, 1e-200),
        lambda: Gamma(1, 1e9),
        lambda: StepBurst(1, -1, 1),
        lambda: StepBurst(1, 1, 0),
        lambda: StepBurst(1, 1, 1, factor=0),
        lambda: generated("x", Fixed(1), Fixed(1), AllAtOnce(), 0, 0),
        lambda: generated("x", Fixed(1), Fixed(1), AllAtOnce(), 10**12, 0),
        lambda: generated("x", Fixed(1), Fixed(1), AllAtOnce(), 1, -1),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="must be"):
        wrong()


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_asked_for(cv):
    times = Gamma(5.0, cv).draw(COUNT, random())
    gaps = np.diff(times)
    assert (len(times), times[0]) == (COUNT + 1, 0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_gaps_are_exponential():
    gaps = np.diff(poisson(2.0).draw(COUNT, random()))
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, quantile) == pytest.approx(-np.log(1 - quantile) / 2, rel=0.02)


def test_arrivals_without_chance():
    assert Gamma(4.0, 0.0).draw(3, random()).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert AllAtOnce().draw(2, random()).tolist() == [0.0, 0.0, 0.0]
    # 2 per second for 3 s, 6 per second for 1 s, then 2 again.
    times = StepBurst(2.0, 3.0, 1.0, factor=3.0, cv=0.0).draw(14, random())
    assert times[:7] == pytest.approx(np.arange(7) / 2)
    assert times[6:13] == pytest.approx(3 + np.arange(7) / 6)
    assert times[12:] == pytest.approx([4.0, 4.5, 5.0])


def test_a_burst_doubles_the_rate_and_nothing_else():
    times = StepBurst(10.0, 5000.0, 2000.0).draw(COUNT, random())
    plain = poisson(10.0).draw(COUNT, random())
    assert (times[times < 5000] == plain[plain < 5000]).all()
    inside = np.diff(times[(times >= 5000) & (times < 7000)])
    assert len(inside) / 2000 == pytest.approx(20.0, rel=0.03)
    assert inside.std() == pytest.approx(inside.mean(), rel=0.03)
    assert np.diff(times[times >= 7000]).mean() == pytest.approx(0.1, rel=0.03)


def test_generated_workloads_come_from_their_seed_alone():
    prompts, outputs = llumnix_mix("M-M")
    made = generated("M-M", prompts, outputs, poisson(10.0), 1000, 1)
    assert made == generated("M-M", prompts, outputs, poisson(10.0), 1000, 1)
    assert made.rate == pytest.approx(10.0, rel=0.1)
    assert made.requests[0].at_s == 0.0
    table = RequestTable.of(made.requests)
    assert table.at_s[-1] < made.seconds
    assert (table.prompt != table.output).any()
    assert abs(np.corrcoef(table.prompt, table.output)[0, 1]) < 0.1
    other = RequestTable.of(generated("x", prompts, outputs, poisson(10.0), 1000, 2).requests)
    for mine, theirs in ((table.prompt, other.prompt), (table.output, other.output)):
        assert (mine != theirs).any()
    # Other times leave the lengths alone, and other prompts the outputs.
    changed = RequestTable.of(generated("x", Fixed(3), outputs, AllAtOnce(), 1000, 1).requests)
    assert (changed.output == table.output).all()
