"""Compiles every program of a deployment and adds up what a device must hold."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lumen.errors import LumenError
from serving.engine.device.head_programs import HeadKind
from serving.engine.device.program_shapes import WHOLE
from serving.engine.device.programs import ProgramBuilder
from tools.aot.deployment import DoesNotFitError, Plan, argument_bytes, gib
from tools.aot.hlo_checks import (
    arena_problems,
    kernel_calls,
    memory_of,
    per_device,
    vmem_bytes,
    weight_problems,
)

ProgramKey = tuple[Any, ...]
"""As in `ProgramBuilder.lowerings`: (field of Programs, bucket, ...)."""

CompileProgress = Callable[[int, int, str], None]
"""Called with (programs done, all of them, name of the last)."""

_UNITS = ("decode_unit", "prefill_unit", "prefill_last", "mixed_unit", "mixed_last")


class DoesNotCompileError(LumenError):
    """The compiler refuses a program for another reason than memory."""


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """What compiling one program told.

    temp_bytes: its temporaries. extra_bytes: all it needs on a device while it runs besides
    weights and arena: temporaries, other inputs, outputs. code_bytes: of the program itself.
    vmem_bytes: most that one operation uses. alias_bytes: outputs that take the place of inputs.
    kernels: calls of Pallas kernels. problems: arena or weights copied.
    """

    key: ProgramKey
    temp_bytes: int
    extra_bytes: int
    code_bytes: int
    vmem_bytes: int
    alias_bytes: int
    kernels: int
    compile_s: float
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people: "decode_unit 16"."""
        return program_name(self.key)


def program_name(key: ProgramKey) -> str:
    """For people: "decode_unit 16"."""
    return " ".join(str(part.value if isinstance(part, HeadKind) else part) for part in key)


def compile_programs(
    plan: Plan,
    wanted: Callable[[ProgramKey], bool] = lambda key: True,
    threads: int = 1,
    progress: CompileProgress | None = None,
) -> tuple[CompiledProgram, ...]:
    """Compile the programs of a replica, those that `wanted` picks, with the arena as planned.

    Raises DoesNotFitError if the compiler finds no room for one, DoesNotCompileError.
    """
    settings = plan.deployment.settings
    lowerings = ProgramBuilder(plan.shapes).lowerings(
        settings.decode_buckets, settings.chunk_buckets, settings.mixed_sizes
    )
    chosen = {key: lower for key, lower in lowerings.items() if wanted(key)}
    found: dict[ProgramKey, CompiledProgram] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
        waiting = {pool.submit(_compiled, plan, key, chosen[key]): key for key in chosen}
        try:
            for future in as_completed(waiting):
                program = future.result()
                found[program.key] = program
                if progress is not None:
                    progress(len(found), len(chosen), program.name)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return tuple(found[key] for key in chosen)


def needed_bytes(plan: Plan, programs: Sequence[CompiledProgram]) -> int:
    """What a device must hold: weights, arena, every program, and room for the neediest one."""
    return plan.weights.whole + plan.arena_bytes + _besides_bytes(programs)


def _besides_bytes(programs: Sequence[CompiledProgram]) -> int:
    code = sum(program.code_bytes for program in programs)
    return code + max((program.extra_bytes for program in programs), default=0)


def check_total(plan: Plan, programs: Sequence[CompiledProgram]) -> None:
    """Raise DoesNotFitError, saying what would help, if it all together does not fit.

    The sum decides, and the compiler itself confirms it: a program that takes all of it compiles.
    """
    short = needed_bytes(plan, programs) - plan.hbm_bytes
    if short <= 0:
        besides = plan.shapes.struct((_besides_bytes(programs),), jnp.int8, WHOLE)
        argument_bytes((*_everything(plan), besides))
        return
    settings = plan.deployment.settings
    fraction = math.floor((settings.memory_fraction - short / plan.hbm_bytes) * 100) / 100
    if settings.num_blocks is None:
        help_ = f"lower --memory_fraction to {fraction} or raise --tensor_parallel"
    else:
        blocks = -(-short // plan.shapes.arena_layout.block_bytes)
        help_ = f"lower --num_blocks by {blocks} or raise --tensor_parallel"
    raise DoesNotFitError(
        f"Weights, KV arena, programs and temporaries together take {gib(short)} more than the "
        f"{gib(plan.hbm_bytes)} of a {plan.deployment.slice.generation} device: {help_}."
    )


def _compiled(
    plan: Plan, key: ProgramKey, lower: Callable[[], jax.stages.Lowered]
) -> CompiledProgram:
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if "RESOURCE_EXHAUSTED" in first and "hbm" in first.lower():
            raise DoesNotFitError(
                f"The program {program_name(key)} finds no room beside its weights and the KV "
                f"arena; lower --memory_fraction or raise --tensor_parallel. The compiler says: "
                f"{first}"
            ) from error
        raise DoesNotCompileError(
            f"The program {program_name(key)} cannot be compiled for "
            f"{plan.deployment.slice.name}: {first}"
        ) from error
    elapsed = time.perf_counter() - start
    memory = memory_of(compiled)
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return CompiledProgram(
        key,
        memory.temp_size_in_bytes,
        used - _lasting_bytes(plan, key[0]),
        memory.generated_code_size_in_bytes,
        vmem_bytes(compiled),
        memory.alias_size_in_bytes,
        kernel_calls(compiled),
        elapsed,
        _problems(plan, key, compiled),
    )


def _lasting_bytes(plan: Plan, kind: str) -> int:
    """Of a program's inputs and outputs, those that are there whether it runs or not."""
    weights = plan.weights
    if kind in _UNITS:
        return weights.unit + plan.arena_bytes
    return {
        "decode_embed": weights.embedding,
        "prefill_embed": weights.embedding,
        "mixed_embed": weights.embedding,
        "head": weights.head,
        "logits": weights.head,
        "zero_arena": plan.arena_bytes,
    }.get(kind, 0)


def _problems(plan: Plan, key: ProgramKey, compiled: jax.stages.Compiled) -> tuple[str, ...]:
    kind, *bucket = key
    shapes = plan.shapes
    found: list[str] = []
    heads = dict.fromkeys(("head", "logits"), shapes.defs.head)
    modules = {**heads, **dict.fromkeys(_UNITS, shapes.defs.unit)}
    if kind in _UNITS:
        found += arena_problems(compiled, [per_device(one) for one in shapes.arena()])
    if kind in modules:
        weights = [per_device(one) for one in shapes.weights(modules[kind])]
        # With as many tokens as a matrix has rows, activations have its shape.
        matrices = [one for one in weights if one.ndim == 2 and one.shape[0] != bucket[0]]
        found += weight_problems(compiled, matrices)
    return tuple(found)


def _everything(plan: Plan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """All weights and the arena."""
    shapes, model = plan.shapes, plan.deployment.model
    head = shapes.weights(shapes.defs.head)
    if model.tie_embeddings:
        head = tuple(one for one in head if one.ndim == 1)  # its table is the embedding's
    units = shapes.weights(shapes.defs.unit) * model.num_units
    return (*shapes.weights(shapes.defs.embedding), *units, *head, *shapes.arena())
