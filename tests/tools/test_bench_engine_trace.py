"""Work itl of bench_engine: the trace, the search for saturation, and the sums."""

import dataclasses
import itertools

import numpy as np
import pytest

from serving.engine.request import FinishReason, RequestOutput
from serving.sim.workload.requests import Workload, WorkloadRequest
from tools.bench.engine import measurements
from tools.bench.engine.engine import TINY, InProcessEngine, build
from tools.bench.engine.latency import gaps_ms, histogram, quantiles, step_kinds
from tools.bench.engine.measurements import Bench
from tools.bench.engine.receipts import EngineError, Receipt, Receipts
from tools.bench.engine.saturation import Queue, RateSearch, Served, queue_of, service_rate
from tools.bench.engine.step_clock import StepTime
from tools.bench.engine.trace import endless, mean_lengths, timed_jobs, window
from tools.bench.engine.trace_latency import TraceOptions
from tools.bench.engine.works import SMOKE, Job

SETTINGS = dataclasses.replace(
    TINY, max_model_len=64, num_rows=2, prefill_buckets=(16,), max_prefills=1, num_blocks=16
)


@pytest.fixture(scope="module")
def engine():
    made = InProcessEngine(build(SETTINGS, None).executor, SETTINGS)
    yield made
    made.close()


def trace(count, every_s=0.01, prompt=20, output=6):
    rows = tuple(WorkloadRequest(every_s * number, prompt, output) for number in range(count))
    return Workload("trace", every_s * count, rows)


def test_a_window_starts_at_zero_and_leaves_out_what_does_not_fit():
    late = WorkloadRequest(9.5, 100, 1), WorkloadRequest(10.0, 1, 1)
    recorded = Workload("trace", 11.0, (*trace(10, every_s=1.0).requests, *late))
    found = window(recorded, start_s=4.0, seconds=6.0, max_tokens=26)
    assert [one.at_s for one in found.requests] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert found.left_out == 1
    assert (found.rate, *mean_lengths(found)) == (1.0, 20, 6)
    with pytest.raises(ValueError, match="no request of at most 25 tokens between 4 and 10 s"):
        window(recorded, 4.0, 6.0, 25)


def test_a_window_is_scaled_in_time_to_a_rate():
    found = trace(90, every_s=2.0)
    jobs = timed_jobs(found, rate=5.0, vocab_size=50)
    assert [job.at_s for job in jobs] == pytest.approx([0.2 * number for number in range(90)])
    assert {(len(job.job.prompt), job.job.output_tokens) for job in jobs} == {(20, 6)}
    assert len({job.job.prompt for job in jobs}) == 90
    assert timed_jobs(found, 1.0, 50)[7].job == jobs[7].job


def test_requests_of_a_window_come_over_and_over_with_other_prompts():
    rows = tuple(WorkloadRequest(0.0, prompt, prompt + 1) for prompt in range(1, 8))
    jobs = list(itertools.islice(endless(Workload("trace", 10.0, rows), 50), 14))
    assert sorted(len(job.prompt) for job in jobs[:7]) == list(range(1, 8))
    assert [len(job.prompt) for job in jobs[:7]] == [len(job.prompt) for job in jobs[7:]]
    assert [len(job.prompt) for job in jobs[:7]] != list(range(1, 8))
    assert all(job.output_tokens == len(job.prompt) + 1 for job in jobs)
    assert len({job.prompt for job in jobs if len(job.prompt) > 3}) == 8


@pytest.mark.parametrize(
    ("served", "rate", "bounded"),
    [
        (10.0, 10.0, True),  # as fast as they come
        (9.0, 10.0, False),  # one in ten stays, and after 15 s they wait for more than a second
        (9.8, 10.0, True),  # too close to tell in 15 s
    ],
)
def test_a_queue_that_grows_is_told_from_one_that_does_not(served, rate, bounded):
    arrived = np.arange(0, 15, 1 / rate)
    left = np.arange(1 / served, 15, 1 / served)
    found = queue_of(arrived, left, 15.0)
    assert found.leaving == pytest.approx(served, rel=0.02)
    assert found.waiting == pytest.approx((rate - served) * 15, abs=1.01)
    assert found.bounded(rate) is bounded


