"""Runs the HTTP application on a socket."""

from aiohttp import web

from serving.api.http.app import http_app
from serving.api.http.front_door import FrontDoor
from serving.errors import ConfigurationError

_SHUTDOWN_S = 2.0  # streams left at the end of a drain are cut off after this


class HttpServer:
    """Serves a FrontDoor over HTTP on the running event loop."""

    def __init__(self, door: FrontDoor) -> None:
        # Cancelling the handler of a client that went away is what frees its request at once.
        self._runner = web.AppRunner(
            http_app(door), handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S
        )

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses if `port` is 0.

        Raises ConfigurationError if the address cannot be taken.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigurationError(
                f"HTTP cannot listen on {host}:{port} ({error.strerror}); choose another "
                "--http_port, or 0 for a free one."
            ) from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the socket, then what is still open. Safe to call twice."""
        await self._runner.cleanup()
