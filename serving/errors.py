"""Errors of requests and of serving, each with a sentence for the person who caused it."""

from pathlib import Path

from lumen.errors import LumenError


class InvalidRequestError(LumenError):
    """A request is malformed or out of range. `parameter` names the offending field."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnsupportedParameterError(InvalidRequestError):
    """A request asks for something Lumen does not do; it is refused by name, never ignored."""


class RequestTooLargeError(InvalidRequestError):
    """A request body or message is larger than the server reads."""


class UnknownModelError(LumenError):
    """The request names a model that is not served here."""


class UnknownRequestError(LumenError):
    """No request of that id is known (any more)."""


class RequestExistsError(LumenError):
    """A request of that id is already in progress."""


class StreamReplacedError(LumenError):
    """This stream was cut off because the request was resumed on another one."""


class QueueFullError(LumenError):
    """Too many requests wait. `retry_after_s` is a hint for the client."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(LumenError):
    """The server takes no new requests because it is about to stop."""


class UnavailableError(LumenError):
    """No worker could serve the request before it had to be given up."""


class DeadlineExceededError(LumenError):
    """The request's own deadline passed before it finished."""


class InternalError(LumenError):
    """Something failed inside Lumen; the message says what is known."""


class ConfigurationError(LumenError):
    """A flag, preset or combination of settings is wrong; the message names it."""


class ExecutorError(LumenError):
    """An executor failed to run a step; the replica cannot go on."""


class WorkloadFileError(LumenError):
    """A file of requests is malformed; the message names the place, what is there and what belongs.

    line: from 1; None if it is about the whole file. column: from 1; of a CSV file the cell, else
    the character. field: the name of what is wrong, if it has one.
    """

    def __init__(
        self,
        path: Path,
        found: str,
        expected: str,
        line: int | None = None,
        column: int | None = None,
        field: str = "",
    ) -> None:
        place = str(path)
        if line is not None:
            place += f", line {line}"
        if column is not None:
            place += f", column {column}"
        if field:
            place += f" ({field})"
        super().__init__(f"{place}: found {found}; expected {expected}.")
        self.path = path
        self.line = line
        self.column = column
        self.field = field


class EventLogError(LumenError):
    """An event log is malformed or of another version. offset: of the first wrong byte's record."""

    def __init__(self, path: Path, offset: int, found: str, expected: str) -> None:
        super().__init__(f"{path}, byte {offset}: found {found}; expected {expected}.")
        self.path = path
        self.offset = offset
