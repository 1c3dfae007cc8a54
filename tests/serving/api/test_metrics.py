"""One request's metrics, delta by delta, on a clock of the test's own."""

import pytest

from serving.api.metrics import ServingMetrics
from serving.cluster.generation import Delta, GatewayInfo
from serving.engine.request import FinishReason
from serving.policy.snapshot import FleetSnapshot


@pytest.fixture
def metrics():
    info = GatewayInfo("g", True, False, 0, 0, 8, (), FleetSnapshot((), ()))
    return ServingMetrics("m", lambda: info)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"lumen:{name}", {"model_name": "m", **labels})


def test_latencies_are_the_clients(metrics):
    one = metrics.accepted(10, arrived=100.0)
    one.observe(Delta(0, (), attempt=1), 100.5)
    one.observe(Delta(0, (1,), cached_tokens=8, attempt=1), 102.0)
    one.observe(Delta(1, (2, 3), cached_tokens=8, attempt=1), 103.0)
    one.observe(Delta(3, (4,), cached_tokens=8, attempt=1), 105.0)
    one.observe(Delta(4, (), finish=FinishReason.LENGTH, attempt=1), 106.0)
    one.ended(FinishReason.CANCELLED, 200.0)  # letting go of a finished stream counts no more
    assert value(metrics, "time_to_first_token_seconds_sum") == 2.0
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "inter_token_latency_seconds_sum") == 3.0
    assert value(metrics, "request_time_per_output_token_seconds_sum") == 1.0
    assert value(metrics, "e2e_request_latency_seconds_sum") == 6.0
    assert value(metrics, "prompt_tokens_total") == 10
    assert value(metrics, "prefix_cache_hits_total") == 8
    assert value(metrics, "generation_tokens_total") == 4
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 0


def test_placements_after_the_first_are_resubmissions(metrics):
    one = metrics.accepted(10, arrived=0.0)
    for attempt in (1, 1, 3, 3, 4):
        one.observe(Delta(0, (1,), attempt=attempt), 1.0)
    assert value(metrics, "request_attempts_total") == 4
    assert value(metrics, "request_resubmissions_total") == 3


def test_a_resumed_stream_counts_neither_prompt_nor_earlier_placements(metrics):
    one = metrics.resumed(arrived=0.0)
    one.observe(Delta(7, (1,), attempt=3), 1.0)
    one.observe(Delta(8, (1,), attempt=4, finish=FinishReason.STOP), 1.0)
    assert value(metrics, "prompt_tokens_total") == 0
    assert value(metrics, "request_attempts_total") == 1
    assert value(metrics, "request_resubmissions_total") == 1


def test_a_request_without_a_token_has_no_token_latencies(metrics):
    metrics.accepted(5, 0.0).ended(FinishReason.CANCELLED, 1.0)
    assert value(metrics, "time_to_first_token_seconds_count") == 0
    assert value(metrics, "prompt_tokens_total") == 0
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
