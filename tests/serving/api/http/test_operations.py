"""Models, health, metrics and debugging over a real socket."""

import asyncio
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.engine.request import FinishReason
from serving.errors import QueueFullError
from serving.policy.snapshot import FleetSnapshot, ReplicaLoad, WorkerLoad

MODEL = "tiny/byte-model"
LOAD = ReplicaLoad(
    replica=1, running=4, waiting=2, waiting_tokens=99, total_blocks=10, free_blocks=5,
    cached_blocks=3, block_size=16,
)  # fmt: skip
FLEET = FleetSnapshot((WorkerLoad("w", "i", (LOAD,), 0.0),), ())


async def samples(served):
    async with served.session.get(served.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = {k: v for k, v in one.labels.items() if k != "model_name"}
            assert one.labels["model_name"] == MODEL
            found[one.name, *sorted(labels.values())] = one.value
    return found


async def complete(served, **fields):
    return await served.post(
        "/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": 64, **fields}
    )


async def test_models(served):
    status, answer, _ = await served.get("/v1/models")
    assert (status, answer["object"]) == (200, "list")
    (model,) = answer["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 512)
    assert (await served.get(f"/v1/models/{MODEL}"))[1] == model
    assert (await served.get("/v1/models/tiny%2Fbyte-model"))[1] == model


async def test_health(served):
    assert (await served.get("/health"))[:2] == (200, {"status": "ready"})
    served.gateway.ready = False
    status, answer, _ = await served.get("/health")
    assert (status, answer["reason"]) == (503, "no healthy replica is connected")
    served.gateway.draining = True
    status, answer, _ = await served.get("/health")
    assert status == 503
    assert answer["reason"].startswith("draining")


async def test_version(served):
    status, answer, _ = await served.get("/version")
    assert status == 200
    assert answer["version"][0].isdigit()


async def test_gauges_are_those_of_the_last_reports(served):
    served.gateway.fleet = FLEET
    found = await samples(served)
    assert found["lumen:num_requests_running", "1", "w"] == 4
    assert found["lumen:num_requests_waiting", "1", "w"] == 2
    assert found["lumen:kv_cache_usage_perc", "1", "w"] == pytest.approx(0.2)
    assert found["lumen:gateway_requests_queued",] == 3
    assert found["lumen:gateway_ready",] == 1


async def test_counters_and_histograms(served):
    served.gateway.cached_tokens = 4
    await complete(served)
    await complete(served, max_tokens=2, stream=False)
    served.gateway.refusal = QueueFullError("Full.", 1.0)
    await complete(served)
    await complete(served, n=2)
    found = await samples(served)
    assert found["lumen:prompt_tokens_total",] == 12
    assert found["lumen:generation_tokens_total",] == 7
    assert found["lumen:prefix_cache_queries_total",] == 12
    assert found["lumen:prefix_cache_hits_total",] == 8
    assert found["lumen:request_attempts_total",] == 2
    assert found["lumen:request_resubmissions_total",] == 0
    assert found["lumen:request_success_total", "stop"] == 1
    assert found["lumen:request_success_total", "length"] == 1
    assert found["lumen:request_refused_total", "queue_full"] == 1
    assert found["lumen:request_refused_total", "unsupported_parameter"] == 1
    assert found["lumen:time_to_first_token_seconds_count",] == 2
    assert found["lumen:inter_token_latency_seconds_count",] == 5
    assert found["lumen:request_time_per_output_token_seconds_count",] == 2
    assert found["lumen:e2e_request_latency_seconds_count",] == 2
    assert found["lumen:request_prompt_tokens_sum",] == 12
    assert found["lumen:request_generation_tokens_sum",] == 7


async def test_a_client_that_went_away_and_a_failure_are_counted(served):
    served.gateway.hold_at = 3
    waiting = asyncio.ensure_future(complete(served))
    await served.gateway.until_held()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(served.gateway.running["id0"].closed.wait(), 20)
    served.gateway.hold_at = None
    served.gateway.finish = FinishReason.FAILED
    await complete(served)
    found = await samples(served)
    assert found["lumen:request_success_total", "abort"] == 1
    assert found["lumen:request_success_total", "error"] == 1


@dataclass(frozen=True)
class Decision:
    request_id: str
    loads: tuple[ReplicaLoad, ...]
    reason: FinishReason
    score: float


async def test_debug(serve):
    decisions = (Decision("r", (LOAD,), FinishReason.STOP, float("inf")),)
    async with serve(decisions=lambda: decisions) as served:
        served.gateway.fleet = FLEET
        status, state, _ = await served.get("/debug/state")
        assert (status, state["gateway_id"], state["ready"]) == (200, "scripted", True)
        assert state["fleet"]["workers"][0]["replicas"][0]["free_blocks"] == 5
        status, answer, _ = await served.get("/debug/decisions")
        assert status == 200
        (one,) = answer["decisions"]
        assert (one["kind"], one["reason"], one["score"]) == ("Decision", "stop", "inf")
        assert one["loads"][0]["total_blocks"] == 10
