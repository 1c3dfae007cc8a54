"""The kernels of a mixed call on Hopper, in their interpreter: as decode's and prefill's alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.arena import slot_shape
from lumen_kernels.rotary_write import Projections
from lumen_kernels.target import Backend, Target

from lumen.model import model_defs
from lumen.presets import preset
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.step_attention import MixedContext, StepAttention

SMALL = Target(Backend.MOSAIC_GPU, "gpu", "NVIDIA H200", 2, interpret=True)
BLOCK, BLOCKS, COLUMNS = 16, 12, 4
ROWS, PROMPT_TOKENS = 4, 32


def attention() -> StepAttention:
    config = dataclasses.replace(
        preset("tiny-llama"), num_layers=1, unit_layers=1, num_heads=4, num_kv_heads=2, head_dim=128
    )
    heads = HeadLayout(4, 2, 1)
    slots = slot_shape(BLOCK, 128, SMALL)
    layout = ArenaLayout(BLOCKS, 2, 2, BLOCK, slots, jnp.dtype(jnp.bfloat16))
    mesh = Mesh(np.array(jax.devices()[:1]), (TENSOR_AXIS,))
    defs = model_defs(config, heads, jnp.dtype(jnp.bfloat16))
    return StepAttention(
        ProgramShapes(config, defs, mesh, jnp.bfloat16, layout, 8, COLUMNS, 1), SMALL
    )


def test_a_mixed_call_on_hopper_reads_and_writes_what_its_parts_would():
    rng = np.random.default_rng(3)
    mine = attention()

    def numbers(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    arena = tuple(numbers(*segment.shape) for segment in mine._shapes.arena())
    fused = numbers(ROWS + PROMPT_TOKENS, (4 + 2 * 2) * 128)
    tables = jnp.asarray(rng.permutation(BLOCKS)[: 3 * COLUMNS].reshape(3, COLUMNS) * 2, jnp.int32)
    nothing = jnp.zeros((2, COLUMNS), jnp.int32)
    context = MixedContext(
        jnp.concatenate([tables[:2], nothing]), jnp.array([37, 5, 0, 0], jnp.int32),
        jnp.concatenate([tables[2:], nothing[:1]]), jnp.array([19, 0], jnp.int32),
        jnp.array([25, 0], jnp.int32),
    )  # fmt: skip
    prompts = (context.prefill_tables, context.starts, context.counts)
    decoding = (context.decode_tables, context.lengths)
    of_rows = mine.decode_schedule(context.lengths)
    of_prompts = mine.prefill_schedule(context.starts, context.counts, PROMPT_TOKENS)
    offsets = (jnp.int32(0),)

    step = mine.mixed_step(context, PROMPT_TOKENS)
    assert mine._stores_first  # by the kernel that rotates
    assert of_rows
    assert of_prompts
    mixed = mine.mixed_attend(step, of_rows, of_prompts, context, offsets)
    out, written = jax.jit(mixed, static_argnums=0)(0, Projections(fused, None, None), arena)

    places, ends = jnp.array([0, 1, ROWS + 24, 0]), jnp.array([37, 5, 44, 0])
    last = mine.last_of_mixed(context, PROMPT_TOKENS, places, ends)
    narrowed = mine.mixed_attend(step, of_rows, of_prompts, context, offsets, last)
    few, kept = jax.jit(narrowed, static_argnums=0)(0, Projections(fused, None, None), arena)

    decode = mine.decode_attend(mine.decode_step(*decoding), of_rows, *decoding, offsets)
    prefill = mine.prefill_attend(
        mine.prefill_step(*prompts, PROMPT_TOKENS), of_prompts, *prompts, offsets
    )
    first, arena = jax.jit(decode, static_argnums=0)(
        0, Projections(fused[:ROWS], None, None), arena
    )
    rest, arena = jax.jit(prefill, static_argnums=0)(
        0, Projections(fused[ROWS:], None, None), arena
    )
    np.testing.assert_array_equal(np.asarray(out[:2]), np.asarray(first[:2]))
    np.testing.assert_array_equal(np.asarray(out[ROWS : ROWS + 25]), np.asarray(rest[:25]))
    assert np.isfinite(np.asarray(first[:2], np.float32)).all()
    assert few.shape == (4, *out.shape[1:])
    np.testing.assert_array_equal(np.asarray(few[:2]), np.asarray(first[:2]))
    expected = np.asarray(rest[24], np.float32)  # by the other kernel
    np.testing.assert_allclose(np.asarray(few[2], np.float32), expected, rtol=0, atol=0.02)
    for one, too, other in zip(written, kept, arena, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        np.testing.assert_array_equal(np.asarray(too), np.asarray(other))
