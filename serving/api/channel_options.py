"""Settings of gRPC channels and servers."""

type Options = list[tuple[str, int]]

_UNLIMITED = -1

_ON_THE_WAY_BYTES = 65_535
"""What a worker may send before its gateway reads: some steps. What comes more waits at the worker,
and travels together: a gateway that is late has fewer messages to read and catches up. By itself
gRPC would let it grow to megabytes of single steps."""

# A dead host on a silent link is noticed within time + timeout. A dead process needs none of
# this: its sockets close.
_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

LINK_OPTIONS: Options = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _ON_THE_WAY_BYTES),
]
"""For the gateway's channel to a worker: both ends are ours, prompts were limited before."""

LINK_SERVER_OPTIONS: Options = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
]
"""For the worker's server."""


def public_server_options(max_message_bytes: int) -> Options:
    """For the gateway's server: larger messages are refused with RESOURCE_EXHAUSTED.

    Two servers on one port would share its clients between them; without SO_REUSEPORT the second
    one fails to start instead.
    """
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", _UNLIMITED),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
    ]
