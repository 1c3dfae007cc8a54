"""The public service `lumen.v1.Inference` on top of a Gateway and a TextService.

Errors are raised here and become statuses in `StatusInterceptor`. A stream that ends without
being read to its end, for whatever reason, lets go of its request at once.
"""

import asyncio
import platform
import secrets
import time
import uuid
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lumen.errors import LumenError
from serving.api import inference_messages as convert
from serving.api.metrics import ServingMetrics
from serving.api.observed_stream import ObservedStream
from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.proto import lumen_v1_pb2_grpc as pb_grpc
from serving.api.status import error_of_end
from serving.api.text import TextService
from serving.api.validation import (
    GRPC_DEFAULTS,
    ModelLimits,
    checked_request_id,
    generation_request,
    token_ids,
)
from serving.cluster.generation import Gateway, GenerationRequest
from serving.errors import InvalidRequestError, UnknownModelError

REQUEST_ID = "request-id"
"""Initial metadata of a stream: the id to Resume or Abort by."""

CAPABILITIES = (
    "generate",
    "resume",
    "abort",
    "tokenize",
    "stop_strings",
    "logprobs",
    "seed",
    "min_p",
    "slo_class",
    "deadline",
)
"""What a client may rely on, by name; names are added, never given another meaning."""

_COMPONENTS = ("lumen-jax", "jax", "jaxlib", "flax", "grpcio", "protobuf")


class InferenceService(pb_grpc.InferenceServicer):
    """Servicer of lumen.v1.Inference; all methods run on the gateway's loop.

    max_message_bytes: the server's limit of a request, to be told and to bound Detokenize.
    """

    def __init__(
        self, gateway: Gateway, text: TextService, metrics: ServingMetrics, max_message_bytes: int
    ) -> None:
        self._gateway = gateway
        self._text = text
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Run one generation and stream it."""
        arrived = time.monotonic()
        try:
            wanted = await self._request(request)
            stream = await self._text.generate(self._gateway, wanted)
        except LumenError as error:
            self._metrics.refused(error)
            raise
        observer = self._metrics.accepted(len(wanted.prompt), arrived)
        include_text = request.include_text if request.HasField("include_text") else True
        await self._send(ObservedStream(stream, observer, time.monotonic), include_text, context)

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> None:
        """Go on with a request that was started before."""
        arrived = time.monotonic()
        request_id = checked_request_id(request.request_id)
        if request.from_index < 0:
            raise InvalidRequestError(
                f"from_index is {request.from_index}; expected 0 or more.", "from_index"
            )
        stream = await self._text.resume(self._gateway, request_id, request.from_index)
        observer = self._metrics.resumed(arrived)
        include_text = request.include_text if request.HasField("include_text") else True
        await self._send(ObservedStream(stream, observer, time.monotonic), include_text, context)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """End a request."""
        await self._gateway.abort(checked_request_id(request.request_id))
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Text to token ids."""
        self._check_model(request.model)
        add = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._text.encode(request.text, add))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        """Token ids to text."""
        self._check_model(request.model)
        ids = token_ids(list(request.token_ids), self._unbounded(), "token_ids")
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=self._text.decode(ids, skip))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        """The model served here."""
        model = pb.Model(
            id=self._text.model_id,
            revision=convert.model_revision(self._gateway.info()),
            max_model_len=self._text.limits.max_model_len,
            vocab_size=self._text.limits.vocab_size,
        )
        return pb.ListModelsResponse(models=[model])

    async def ServerInfo(
        self, request: pb.ServerInfoRequest, context: Any
    ) -> pb.ServerInfoResponse:
        """What this server is, can do and refuses."""
        info = self._gateway.info()
        return pb.ServerInfoResponse(
            gateway_id=info.gateway_id,
            ready=info.ready and not info.draining,
            draining=info.draining,
            queued=info.queued,
            running=info.running,
            limits=pb.Limits(
                max_queued_requests=info.max_queued_requests,
                max_model_len=self._text.limits.max_model_len,
                max_message_bytes=self._max_message_bytes,
                max_logprobs=self._text.limits.max_logprobs,
                max_stop_strings=self._text.limits.max_stop_strings,
                max_resume_lease_s=self._text.limits.max_resume_lease_s,
            ),
            capabilities=CAPABILITIES,
            replicas=convert.replicas(info.workers),
            versions=_versions(),
        )

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        """Refuse new requests and wait for those that run."""
        await self._gateway.drain()
        return pb.DrainResponse()

    async def LoadReport(
        self, request: pb.LoadReportRequest, context: Any
    ) -> pb.LoadReportResponse:
        """What the replicas last said of themselves."""
        now = asyncio.get_running_loop().time()
        return pb.LoadReportResponse(replicas=convert.loads(self._gateway.info().fleet, now))

    async def _request(self, request: pb.GenerateRequest) -> GenerationRequest:
        self._check_model(request.model)
        request_id = checked_request_id(request.request_id or uuid.uuid4().hex)
        fields = convert.request_fields(request)
        match request.WhichOneof("prompt"):
            case "text":
                prompt = await self._text.encode_prompt(request.text) if request.text else ()
            case "token_ids":
                prompt = token_ids(list(request.token_ids.ids), self._text.limits)
            case _:
                prompt = ()
        return generation_request(
            fields,
            request_id=request_id,
            prompt=prompt,
            limits=self._text.limits,
            defaults=GRPC_DEFAULTS,
            draw_seed=lambda: secrets.randbits(32),
        )

    async def _send(self, stream: ObservedStream, include_text: bool, context: Any) -> None:
        request_id = stream.request.request_id
        try:
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            async for delta in stream:
                await context.write(convert.chunk(request_id, delta, include_text))
                if delta.finish is not None:
                    failure = error_of_end(delta.finish, delta.detail)
                    if failure is not None:
                        raise failure
        finally:
            await stream.aclose()

    def _check_model(self, model: str) -> None:
        if model not in ("", self._text.model_id):
            raise UnknownModelError(
                f"The model {model!a} is not served here; expected "
                f"{self._text.model_id!a} or an empty name."
            )

    def _unbounded(self) -> ModelLimits:
        """The model's limits for token ids that are no prompt: as many as a message holds."""
        return replace(self._text.limits, max_model_len=self._max_message_bytes)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _COMPONENTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # not installed as a distribution (a bundled build): nothing to report
    return found
