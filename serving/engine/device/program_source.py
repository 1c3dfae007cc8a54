"""Where a program comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

Key = tuple[Any, ...]
"""Of a program, as in `ProgramBuilder.lowerings`: its kind, its bucket, ..."""


@dataclass(frozen=True, slots=True)
class Source:
    """A cache finds it by name and checks its arguments, a child knows it by key; else: lower."""

    key: Key
    lower: Callable[[], jax.stages.Lowered]
    arguments: tuple[Any, ...]
