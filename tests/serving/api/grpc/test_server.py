"""What the server says of itself: health, reflection, models, limits, loads; and draining."""

import asyncio
import math

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.api.grpc_server import INFERENCE_SERVICE, start_inference_server
from serving.api.proto import lumen_v1_pb2 as pb
from serving.errors import ConfigurationError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def watch_health(deployment, service=INFERENCE_SERVICE):
    stub = health_pb2_grpc.HealthStub(deployment.channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service))


async def until(watch, status):
    async with asyncio.timeout(20):
        while (await watch.read()).status != status:
            pass


@pytest.mark.parametrize("service", ["", INFERENCE_SERVICE])
async def test_health_follows_the_workers(deploy, service):
    deployment = await deploy(worker=False)
    watch = watch_health(deployment, service)
    await until(watch, NOT_SERVING)
    await deployment.start_worker()
    await until(watch, SERVING)
    await deployment.worker.hang_up()
    await until(watch, NOT_SERVING)
    await deployment.worker.listen(deployment.port)
    await until(watch, SERVING)
    watch.cancel()


async def test_reflection_lists_the_services(deploy):
    deployment = await deploy(worker=False)
    stub = reflection_pb2_grpc.ServerReflectionStub(deployment.channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "lumen.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_drain_finishes_what_runs_and_refuses_the_rest(deploy, greedy, calls):
    deployment = await deploy()
    watch = watch_health(deployment)
    await until(watch, SERVING)
    deployment.worker.allow(2)
    running = deployment.stub.Generate(greedy())
    await calls.read_tokens(running, 1)
    drained = deployment.stub.Drain(pb.DrainRequest())
    await until(watch, NOT_SERVING)
    error = await calls.refusal(deployment.stub.Generate(greedy()))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    info = await deployment.stub.ServerInfo(pb.ServerInfoRequest())
    assert (info.draining, info.ready, info.running) == (True, False, 1)
    assert not drained.done()
    deployment.worker.allow(math.inf)
    assert (await calls.read_all(running))[-1].finish_reason == pb.FINISH_REASON_LENGTH
    async with asyncio.timeout(20):
        await drained
    watch.cancel()


async def test_models_and_server_info(deploy):
    deployment = await deploy(replicas=2, max_queued_requests=9)
    models = (await deployment.stub.ListModels(pb.ListModelsRequest())).models
    assert list(models) == [
        pb.Model(id="modelled", revision="modelled", max_model_len=128, vocab_size=320)
    ]
    info = await deployment.stub.ServerInfo(pb.ServerInfoRequest())
    assert info.gateway_id == "gateway-0"
    assert (info.ready, info.draining, info.queued, info.running) == (True, False, 0, 0)
    assert info.limits == pb.Limits(
        max_queued_requests=9,
        max_model_len=128,
        max_message_bytes=1 << 20,
        max_logprobs=3,
        max_stop_strings=4,
        max_resume_lease_s=600.0,
    )
    assert [(r.worker_id, r.incarnation, r.replica) for r in info.replicas] == [
        ("worker-0", "incarnation-1", 0),
        ("worker-0", "incarnation-1", 1),
    ]
    assert info.replicas[0].num_blocks == 64
    assert "resume" in info.capabilities
    assert {"lumen-jax", "jax", "python"} <= set(info.versions)


async def test_load_report_covers_every_replica(deploy):
    deployment = await deploy(replicas=2)
    async with asyncio.timeout(20):
        while len((await report(deployment)).replicas) < 2:
            pass
    first, second = (await report(deployment)).replicas
    assert (first.replica, second.replica) == (0, 1)
    assert first.worker_id == "worker-0"
    assert first.total_blocks == first.free_blocks == 64
    assert (first.healthy, first.draining, first.block_size) == (True, False, 4)
    assert 0 <= first.report_age_s < 10


async def report(deployment):
    return await deployment.stub.LoadReport(pb.LoadReportRequest())


async def test_tokenize_and_back(deploy):
    deployment = await deploy(worker=False)
    made = await deployment.stub.Tokenize(pb.TokenizeRequest(text="héé"))
    assert list(made.token_ids) == [256, *"héé".encode()]
    bare = await deployment.stub.Tokenize(
        pb.TokenizeRequest(text="héé", add_special_tokens=False, model="modelled")
    )
    assert list(bare.token_ids) == list("héé".encode())
    text = await deployment.stub.Detokenize(pb.DetokenizeRequest(token_ids=bare.token_ids))
    assert text.text == "héé"
    many = await deployment.stub.Detokenize(pb.DetokenizeRequest(token_ids=[65] * 1000))
    assert many.text == "A" * 1000


async def test_a_port_in_use_is_named(deploy):
    deployment = await deploy(worker=False)
    address = f"127.0.0.1:{deployment.server.port}"
    with pytest.raises(ConfigurationError, match=address):
        await start_inference_server(
            deployment.gateway, deployment.text, deployment.metrics, address
        )


async def test_streams_and_refusals_count_into_the_metrics(deploy, calls, greedy):
    deployment = await deploy()
    await calls.read_all(deployment.stub.Generate(greedy((1, 2, 3), max_tokens=5)))
    with pytest.raises(grpc.aio.AioRpcError):
        await calls.read_all(deployment.stub.Generate(greedy((1, 2), model="another")))
    left = deployment.stub.Generate(greedy((4, 5), max_tokens=64))
    await calls.read_tokens(left, 1)
    left.cancel()
    async with asyncio.timeout(20):
        while counted(deployment, "request_success", finished_reason="abort") != 1:
            await asyncio.sleep(0.01)  # the server learns of the cancelled call on its own time
    assert counted(deployment, "request_success", finished_reason="length") == 1
    assert counted(deployment, "request_attempts") == 2
    assert counted(deployment, "prompt_tokens") == 5
    assert counted(deployment, "generation_tokens") >= 6
    assert counted(deployment, "time_to_first_token_seconds", "_count") == 2
    assert counted(deployment, "request_refused", code="model_not_found") == 1


def counted(deployment, name, suffix="_total", **labels):
    """The value of one metric."""
    labels = {"model_name": "modelled", **labels}
    return deployment.metrics.registry.get_sample_value(f"lumen:{name}{suffix}", labels)
