"""A whole deployment in one process: real cores, shells, threads and gRPC over loopback.

Only the device is modelled. Its executors stop before a step when told to, so that tests act at
known moments instead of sleeping.
"""

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from types import SimpleNamespace

import grpc
import pytest

from serving.api.grpc_server import start_inference_server, start_worker_server
from serving.api.metrics import ServingMetrics
from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from serving.api.text import TextService
from serving.api.validation import ModelLimits
from serving.api.worker_client import Backoff, WorkerClient
from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.gateway_shell import GatewayShell
from serving.cluster.messages import ReplicaInfo
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import WorkerConfig
from serving.cluster.worker_shell import WorkerShell
from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.executor import ExecutorLimits
from serving.engine.loop import LoopPorts, ReplicaThread
from serving.engine.request import SamplingParams
from serving.sim.modelled_executor import ModelledExecutor
from serving.sim.token_function import TokenFunction

LIMITS = ExecutorLimits(
    num_rows=4,
    num_blocks=64,
    slots_per_block=1,
    block_size=4,
    max_model_len=128,
    max_prefill_tokens=64,
    max_prefills=2,
    vocab_size=320,
    max_logprobs=3,
    model_revision="modelled",
)


class GatedExecutor:
    """A ModelledExecutor whose results come only while the gate allows them."""

    def __init__(self):
        self.inner = ModelledExecutor(LIMITS)
        self.collected = 0
        self._allowed = float("inf")
        self._changed = threading.Condition()

    @property
    def limits(self):
        return self.inner.limits

    def submit(self, plan):
        self.inner.submit(plan)

    def interrupt(self):
        self.inner.interrupt()

    def collect(self):
        with self._changed:
            while self._allowed <= 0:
                self._changed.wait()
            self._allowed -= 1
            self.collected += 1
        return self.inner.collect()

    def allow(self, steps):
        """Let so many steps more come back; infinity opens the gate."""
        with self._changed:
            self._allowed = steps
            self._changed.notify_all()


class Worker:
    """One worker: the shell, its replicas' threads and its server."""

    def __init__(self, incarnation, replicas=1, worker_id="worker-0", gated=False):
        self.incarnation = incarnation
        self.executors = [GatedExecutor() for _ in range(replicas)]
        if gated:
            self.allow(0)
        infos = tuple(ReplicaInfo.of(number, LIMITS) for number in range(replicas))
        config = WorkerConfig(
            worker_id,
            incarnation,
            "modelled",
            LIMITS.model_revision,
            LIMITS.vocab_size,
            infos,
            report_interval_s=0.05,
        )
        self.shell = WorkerShell(WorkerCore(config))
        self.posted = asyncio.Queue()
        self.threads = []
        for number, executor in enumerate(self.executors):
            thread = ReplicaThread(
                LoopPorts(
                    EngineCore(LIMITS, EngineConfig(replica=number, pipeline_depth=1)),
                    executor,
                    functools.partial(self.shell.stepped, number),
                    time.monotonic,
                ),
                functools.partial(self.shell.replica_failed, number),
            )
            self.shell.attach(number, functools.partial(self._post, thread))
            thread.start()
            self.threads.append(thread)
        self.server = None

    async def listen(self, port=0):
        self.server = await start_worker_server(self.shell, f"127.0.0.1:{port}")
        return self.server.port

    def allow(self, steps):
        for executor in self.executors:
            executor.allow(steps)

    async def hang_up(self):
        """Break every link; the worker itself lives on."""
        await self.server.stop(0)

    async def stop(self):
        await self.hang_up()
        self.shell.close()
        self.allow(float("inf"))
        for thread in self.threads:
            thread.stop()
        for thread in self.threads:
            assert await asyncio.to_thread(thread.join, 10.0)

    def _post(self, thread, event):
        thread.post(event)
        self.posted.put_nowait(event)


