"""What the end-to-end tests do with a running server."""

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.api.proto import lumen_v1_pb2 as pb
from tools.bench.spawn import Server

# A refused connection, of a gateway just killed, must not make later tests wait.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# One setting for all, so that programs are compiled once.
TINY = ("--model=random:tiny-llama", "--num_rows=2", "--token_budget=32", "--platform=cpu")


@dataclasses.dataclass(frozen=True)
class LiveServer:
    """A running lumen-serve and its processes."""

    server: Server

    @property
    def pid(self):
        return self.server.process.pid

    def children(self):
        """pid by name of the supervisor's children."""
        found = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            module = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[2]
            found[module.rpartition(".")[2]] = int(pid)
        return found

    def kill(self, name):
        os.kill(self.children()[name], signal.SIGKILL)


def greedy(prompt, tokens, **more):
    """A request whose output depends on nothing but the prompt."""
    return pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2),
        **more,
    )


@dataclasses.dataclass
class Output:
    """A stream read to its end. margins: log-probability of the best token over the second."""

    tokens: list
    margins: list
    attempts: set
    last: pb.GenerateChunk

    def same_as(self, other):
        """Greedy equality: token by token up to a near tie, where two right answers part."""
        for mine, theirs, margin in zip(self.tokens, other.tokens, self.margins, strict=True):
            if mine != theirs:
                return margin <= 1e-3
        return True


async def read(call, first=None):
    """Read a stream to its end; each index comes once and in order. `first`: chunks read before."""
    chunks = list(first or [])
    while (chunk := await call.read()) is not grpc.aio.EOF:
        chunks.append(chunk)
    start = chunks[0].start_index
    output = Output([], [], set(), chunks[-1])
    for chunk in chunks:
        assert not chunk.token_ids or chunk.start_index == start + len(output.tokens)
        output.tokens.extend(chunk.token_ids)
        for one in chunk.logprobs:
            output.margins.append(one.top[0].logprob - one.top[1].logprob)
        if chunk.token_ids:
            output.attempts.add(chunk.attempt)
    return output


async def until_healthy(channel):
    """Wait for the standard health service to say SERVING, through restarts of the gateway."""
    health = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(90):
        while True:
            watch = health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            try:
                while (answer := await watch.read()) is not grpc.aio.EOF:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        watch.cancel()
                        return
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise


async def until_idle(stub):
    """Wait until the load reports say that nothing runs, waits or is held; the last of them."""
    asked = time.monotonic()
    async with asyncio.timeout(20):
        while True:
            report = await stub.LoadReport(pb.LoadReportRequest())
            elapsed = time.monotonic() - asked
            if report.replicas and all(
                one.report_age_s < elapsed  # older ones do not know what the test did
                and not one.running
                and not one.waiting
                and one.free_blocks + one.cached_blocks == one.total_blocks
                for one in report.replicas
            ):
                return report
            await asyncio.sleep(0.05)  # there is no stream of reports to wait on
