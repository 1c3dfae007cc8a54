"""The one table of statuses covers the whole family of errors."""

import grpc
import pytest

from lumen.errors import LumenError
from serving import errors
from serving.api.status import STATUSES, UNEXPECTED, message_of, retry_after_s, status_of


def family(kind):
    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize(
    "kind",
    [k for k in family(LumenError) if k.__module__ in ("lumen.errors", "serving.errors")],
)
def test_every_error_has_its_own_row(kind):
    assert kind in STATUSES


@pytest.mark.parametrize(
    ("error", "code", "http"),
    [
        (errors.InvalidRequestError("x", "top_p"), grpc.StatusCode.INVALID_ARGUMENT, 400),
        (errors.UnsupportedParameterError("x", "n"), grpc.StatusCode.INVALID_ARGUMENT, 400),
        (errors.UnknownModelError("x"), grpc.StatusCode.NOT_FOUND, 404),
        (errors.RequestExistsError("x"), grpc.StatusCode.ALREADY_EXISTS, 409),
        (errors.QueueFullError("x", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (errors.DrainingError("x"), grpc.StatusCode.UNAVAILABLE, 503),
        (errors.DeadlineExceededError("x"), grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    ],
)
def test_statuses(error, code, http):
    status = status_of(error)
    assert (status.grpc, status.http) == (code, http)
    assert message_of(error) == "x"


def test_a_new_kind_inherits_its_parents_row():
    class TooManyStopStringsError(errors.InvalidRequestError):
        pass

    assert status_of(TooManyStopStringsError("x")) is STATUSES[errors.InvalidRequestError]


def test_defects_are_told_in_general_only():
    error = KeyError("secret")
    assert status_of(error) is UNEXPECTED
    assert "secret" not in message_of(error)


def test_retry_after_is_known_for_a_full_queue_only():
    assert retry_after_s(errors.QueueFullError("x", 2.5)) == 2.5
    assert retry_after_s(errors.DrainingError("x")) is None
