"""Start to ready, each time in a process of its own, with an empty cache and with a full one."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.bench.engine.engine import Built
from tools.bench.engine.receipts import EngineError

_MARK = "started: "
_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class StartUp:
    """seconds: from the first call after the imports to an executor that is ready. weights_s: of
    them, until the weights were on the device. kv_tokens: capacity of the KV arena."""

    seconds: float
    weights_s: float
    kv_tokens: int


def report(built: Built) -> str:
    """The line with which a child tells how it started."""
    found = StartUp(round(built.seconds, 3), round(built.weights_s, 3), built.kv_tokens)
    return _MARK + json.dumps(asdict(found))


def start(command: Sequence[str], cache_dir: Path) -> StartUp:
    """Start once. command: of this tool with all its flags. Raises EngineError if it fails."""
    try:
        done = subprocess.run(
            [*command, "--start_only", f"--cache_dir={cache_dir}"],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"A start took more than {error.timeout:.0f} s.") from error
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return StartUp(**json.loads(line.removeprefix(_MARK)))
    last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    raise EngineError(f"A start failed with status {done.returncode}: {last}")
