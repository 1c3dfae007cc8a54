"""lumen-serve: one gateway and one worker on this machine, kept alive."""

import dataclasses
import sys
import threading
from typing import Any

from lumen.errors import LumenError
from serving.launch.config import ServeConfig
from serving.launch.flags import EXIT_CONFIGURATION, parse, to_flags
from serving.launch.model import check_arena_holds_a_request, served_model
from serving.launch.ports import reserve_port
from serving.launch.progress import progress_display
from serving.launch.self_check import complete_once
from serving.launch.supervisor import ChildPlan, Supervisor, say

ABOUT = "serve a model on this machine, over gRPC and an OpenAI-compatible endpoint."
EXAMPLE = """lumen-serve                               # a small model on the CPU
lumen-serve --model=/models/Llama-3.1-8B --tensor_parallel=2 --http_port=9000"""

# What children may take on top of the drain to close their sockets.
CLOSING_S = 5.0


def run() -> None:
    """The console script: exits with the supervisor's status."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Parse, prepare the model once, supervise. Returns the exit status."""
    try:
        config = with_ports(parse("lumen-serve", argv, ABOUT, EXAMPLE).config)
        prepare_model(config)
    except LumenError as error:
        say(str(error))
        return EXIT_CONFIGURATION
    except KeyboardInterrupt:
        return 130
    return Supervisor(child_plans(config), Greeter(config)).run()


def with_ports(config: ServeConfig) -> ServeConfig:
    """The configuration with every port named; raises ConfigurationError if one is taken."""
    door = config.front_door
    http_port = reserve_port(door.host, door.http_port, "http_port")
    grpc_port = reserve_port(door.host, door.grpc_port, "grpc_port")
    worker_port = reserve_port("127.0.0.1", 0, "listen")
    address = f"127.0.0.1:{worker_port}"
    return dataclasses.replace(
        config,
        front_door=dataclasses.replace(door, http_port=http_port, grpc_port=grpc_port),
        worker=dataclasses.replace(config.worker, listen=address),
        gateway=dataclasses.replace(config.gateway, workers=address),
    )


def prepare_model(config: ServeConfig) -> None:
    """Find the model before children need it: a wrong name is said once and at once.

    The default model is downloaded and converted here if this is the first start.
    """
    with progress_display() as progress:
        model = served_model(config.model, progress)
    check_arena_holds_a_request(config.batching, model)


def child_plans(config: ServeConfig) -> list[ChildPlan]:
    """The worker and the gateway; the gateway is stopped first and drains."""
    python = (sys.executable, "-m")
    # The worker is stopped when the gateway has drained, so it has nothing left to wait for.
    at_once = dataclasses.replace(config, life=dataclasses.replace(config.life, drain_s=0.0))
    worker = (*python, "serving.launch.worker", *to_flags(at_once, "lumen-worker"))
    gateway = (*python, "serving.launch.gateway", *to_flags(config, "lumen-gateway"))
    return [
        ChildPlan("worker", worker, CLOSING_S),
        ChildPlan("gateway", gateway, config.life.drain_s + CLOSING_S),
    ]


class Greeter:
    """Tells the person at the terminal when all is ready, and shows a first answer."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._greeted = False

    def __call__(self, name: str, event: dict[str, Any]) -> None:
        """Hear what a child announces."""
        if name != "gateway" or event["event"] != "serving":
            return
        if self._greeted:
            say("ready again.")
            return
        self._greeted = True
        door = self._config.front_door
        url = f"http://{_spelled(door.host)}:{door.http_port}"
        print(
            f"Lumen is ready: {event['model']} at {url}/v1 (OpenAI) and "
            f"{_spelled(door.host)}:{door.grpc_port} (gRPC). Ctrl-C stops it.\n\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
            f'\'{{"model": "{event["model"]}", "messages": [{{"role": "user", "content": '
            f'"What is the capital of France?"}}]}}\'\n',
            flush=True,
        )
        if self._config.check.check_prompt:
            # In a thread of its own, so that signals and deaths are still attended to.
            threading.Thread(target=self._check, name="self-check", daemon=True).start()

    def _check(self) -> None:
        door, prompt = self._config.front_door, self._config.check.check_prompt
        host = "127.0.0.1" if door.host == "0.0.0.0" else "::1" if door.host == "::" else door.host
        try:
            answer = complete_once(host, door.http_port, prompt)
        except LumenError as error:
            say(str(error))
            return
        print(f"A first prompt: {prompt!r}\nits completion: {answer!r}", flush=True)


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    run()
