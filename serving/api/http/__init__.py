"""The OpenAI-compatible HTTP server."""

from serving.api.http.app import http_app
from serving.api.http.front_door import FrontDoor
from serving.api.http.server import HttpServer

__all__ = ["FrontDoor", "HttpServer", "http_app"]
