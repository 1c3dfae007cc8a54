"""Profiles: how fast one replica is on some hardware, in a small JSON file.

{"name": "h200_llama_8b", "hardware": ..., "model": ..., "dtype": ..., "tensor_parallel": 1,
 "source": where the figures come from, "date": "2026-11-25", "assumed": [sentences, one for each
 table that was not measured], "executor": {...}, "cost": {...}, "moves": {...},
 "held_out": {"points", "mean", "largest"} or null, "measured": [Measured, ...] if there is any}

`executor` has the shapes that programs are compiled for (`ProfileExecutor`), `cost` the tables of
a CostModel as lists of [x, seconds], `moves` is `Moves`.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.executor import ExecutorLimits
from serving.errors import ConfigurationError
from serving.sim.cost_fit import FitError, Measured
from serving.sim.cost_model import CostModel, Curve
from serving.sim.literal import LiteralError, Reader, from_literal

MOST_BLOCKS = 1 << 24  # of KV; a device of today has some 10,000
_MOST = {"num_rows": 1 << 16, "num_blocks": MOST_BLOCKS, "block_size": 1 << 20}


class ProfileError(ConfigurationError):
    """A profile cannot be used; the message names the file and what is wrong in it."""


@dataclass(frozen=True, slots=True)
class ProfileExecutor:
    """The executor that was measured: see DeviceExecutorConfig."""

    num_rows: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_prefills: int
    prefill_buckets: tuple[int, ...]
    mixed_calls: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...] | None = None

    def config(self) -> DeviceExecutorConfig:
        """Its sizes of batches and calls. Raises ConfigurationError."""
        return DeviceExecutorConfig(
            max_model_len=self.max_model_len,
            num_rows=self.num_rows,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_prefill_tokens=self.prefill_buckets[-1] if self.prefill_buckets else 0,
            max_prefills=self.max_prefills,
            prefill_buckets=self.prefill_buckets,
            mixed_calls=self.mixed_calls,
            batch_sizes=self.batch_sizes,
        )


@dataclass(frozen=True, slots=True)
class Moves:
    """What moving things and starting costs. Nothing in the simulator does either yet.

    kv_bytes_per_token: of one device. copy_bytes_per_s: KV between two devices of a host,
    host_bytes_per_s: between device and host memory. weight_bytes: of one device;
    weight_bytes_per_s: taking them back from a neighbour. cold_start_s, warm_start_s: from the
    start of a process to ready, without and with compiled programs.
    """

    kv_bytes_per_token: int
    copy_bytes_per_s: float
    host_bytes_per_s: float
    weight_bytes: int
    weight_bytes_per_s: float
    cold_start_s: float
    warm_start_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One replica on some hardware; see the module. measured: what `cost` was fitted to."""

    name: str
    hardware: str
    model: str
    dtype: str
    tensor_parallel: int
    source: str
    date: str
    assumed: tuple[str, ...]
    executor: ProfileExecutor
    cost: CostModel
    moves: Moves
    held_out: FitError | None
    measured: tuple[Measured, ...] = ()

    def limits(self, num_blocks: int | None = None) -> ExecutorLimits:
        """What plans may ask of such a replica; num_blocks: instead of those measured."""
        config = self.executor.config()
        return ExecutorLimits(
            num_rows=config.num_rows,
            num_blocks=self.executor.num_blocks if num_blocks is None else num_blocks,
            slots_per_block=1,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_prefill_tokens=config.max_prefill_tokens,
            max_prefills=config.max_prefills,
            vocab_size=1 << 17,
            max_logprobs=1,
            model_revision=self.name,
            mixed_sizes=config.mixed_sizes,
        )


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ProfileError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"Profile {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise ProfileError(f"Profile {path} is no JSON: {error}.") from error
    try:
        profile: Profile = from_literal(Profile, content, readers=_READERS)
        for name, most in _MOST.items():
            if (value := getattr(profile.executor, name)) > most:
                raise ProfileError(f"executor.{name} is {value}; it must be at most {most}.")
        profile.executor.config()
    except (LiteralError, ConfigurationError) as error:
        raise ProfileError(f"Profile {path}: {error}") from error
    return profile


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile, each measured step on a line of its own."""
    content = dataclasses.asdict(profile)
    for name, value in content["cost"].items():
        if isinstance(value, dict):
            content["cost"][name] = value["points"]
    measured = ",\n    ".join(json.dumps(step) for step in content.pop("measured"))
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # Points and pairs of numbers on one line each.
    text = re.sub(r"\[\s+([-\d.e+]+),\s+([-\d.e+]+)\s+\]", r"[\1, \2]", text)
    if measured:
        text = text.removesuffix("\n}") + f',\n  "measured": [\n    {measured}\n  ]\n}}'
    path.write_text(text + "\n", encoding="utf-8")


def _limited(kind: type) -> Reader:
    def read(value: Any, where: str) -> Any:
        number = from_literal(kind, value, where)
        if not 0 <= number < float("inf"):
            raise LiteralError(f"{where} is {number!r}; it must be finite and not negative.")
        return number

    return read


_NUMBERS: dict[Any, Reader] = {int: _limited(int), float: _limited(float)}


def _curve(value: Any, where: str) -> Curve:
    points = from_literal(tuple[tuple[float, float], ...], value, where, _NUMBERS)
    xs = [x for x, _ in points]
    if not points or xs != sorted(set(xs)):
        raise LiteralError(f"{where} must have points [x, seconds], at least one, x ascending.")
    return Curve(points)


_READERS = {**_NUMBERS, Curve: _curve}