def test_waiting_a_little_is_no_saturation():
    # Prompts wait for a second, while others come: but no more at the end than before.
    arrived = np.arange(0, 15, 0.1)
    found = queue_of(arrived, arrived + 0.95, 15.0)
    assert found.waiting in (9, 10)
    assert found.bounded(10.0)
    assert Queue(9.5, 9).bounded(10.0)
    # A long queue that shrinks is bounded, one that does not is not.
    assert Queue(6.5, 40).bounded(6.0)
    assert not Queue(5.5, 40).bounded(6.0)


def test_what_comes_after_a_trial_is_not_counted():
    assert queue_of([0.0, 1.0, 13.0], [5.0, 12.5], 12.0) == Queue(1 / 8, 1)


@pytest.mark.parametrize("tries", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("truth", [7.0, 9.3, 10.0, 11.0, 14.0])
def test_the_search_closes_in_on_the_highest_bounded_rate(truth, tries):
    search = RateSearch(10.0, tries)
    tried = []
    while (rate := search.next()) is not None:
        tried.append(rate)
        search.tell(rate, rate <= truth)
    assert len(tried) == len(set(tried)) == tries
    assert search.bounded == max((rate for rate in tried if rate <= truth), default=None)
    if tries == 6:
        assert search.bounded == pytest.approx(truth, rel=0.1)


def test_service_rate_counts_whole_requests():
    # Of 8 prompt tokens and 5 more each, 4 per second, after a first half in which many begin.
    begun = [0.1] * 30 + list(np.arange(5.01, 10, 0.25)) + [10.5]
    tokens = list(np.arange(5.01, 10, 0.05)) + [11.0] * 9
    served = Served(begun, [8] * len(begun), tokens)
    assert service_rate(served, 8.0, 5.0, 10.0) == pytest.approx(4.0, rel=0.03)
    # Where prompts are ahead of tokens, the truth is between.
    ahead = Served(begun, [16] * len(begun), tokens)
    assert service_rate(ahead, 8.0, 5.0, 10.0) == pytest.approx(6.0, rel=0.03)


def test_gaps_are_those_between_tokens_of_one_request():
    one = Receipt("1", Job((1,), 4), [1, 2, 3, 4], [1.0, 1.02, 1.02, 1.05])
    other = Receipt("2", Job((1,), 1), [1], [5.0])
    assert gaps_ms([one, other]) == pytest.approx([20.0, 0.0, 30.0])
    assert gaps_ms([other]).size == 0


def test_quantiles_and_histogram_keep_the_distribution():
    values = np.arange(1, 1001) / 10
    found = quantiles(values)
    assert found["p50"] == pytest.approx(50.05)
    assert found["p99"] == pytest.approx(99.001, rel=1e-4)
    assert (found["mean"], found["max"]) == (50.05, 100.0)
    assert quantiles(np.zeros(0)) == {}
    made = histogram(np.array([0.0, 1.0, 1.01, 9.9, 100.0]))
    assert (made["first"], made["zero"]) == (0, 1)
    assert {number: count for number, count in enumerate(made["counts"]) if count} == {
        0: 2, 19: 1, 40: 1,
    }  # fmt: skip
    assert histogram(np.zeros(2))["zero"] == 2


def test_steps_are_told_apart_by_what_they_prefill():
    at = [0.0, 0.010, 0.020, 0.070, 5.0, 5.1]
    rows, prefill = [8, 8, 8, 6, 0, 4], [0, 0, 0, 300, 100, 0]
    steps = [
        StepTime(row, tokens, time, 0.0, 0.0, 0.0)
        for row, tokens, time in zip(rows, prefill, at, strict=True)
    ]
    kinds = {kind.prefill: kind for kind in step_kinds(steps)}
    assert set(kinds) == {"no", "257-512"}  # around a step without decodes the loop may have slept
    assert (kinds["no"].count, kinds["no"].median_ms) == (2, 10.0)
    assert (kinds["257-512"].median_ms, kinds["257-512"].decode_rows) == (50.0, 6)
    assert kinds["257-512"].share == pytest.approx(5 / 7, rel=1e-3)
    assert step_kinds(steps[:1]) == []


def test_receipts_are_whole_when_all_have_ended_and_none_is_to_come():
    receipts = Receipts()
    one, other = receipts.add("1", Job((1,), 2)), receipts.add("2", Job((1,), 1))
    receipts.take([RequestOutput("1", 1, 0, (5,)), RequestOutput("2", 1, 0, (7,))])
    receipts.take([RequestOutput("1", 1, 1, (6,), finish=FinishReason.LENGTH)])
    assert one.tokens == [5, 6]
    assert one.times[0] <= one.times[1] == receipts.ended_at
    one.check_whole()
    with pytest.raises(EngineError, match="2 ended as not at all"):
        other.check_whole()
    receipts.close()
    assert not receipts.done.is_set()
    receipts.take([RequestOutput("2", 1, 1, (), finish=FinishReason.CANCELLED)])
    assert receipts.done.is_set()
    assert (one.cancelled, other.cancelled) == (False, True)


def test_requests_come_when_they_are_due_and_can_be_cancelled(engine):
    first = engine.submit(Job((1, 2), 60))
    second = engine.submit(Job((3,), 2))
    engine.cancel(first)
    engine.drain()
    second.check_whole()
    assert first.cancelled or len(first.tokens) == 60
    assert second.times == sorted(second.times)
    assert engine.generate([Job((9,), 2)]).output_tokens == 2


def bench(engine, options, reps=1):
    return Bench(engine, SMOKE, reps, barred=True, trace=options)


def test_itl_finds_saturation_and_measures_at_a_share_of_it(engine, monkeypatch):
    # How fast this machine is decides nothing here.
    queues = iter([Queue(1e9, 0), Queue(0.0, 9)])
    monkeypatch.setattr("tools.bench.engine.trace_latency.queue_of", lambda *_: next(queues))
    options = TraceOptions(trace=trace(40), seconds=0.3, trial_s=0.3, trials=2)
    saturation, *rows = measurements.itl(bench(engine, options, reps=2))
    first, second = saturation["tried"]
    assert (first["bounded"], second["bounded"]) == (True, False)
    assert second["rate"] == pytest.approx(1.1 * first["rate"])
    assert saturation["name"] == "saturation, 30 requests of 0.3 s of the trace from 0 s on"
    assert saturation["samples"][0] == pytest.approx(first["rate"], rel=1e-4)
    at = f" at {0.7 * saturation['median']:.4g} requests/s, 70 % of saturation"
    names = {one["name"].removesuffix(at): one for one in rows}
    assert {"ITL p50", "ITL p99", "TTFT p50", "TTFT p99", "output"} < set(names)
    p99, p50 = names["ITL p99"], names["ITL p50"]
    assert (p99["floor"], p99["aim"]) == pytest.approx(
        (3 * p50["median"], 2 * p50["median"]), rel=1e-3
    )
    assert p99["note"].endswith("150 gaps")  # 30 requests of 6 tokens
    assert sum(p99["histogram"][0]["counts"]) + p99["histogram"][0]["zero"] == 150
    assert len(p99["samples"]) == len(p99["quantiles"]) == 2


def test_no_bounded_rate_is_a_row_that_says_so(engine, monkeypatch):
    queue = Queue(0.0, 9)
    monkeypatch.setattr("tools.bench.engine.trace_latency.queue_of", lambda *_: queue)
    options = TraceOptions(trace=trace(20), seconds=0.2, trial_s=0.1, trials=1)
    (one,) = measurements.itl(bench(engine, options))
    assert one["status"] == "not measured: no rate tried had a bounded queue"


def test_a_saturation_that_is_known_is_not_searched_for(engine):
    options = TraceOptions(trace=trace(9), start_s=0.02, seconds=0.05, saturation=100.0)
    saturation, *rows = measurements.itl(bench(engine, options))
    assert saturation["samples"] == [100.0]
    assert "tried" not in saturation
    assert rows[0]["name"] == "ITL p50 at 70 requests/s, 70 % of saturation"


def test_a_trace_without_a_request_that_fits_is_a_row_that_says_so(engine):
    (one,) = measurements.itl(bench(engine, TraceOptions(trace=trace(3, prompt=99))))
    assert one["status"].startswith("not measured: The trace has no request of at most 64 tokens")


@pytest.mark.parametrize("wrong", ["seconds", "load", "trial_s", "trials", "saturation", "start_s"])
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=wrong):
        TraceOptions(trace=trace(1), **{wrong: -1 if wrong == "start_s" else 0})
