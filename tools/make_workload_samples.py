"""Writes the sample traces of serving/sim/workload/samples, one in each form that is read.

python tools/make_workload_samples.py

All is drawn from one seed; nothing comes from a recorded trace.
"""

import json
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from absl import app

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.sim.workload.arrivals import Gamma
from serving.sim.workload.generated import generated
from serving.sim.workload.lengths import LogNormal
from serving.sim.workload.requests import Workload

FOLDER = Path(__file__).resolve().parents[1] / "serving" / "sim" / "workload" / "samples"
_SEED = 5
_BLOCK = 512
_WORDS = (
    "rain",
    "falls",
    "on",
    "the",
    "roofs",
    "of",
    "a",
    "small",
    "town",
    "and",
    "nobody",
    "asks",
)


def azure() -> str:
    """Two minutes of short conversations; lines end as in the public files."""
    start = datetime(2026, 1, 1, 9)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for one in _drawn(count=240, rate=2.0, cv=1.5, prompt=300, output=120).requests:
        time = start + timedelta(seconds=one.at_s)
        lines.append(f"{time:%Y-%m-%d %H:%M:%S.%f}0,{one.prompt},{one.output}")
    return "\r\n".join(lines) + "\r\n"


def mooncake() -> str:
    """Conversations of a few turns; each turn's prompt begins as the one before it did."""
    random = np.random.default_rng(_SEED)
    workload = _drawn(count=120, rate=0.5, cv=1.0, prompt=1500, output=250)
    past: dict[int, tuple[int, list[int]]] = {}  # tokens and blocks of each conversation so far
    blocks = 0
    lines = []
    for one in workload.requests:
        talk = int(random.integers(0, 40))
        tokens, known = past.get(talk, (0, []))
        prompt = tokens + one.prompt
        shared = known[: tokens // _BLOCK]
        new = -(-prompt // _BLOCK) - len(shared)
        hashes = [*shared, *range(blocks, blocks + new)]
        blocks += new
        past[talk] = (prompt, hashes)
        lines.append(json.dumps({
            "timestamp": round(1e3 * one.at_s), "input_length": prompt,
            "output_length": one.output, "hash_ids": hashes,
        }))  # fmt: skip
    return "\n".join(lines) + "\n"


def burstgpt() -> str:
    """Two models, one request in twenty failed."""
    random = np.random.default_rng(_SEED)
    lines = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    for one in _drawn(count=200, rate=0.1, cv=4.0, prompt=500, output=200).requests:
        model = ("ChatGPT", "GPT-4")[int(random.random() < 0.2)]
        log = ("Conversation log", "API log")[int(random.random() < 0.4)]
        output = 0 if random.random() < 0.05 else one.output
        total = one.prompt + output
        lines.append(f"{5 + int(one.at_s)},{model},{one.prompt},{output},{total},{log}")
    return "\n".join(lines) + "\n"


def sharegpt() -> str:
    """Conversations of one or two turns; one has no answer."""
    random = np.random.default_rng(_SEED)

    def text() -> str:
        return " ".join(random.choice(_WORDS, int(random.integers(3, 40))).tolist())

    talks = []
    for number in range(30):
        answers = int(random.integers(1, 3)) if number else 0
        speakers = ["human", *("gpt", "human") * answers][: 2 * answers or 1]
        turns = [{"from": speaker, "value": text()} for speaker in speakers]
        talks.append({"id": f"sample-{number}", "conversations": turns})
    return json.dumps(talks, indent=1) + "\n"


SAMPLES: dict[str, Callable[[], str]] = {
    "azure.csv": azure,
    "mooncake.jsonl": mooncake,
    "burstgpt.csv": burstgpt,
    "sharegpt.json": sharegpt,
}
"""What is in each file."""


def _drawn(count: int, rate: float, cv: float, prompt: float, output: float) -> Workload:
    return generated(
        "sample",
        LogNormal(prompt, 1.0, 1, 8000),
        LogNormal(output, 0.8, 1, 2000),
        Gamma(rate, cv),
        count,
        _SEED,
    )


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    FOLDER.mkdir(exist_ok=True)
    for name, content in SAMPLES.items():
        (FOLDER / name).write_text(content(), encoding="utf-8", newline="")


if __name__ == "__main__":
    app.run(main)
