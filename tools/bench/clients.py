"""The two protocols a benchmark can speak."""

import json
from typing import Any, Protocol

import aiohttp
import grpc
import grpc.aio

from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from tools.bench.record import RequestRecord
from tools.bench.workload import Task


class Client(Protocol):
    """Sends one request and fills in its record. Failures are recorded, not raised."""

    async def send(self, task: Task, record: RequestRecord) -> None:
        """Returns when the request ended."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class OpenAIClient:
    """Streaming completions over HTTP; works with any OpenAI-compatible server."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._model = model
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def send(self, task: Task, record: RequestRecord) -> None:
        """See Client."""
        body = {
            "model": self._model,
            "prompt": list(task.prompt),
            "max_tokens": task.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    record.finish(f"HTTP {response.status}")
                    return
                done = False
                async for line in response.content:
                    done = _read_event(line, record) or done
        except TimeoutError:
            record.finish("timeout")
        except aiohttp.ClientError as error:
            record.finish(type(error).__name__)
        else:
            record.finish("" if done else "stream ended early")

    async def aclose(self) -> None:
        """See Client."""
        await self._session.close()


def _read_event(line: bytes, record: RequestRecord) -> bool:
    """One line of a server-sent event stream; whether it was the last."""
    if not line.startswith(b"data:"):
        return False
    data = line[5:].strip()
    if data == b"[DONE]":
        return True
    event = json.loads(data)
    if event.get("choices") and event["choices"][0].get("text"):
        record.arrived(1)
    if usage := event.get("usage"):
        record.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens") or 0
    return False


class GrpcClient:
    """lumen.v1 Generate. slo_class: of all requests; interactive unless given."""

    def __init__(
        self,
        address: str,
        timeout_s: float,
        slo_class: Any = pb.SLO_CLASS_INTERACTIVE,
    ) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._slo_class = slo_class

    async def send(self, task: Task, record: RequestRecord) -> None:
        """See Client."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=task.prompt),
            sampling=pb.SamplingParams(
                temperature=0.0, max_tokens=task.output_tokens, ignore_eos=True
            ),
            slo_class=self._slo_class,
            include_text=False,
        )
        try:
            async for chunk in self._stub.Generate(request, timeout=self._timeout_s):
                if chunk.token_ids:
                    record.arrived(len(chunk.token_ids))
                    record.tokens.extend(chunk.token_ids)
                if chunk.HasField("usage"):
                    record.output_tokens = chunk.usage.completion_tokens
                    record.cached_tokens = chunk.usage.cached_tokens
        except grpc.aio.AioRpcError as error:
            record.finish(error.code().name)
        else:
            record.finish()

    async def aclose(self) -> None:
        """See Client."""
        await self._channel.close(None)
