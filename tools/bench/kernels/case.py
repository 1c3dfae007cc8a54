"""A row of the table before it is measured, and what measuring it can come to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lumen_kernels.target import Target

from tools.bench.kernels.operations import Operations
from tools.bench.kernels.sizes import Sizes
from tools.bench.kernels.timing import Program, Timing


class WrongResultError(Exception):
    """A kernel computed something else than its reference. It is not timed."""


class DoesNotFitError(Exception):
    """The arena is too small for this shape."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one call cannot avoid: bytes read and written, floating-point operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """What to compare with. unit: "us", "TB/s" or "TFLOP/s", of the row's samples and of these."""

    unit: str
    floor: float | None = None
    aim: float | None = None
    peer: float | None = None
    peer_source: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds per call, one sample per batch; of a peer measured beside it too."""

    samples_s: Sequence[float]
    peer_samples_s: Sequence[float] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One row. measure: checks, then times; raises WrongResultError, DoesNotFitError."""

    name: str
    work: Work
    bar: Bar
    programs: Sequence[Program]
    measure: Callable[[], Measurement] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all operations are measured with."""

    sizes: Sizes
    operations: Operations
    target: Target
    timing: Timing
