"""What every program takes, said without tracing any."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving.engine.device.program_signature import UNTOLD
from serving.engine.device.programs import ProgramBuilder
from serving.engine.executor import MixedSize


class ArgumentLister(ProgramBuilder):
    """Goes the way of a `ProgramBuilder` up to where tracing would begin."""

    def arguments(
        self,
        decode_buckets: Sequence[int],
        chunk_buckets: Mapping[int, int],
        mixed_sizes: Sequence[MixedSize],
    ) -> dict[tuple[Any, ...], tuple[Any, ...]]:
        """The keys of `lowerings` to the arguments of that program: trees of shape structs."""
        listed: dict[tuple[Any, ...], Any] = {
            **self.lowerings(decode_buckets, chunk_buckets, mixed_sizes)
        }
        return {key: arguments() for key, arguments in listed.items()}

    def _lower(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        out_specs: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        return arguments

    def _zero_arena(self) -> Any:
        return ()

    def _schedule_shape(self, make: Callable[..., Any], *arguments: Any) -> Any:
        return UNTOLD  # only tracing tells
