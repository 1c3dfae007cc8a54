"""Reads from a compiled program that big arrays stay where they are.

XLA may give an array another layout between its own operations and a kernel, and then copies it:
an arena of tens of GiB at every layer, or a unit's weights at every call. Nothing fails and
nothing warns; the program text and its memory analysis tell.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_VMEM_SIZE = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
_CALLED = re.compile(r"\bcalls=%?([^\s,)]+)")

# These make no array: they rename one, or pass one on that a computation below them makes.
_RENAMING = frozenset(
    {"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call",
     "opt-barrier"}
)  # fmt: skip
# Parts of asynchronous operations; what they run stands in a computation of its own.
_ASYNC_ENDS = ("-start", "-update", "-done")
# XLA updates the operand of these in place, or else copies it first, which shows as a copy.
_IN_PLACE = frozenset({"scatter", "dynamic-update-slice"})


@dataclass(frozen=True, slots=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the main memory, not in VMEM or scalar memory."""
        return "S(" not in self.layout

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]{{{self.layout}}}"


@dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    opcode: str
    arrays: tuple[_Array, ...]  # of the result
    rest: str  # operands and attributes
    root: bool


def arena_problems(
    compiled: jax.stages.Compiled, arena: Sequence[jax.ShapeDtypeStruct]
) -> list[str]:
    """Why this program may not keep the arena in place; empty if it does.

    compiled: takes the arena, donated, and returns it. arena: its segments on one device. Looks
    at the alias of input and output, at room for a copy among the temporaries, and at instructions
    that make an array of a segment's size.
    """
    memory = memory_of(compiled)
    sizes = [math.prod(one.shape) * np.dtype(one.dtype).itemsize for one in arena]
    found = []
    if memory.alias_size_in_bytes < sum(sizes):
        found.append(
            f"the alias of outputs to inputs covers {memory.alias_size_in_bytes} bytes, not the "
            f"arena's {sum(sizes)}"
        )
    if memory.temp_size_in_bytes >= min(sizes):
        found.append(
            f"temporaries take {memory.temp_size_in_bytes} bytes, enough to hide a copy of the "
            f"arena ({min(sizes)})"
        )
    computations = _computations(_text(compiled))
    # Another layout of the arena is no fault by itself: with rows of 128, tiles of 8 and of 16 rows
    # are the same bytes. What moves bytes makes an array.
    elements = {math.prod(one.shape) for one in arena}
    found += [
        f"{one.opcode} {one.name} makes {array}, as large as a segment of the arena"
        for one, array in _made(computations)
        if array.size in elements
    ]
    return found


def weight_problems(
    compiled: jax.stages.Compiled, weights: Sequence[jax.ShapeDtypeStruct]
) -> list[str]:
    """Weights that this program copies into another layout in the main memory; empty if none.

    weights: matrices on one device. Reading ahead into VMEM is no such copy.
    """
    shapes = {tuple(one.shape) for one in weights}
    return [
        f"{one.opcode} {one.name} makes {array}, a copy of weights"
        for one, array in _made(_computations(_text(compiled)))
        if array.in_hbm and array.shape in shapes
    ]


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """The compiler's own account: sizes on one device, in bytes."""
    memory = compiled.memory_analysis()
    assert memory is not None, "TPU programs have a memory analysis"
    return memory


def vmem_bytes(compiled: jax.stages.Compiled) -> int:
    """Most VMEM that one operation of the program sets aside for its own buffers."""
    used = (_VMEM_SIZE.findall(match) for match in _VMEM.findall(_text(compiled)))
    return max((int(size) for sizes in used for size in sizes), default=0)


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    """Calls of Pallas kernels in the program's text."""
    return _text(compiled).count('custom_call_target="tpu_custom_call"')


def per_device(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The part of an array on a mesh that one device holds."""
    sharding: Any = struct.sharding
    return jax.ShapeDtypeStruct(sharding.shard_shape(struct.shape), struct.dtype)


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None, "TPU programs have a text"
    return text


def _made(computations: dict[str, list[_Instruction]]) -> Iterator[tuple[_Instruction, _Array]]:
    """Instructions that need a buffer of their own for an array of their result."""
    for one in _run(computations):
        if one.opcode in _RENAMING | _IN_PLACE:
            continue
        if one.opcode.endswith(_ASYNC_ENDS) and one.opcode != "copy-start":
            continue
        if one.opcode == "fusion" and _root(computations, one).opcode in _IN_PLACE:
            continue
        if one.opcode == "custom-call" and "output_to_operand_aliasing=" in one.rest:
            continue
        # The result of copy-start names the source too, behind the copy.
        for array in one.arrays[:1] if one.opcode == "copy-start" else one.arrays:
            yield one, array


def _run(computations: dict[str, list[_Instruction]]) -> Iterator[_Instruction]:
    """Instructions whose results are stored: not those inside a fusion."""
    fused = {
        match[1]
        for instructions in computations.values()
        for one in instructions
        if one.opcode == "fusion" and (match := _CALLED.search(one.rest))
    }
    for name, instructions in computations.items():
        if name not in fused:
            yield from instructions


def _root(computations: dict[str, list[_Instruction]], fusion: _Instruction) -> _Instruction:
    """What makes the result of a fusion, renaming set aside."""
    match = _CALLED.search(fusion.rest)
    assert match is not None, f"a fusion without a computation: {fusion.name}"
    body = {one.name: one for one in computations[match[1]]}
    root = next(one for one in body.values() if one.root)
    while root.opcode == "bitcast":
        root = body[root.rest.split(")")[0].strip().lstrip("%")]
    return root


def _computations(text: str) -> dict[str, list[_Instruction]]:
    """Instructions of every computation of an HLO module, in order."""
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = match.groups()
            current.append(_Instruction(name, opcode, _arrays(result), rest, bool(root)))
    return found


def _arrays(text: str) -> tuple[_Array, ...]:
    return tuple(
        _Array(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(text)
    )
