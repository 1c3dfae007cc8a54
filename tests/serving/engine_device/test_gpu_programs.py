"""Every program of a replica is lowered for Hopper GPUs, on a machine without one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from lumen_kernels.arena import slot_shape
from lumen_kernels.reduce_norm import Mailboxes
from lumen_kernels.target import HOPPER

from lumen.model import model_defs
from lumen.presets import preset
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.head_programs import HeadKind
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.programs import ProgramBuilder
from serving.engine.executor import MixedSize

LAYERS = 4
MAX_LOGPROBS = 20
UNITS = (("decode_unit", 16), ("prefill_unit", 64))
KERNEL = "custom_call @mosaic_gpu"


def builder(
    tensor: int, head_dim: int, block_size: int, mailboxes: Mailboxes | None = None
) -> ProgramBuilder:
    config = dataclasses.replace(preset("llama-3.1-8b"), num_layers=LAYERS, head_dim=head_dim)
    heads = HeadLayout(config.num_heads, config.num_kv_heads, tensor)
    mesh = Mesh(np.array(jax.devices()[:tensor]), (TENSOR_AXIS,))
    layout = ArenaLayout(
        4096, LAYERS * heads.kv_per_device, heads.kv_per_device, block_size,
        slot_shape(block_size, head_dim, HOPPER), jnp.bfloat16,
    )  # fmt: skip
    defs = model_defs(config, heads, jnp.bfloat16)
    shapes = ProgramShapes(
        config, defs, mesh, jnp.bfloat16, layout, 64, 32, MAX_LOGPROBS, mailboxes
    )
    return ProgramBuilder(shapes, HOPPER, ("cuda",))


@pytest.mark.parametrize(("tensor", "head_dim", "block_size"), [(1, 128, 64), (2, 64, 16)])
def test_programs_lower_for_hopper(tensor: int, head_dim: int, block_size: int) -> None:
    texts = {
        key[:2]: lower().as_text()
        for key, lower in builder(tensor, head_dim, block_size)
        .lowerings([1, 64], {256: 16}, [MixedSize(256, 64, 16)])
        .items()
        if key[0] != "zero_arena"
    }
    units = {"decode_unit", "prefill_unit", "prefill_last", "mixed_unit", "mixed_last"}
    assert {kind for kind, _ in texts} >= {*units, "decode_embed", "mixed_embed", "head"}
    for key, text in texts.items():
        kernels = text.count(KERNEL)
        # What is the same for all layers is computed by the embed programs.
        assert ("stablehlo.cosine" in text) == key[0].endswith("_embed"), key
        if key[0] not in units:
            assert kernels == 0, key
            continue
        # Rotation with KV write, and attention, one kernel each for all layers, the first norm and
        # those that a product is added before, and at most one matmul for each of the four shapes.
        # A mixed call has both kinds of attention. The last unit has decode's, too, and the dense
        # half of its last layer for few tokens: one kernel, or the sums' norm and three matmuls.
        both, last = key[0].startswith("mixed"), key[0].endswith("_last")
        assert 3 + both + last <= kernels <= 8 + both + 5 * last, key
        # The one that writes the arena does it in place.
        writes = re.search(r"func.func private @write.*?\n  }\n", text, re.DOTALL)
        assert writes, key
        assert writes[0].count(KERNEL) == writes[0].count("output_operand_alias<") == 1, key
        assert "stablehlo.multiply" not in writes[0], key
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text, key


def test_the_last_layer_of_a_prefill_call_computes_few_tokens() -> None:
    lowerings = ProgramBuilder(builder(1, 128, 64)._shapes).lowerings([64], {256: 16})
    flops = {
        kind: lowerings[kind, 256]().cost_analysis()["flops"]
        for kind in ("prefill_unit", "prefill_last")
    }
    # All but the projections and their share of a layer, for all but 16 of 256 tokens.
    layer = flops["prefill_unit"] / LAYERS
    assert 0.8 * layer < flops["prefill_unit"] - flops["prefill_last"] < 0.9 * layer


def test_units_of_few_rows_sum_over_devices_without_a_collective() -> None:
    mailboxes = Mailboxes(devices=2, rows=32, width=4096)
    lowerings = builder(2, 128, 64, mailboxes).lowerings([16], {64: 4})
    few, many = (lowerings[kind, size]().as_text() for kind, size in UNITS)
    assert "all_reduce" not in few
    assert few.count("call @run") > many.count("call @run")  # sums with a norm, and the last
    assert many.count("stablehlo.all_reduce") == 2 * LAYERS


@pytest.mark.parametrize("tensor", [1, 2])
def test_heads_neither_sort_the_vocabulary_nor_let_the_host_wait(tensor: int) -> None:
    lowerings = builder(tensor, 128, 64).lowerings([8], {256: 16})
    for kind in HeadKind:
        key = ("head", 8) if kind is HeadKind.GREEDY else ("draw", 8, kind)
        text = lowerings[key]().as_text()
        # XLA reads their predicates on the host, which it need not for a loop of so many passes.
        assert "stablehlo.case" not in text, kind
        assert "stablehlo.if" not in text, kind
        # Log-probabilities order the 20 largest of 1,002 groups and what is in them.
        sorts = re.findall(r'"stablehlo.sort".*?\}\) : \(tensor<8x(\d+)x', text, re.DOTALL)
        sorts += re.findall(r"chlo.top_k.*tensor<8x(\d+)xf32> ->", text)
        best = (MAX_LOGPROBS, 1002, MAX_LOGPROBS * 128)
        assert [int(size) for size in sorts] == ([*best] if kind is HeadKind.COMPLETE else [])
        assert text.count("stablehlo.sort") + text.count("chlo.top_k") == len(sorts)
