"""Which client stream listens to which request: at most one each, the newest."""

from serving.cluster.gateway_events import Deliver, GatewayEffect, StreamEnded, StreamOpened
from serving.cluster.gateway_requests import RequestRecord
from serving.errors import InternalError, StreamReplacedError


class ClientStreams:
    """Opens, feeds and ends the streams of one gateway, as effects."""

    def __init__(self, effects: list[GatewayEffect]) -> None:
        self._effects = effects
        self._streams: dict[int, RequestRecord] = {}

    def open(self, record: RequestRecord, stream: int) -> None:
        """This stream listens from now on; an older one is cut off."""
        if record.stream is not None:
            why = f"Request {record.request_id!r} was resumed on another stream."
            self._close(record, record.stream, StreamReplacedError(why))
        record.stream = stream
        self._streams[stream] = record
        self._effects.append(StreamOpened(stream, record.request))

    def broken(self, stream: int) -> RequestRecord | None:
        """Its client is gone; the request that now has no stream, if the stream was in use."""
        record = self._streams.pop(stream, None)
        if record is not None:
            record.stream = None
        return record

    def deliver(self, record: RequestRecord, from_index: int) -> None:
        """Give the stream everything from there on, and the end if the request ended."""
        if record.stream is None:
            return
        if record.finish is not None or from_index < len(record.tokens):
            self._effects.append(Deliver(record.stream, record.delta_from(from_index)))
        if record.finish is not None:
            self._close(record, record.stream, None)

    def _close(self, record: RequestRecord, stream: int, error: StreamReplacedError | None) -> None:
        self._effects.append(StreamEnded(stream, error))
        del self._streams[stream]
        record.stream = None

    def check_invariants(self, records: dict[str, RequestRecord]) -> None:
        """Raises InternalError if a stream and its request disagree."""
        listening = {
            record.stream: name for name, record in records.items() if record.stream is not None
        }
        if listening != {stream: record.request_id for stream, record in self._streams.items()}:
            raise InternalError("A client stream and its request do not name each other.")
