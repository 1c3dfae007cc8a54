"""The peer: transformers' generate in a process and an environment of its own."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.bench.workload import Task

_SCRIPT = Path(__file__).parents[1] / "bench_transformers.py"


class Peer:
    """A running `bench_transformers.py`; idle between calls. Use as a context manager."""

    def __init__(self, python: str, model_dir: Path, threads: int | None) -> None:
        command = [python, str(_SCRIPT), str(model_dir)]
        if threads is not None:
            command.append(str(threads))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def generate(self, tasks: Sequence[Task]) -> tuple[float, list[list[int]]]:
        """(seconds, tokens) of one batched greedy generation. All lengths must be equal."""
        order = {
            "prompts": [task.prompt for task in tasks],
            "output_tokens": tasks[0].output_tokens,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["tokens"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The transformers process ended with status {self._process.wait()}; its "
                "messages above say why. --peer_python must be a Python with torch and "
                "transformers."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
