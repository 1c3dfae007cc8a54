"""Words of the wire and those of this code for them, and what is said of a word unknown here."""

from collections.abc import Mapping

from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.engine.request import FinishReason
from serving.errors import InvalidRequestError

FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
FINISH_FROM_PB: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_NONE: None,
    **{number: reason for reason, number in FINISH_TO_PB.items()},
}


def unknown_content(what: str) -> InvalidRequestError:
    """The error for what this version has no word for."""
    return InvalidRequestError(
        f"a {what} says something unknown here; run gateway and worker of one version"
    )


def known[T](table: Mapping[int, T], number: int, what: str) -> T:
    """What a number of the wire means. Raises InvalidRequestError if nothing known here."""
    if number not in table:
        raise unknown_content(what)
    return table[number]
