"""The self-check against a small HTTP server of its own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serving.errors import InternalError
from serving.launch.self_check import complete_once


@pytest.fixture
def serve():
    servers = []

    def start(completions_status, completion):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200, {"data": [{"id": "m"}]})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert asked["model"] == "m"
                assert asked["temperature"] == 0
                self._answer(completions_status, completion)

            def _answer(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever).start()
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_completion_comes_back(serve):
    port = serve(200, {"choices": [{"text": " Paris"}]})
    assert complete_once("127.0.0.1", port, "The capital of France is") == " Paris"


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [(503, {"error": "draining"}, "503"), (200, {"choices": []}, "IndexError")],
)
def test_another_answer_is_an_error_that_shows_it(serve, status, content, said):
    with pytest.raises(InternalError, match=said):
        complete_once("127.0.0.1", serve(status, content), "Hello")


def test_nobody_there():
    with pytest.raises(InternalError, match="refused"):
        complete_once("127.0.0.1", 1, "Hello")