class Deployment:
    """A gateway, one worker and a client's stub."""

    def __init__(self, tokenizer, **config):
        limits = ModelLimits(LIMITS.vocab_size, LIMITS.max_model_len, LIMITS.max_logprobs)
        self.text = TextService("modelled", tokenizer, limits)
        self.gateway = GatewayShell(GatewayCore(GatewayConfig("gateway-0", **config)))
        self.metrics = ServingMetrics(self.text.model_id, self.gateway.info)
        self.ready = asyncio.Event()
        self.not_ready = asyncio.Event()
        self.gateway.on_ready_change(self._note_readiness)
        self._incarnations = itertools.count(1)
        self.worker = None
        self.port = 0
        self._cleanup = contextlib.AsyncExitStack()

    async def start(self, *, replicas=1, max_message_bytes=1 << 20, worker=True):
        self.server = await start_inference_server(
            self.gateway, self.text, self.metrics, "127.0.0.1:0", max_message_bytes
        )
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = pb_grpc.InferenceStub(self.channel)
        if worker:
            await self.start_worker(replicas=replicas)
        return self

    async def start_worker(self, **options):
        """A new incarnation of the worker, at the address of the one before."""
        self.worker = Worker(f"incarnation-{next(self._incarnations)}", **options)
        first = self.port == 0
        self.port = await self.worker.listen(self.port)
        if first:
            client = WorkerClient(
                f"127.0.0.1:{self.port}", self.gateway, Backoff(first_s=0.01, longest_s=0.05)
            )
            self._linking = asyncio.create_task(client.run())
        await asyncio.wait_for(self.ready.wait(), 10)

    async def stop(self):
        await self.channel.close()
        await self.server.stop(0)
        if self.worker is not None:
            self._linking.cancel()
            await asyncio.wait([self._linking])
            await self.worker.stop()
        self.gateway.close()
        for executor in self.worker.executors if self.worker else ():
            assert executor.inner.violations == []

    def reference(self, request, count):
        """What an undisturbed replica generates for a greedy request of token ids."""
        sampling = SamplingParams(
            temperature=request.sampling.temperature, seed=request.sampling.seed
        )
        function = TokenFunction(LIMITS.model_revision, LIMITS.vocab_size)
        return function.reference_tokens(tuple(request.token_ids.ids), count, sampling)

    def _note_readiness(self, ready):
        (self.ready if ready else self.not_ready).set()
        (self.not_ready if ready else self.ready).clear()


def generate_request(prompt=(1, 2, 3), max_tokens=16, **fields):
    """A greedy request in token ids."""
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, **fields.pop("sampling", {})}
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(**sampling), **fields
    )


async def read_all(call):
    """Every chunk of a stream, within a time in which anything here must end."""
    chunks = []
    async with asyncio.timeout(20):
        while (chunk := await call.read()) is not grpc.aio.EOF:
            chunks.append(chunk)
    return chunks


async def read_tokens(call, count):
    """Chunks until they hold `count` tokens."""
    chunks = []
    async with asyncio.timeout(20):
        while sum(len(chunk.token_ids) for chunk in chunks) < count:
            chunk = await call.read()
            assert chunk is not grpc.aio.EOF
            chunks.append(chunk)
    return chunks


async def read_until_error(call):
    """The chunks of a stream (or nothing of a unary call) and the error it ends with."""
    chunks = []
    try:
        async with asyncio.timeout(20):
            if not hasattr(call, "read"):
                await call
            else:
                while (chunk := await call.read()) is not grpc.aio.EOF:
                    chunks.append(chunk)
    except grpc.aio.AioRpcError as error:
        return chunks, error
    raise AssertionError("the call ended without an error")


async def refusal(call):
    """The error that a call ends with."""
    chunks, error = await read_until_error(call)
    assert chunks == []
    return error


@pytest.fixture
def calls():
    """Ways to read a call."""
    return SimpleNamespace(
        read_all=read_all,
        read_tokens=read_tokens,
        read_until_error=read_until_error,
        refusal=refusal,
    )


@pytest.fixture
def greedy():
    return generate_request


@pytest.fixture
async def deploy(byte_tokenizer):
    """Start deployments; they are stopped afterwards. Keywords are those of GatewayConfig."""
    started = []

    async def start(*, replicas=1, worker=True, max_message_bytes=1 << 20, **config):
        deployment = Deployment(byte_tokenizer(), **config)
        started.append(deployment)
        return await deployment.start(
            replicas=replicas, worker=worker, max_message_bytes=max_message_bytes
        )

    yield start
    for deployment in started:
        await deployment.stop()
