"""Ports: is one free, and which is."""

import errno
import socket

from serving.errors import ConfigurationError


def reserve_port(host: str, port: int, flag: str) -> int:
    """The port if nobody listens there (a free one if it is 0).

    It is bound and let go again, so that a port in use is reported before anything is loaded.
    Raises ConfigurationError naming the port and the flag.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigurationError(
            f"--host={host} is not an address of this machine ({error.strerror}); try 127.0.0.1."
        ) from error
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        # Connections of an earlier server may still be closing; they are no reason to refuse.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Two sockets may share a port with SO_REUSEADDR until one listens.
            probe.listen(1)
        except OSError as error:
            raise ConfigurationError(_refusal(host, port, flag, error)) from error
        return int(probe.getsockname()[1])


def _refusal(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} on {host} is in use by another program; stop it or choose another "
            f"with --{flag}=PORT (0 takes a free one)."
        )
    if error.errno == errno.EACCES:
        return f"Port {port} may not be opened by this user; choose one above 1023 with --{flag}."
    return (
        f"{host}:{port} cannot be listened on ({error.strerror}); --host must be an address of "
        f"this machine and --{flag} a free port."
    )
