"""One table from errors to statuses, used by the gRPC and the HTTP front door alike."""

from dataclasses import dataclass

import grpc

from lumen.errors import (
    CheckpointError,
    LumenError,
    ModelConfigError,
    ModelUnavailableError,
    TokenizerError,
)
from serving.engine.request import FinishReason
from serving.errors import (
    ConfigurationError,
    DeadlineExceededError,
    DrainingError,
    EventLogError,
    ExecutorError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    RequestExistsError,
    RequestTooLargeError,
    StreamReplacedError,
    UnavailableError,
    UnknownModelError,
    UnknownRequestError,
    UnsupportedParameterError,
    WorkloadFileError,
)


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """What one kind of error is called on each front door.

    http: the HTTP status. openai_type and openai_code: `error.type` and `error.code` of an
    OpenAI-compatible error body. retryable: the same request may succeed later, unchanged.
    """

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    openai_code: str | None
    retryable: bool = False


_CODE = grpc.StatusCode
_INVALID = "invalid_request_error"
_SERVER = "server_error"

STATUSES: dict[type[LumenError], ErrorStatus] = {
    InvalidRequestError: ErrorStatus(_CODE.INVALID_ARGUMENT, 400, _INVALID, "invalid_value"),
    UnsupportedParameterError: ErrorStatus(
        _CODE.INVALID_ARGUMENT, 400, _INVALID, "unsupported_parameter"
    ),
    RequestTooLargeError: ErrorStatus(_CODE.RESOURCE_EXHAUSTED, 413, _INVALID, "request_too_large"),
    UnknownModelError: ErrorStatus(_CODE.NOT_FOUND, 404, _INVALID, "model_not_found"),
    UnknownRequestError: ErrorStatus(_CODE.NOT_FOUND, 404, _INVALID, "request_not_found"),
    RequestExistsError: ErrorStatus(_CODE.ALREADY_EXISTS, 409, _INVALID, "request_exists"),
    StreamReplacedError: ErrorStatus(_CODE.ABORTED, 409, _INVALID, "stream_replaced"),
    QueueFullError: ErrorStatus(
        _CODE.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "queue_full", retryable=True
    ),
    DrainingError: ErrorStatus(_CODE.UNAVAILABLE, 503, _SERVER, "draining", retryable=True),
    UnavailableError: ErrorStatus(_CODE.UNAVAILABLE, 503, _SERVER, "unavailable", retryable=True),
    DeadlineExceededError: ErrorStatus(
        _CODE.DEADLINE_EXCEEDED, 504, "timeout_error", "deadline_exceeded"
    ),
    ModelUnavailableError: ErrorStatus(_CODE.UNAVAILABLE, 503, _SERVER, "model_unavailable"),
    TokenizerError: ErrorStatus(_CODE.FAILED_PRECONDITION, 400, _INVALID, "tokenizer_error"),
    ModelConfigError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "model_config_error"),
    CheckpointError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "checkpoint_error"),
    ConfigurationError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "configuration_error"),
    ExecutorError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "executor_error"),
    WorkloadFileError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "workload_file_error"),
    EventLogError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "event_log_error"),
    InternalError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "internal_error"),
    LumenError: ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "internal_error"),
}
"""Every error type has its own row; a test walks the family."""

UNEXPECTED = ErrorStatus(_CODE.INTERNAL, 500, _SERVER, "internal_error")
"""For exceptions that are not LumenErrors: a defect of ours, logged in full, told in general."""


def status_of(error: BaseException) -> ErrorStatus:
    """The status of an error: that of its own type, else of its nearest ancestor in the table."""
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return UNEXPECTED


def message_of(error: BaseException) -> str:
    """What the client is told: the error's own sentence, or a general one for a defect."""
    if isinstance(error, LumenError):
        return str(error)
    return "an internal error occurred; the server's log has the details"


def error_of_end(finish: FinishReason, detail: str) -> LumenError | None:
    """What an accepted request's end is as an error; None for ends that are no failure.

    A request ends FAILED when no worker could complete it; what a client did wrong was refused
    before it was accepted.
    """
    if finish is FinishReason.FAILED:
        return UnavailableError(detail or "The request failed; no reason is known.")
    if finish is FinishReason.DEADLINE:
        return DeadlineExceededError(detail or "The request's deadline passed.")
    return None


def retry_after_s(error: BaseException) -> float | None:
    """Seconds after which trying again makes sense, if that is known."""
    if isinstance(error, QueueFullError):
        return error.retry_after_s
    return None
