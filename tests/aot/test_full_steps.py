"""Whole steps of Llama 3.1 8B and 70B, compiled for five TPU generations. Nothing runs here.

Every program of a decode step and of a prefill chunk, with the arena that serving would allocate:
it fits, stays in place and is never copied, and neither are weights.
"""

import pytest

from lumen.presets import preset
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.head_programs import HeadKind
from tools.aot.compiling import check_total, compile_programs, needed_bytes
from tools.aot.deployment import Deployment, DoesNotFitError, plan
from tools.aot.topologies import HBM_BYTES, slices_named

MIB = 1 << 20
GENERATIONS = list(HBM_BYTES)
COPIES_OF_LOGITS = {
    HeadKind.SAMPLED: 2,
    HeadKind.TRUNCATED: 3,
    HeadKind.COMPLETE: 4,
}
"""Beside those that a draw is given."""


def deployment(model, generation, width, **settings):
    defaults = {"max_model_len": 4096, "block_size": 64, "dtype": "bfloat16"}
    return Deployment(
        name=model,
        model=preset(model),
        settings=DeviceExecutorConfig(**(defaults | settings)),
        tensor_parallel=width,
        slice=slices_named(generation, width)[0],
    )


def largest(settings):
    """Picks the programs of the largest decode and chunk buckets."""
    sizes = {"prefill": settings.max_prefill_tokens}
    return lambda key: len(key) == 1 or key[1] == sizes.get(key[0].split("_")[0], settings.num_rows)


def most_temporaries(planned, key):
    """What a program may need besides its inputs and outputs."""
    model, width = planned.deployment.model, planned.deployment.tensor_parallel
    if key[0].startswith("prefill"):
        # One layer's activations: gate, up and their product, the residual stream around two sums.
        widths = 3 * model.intermediate_size // width + 4 * model.hidden_size
        return 64 * MIB + key[1] * widths * 2
    if key[0] in ("head", "logits", "draw"):
        # Logits, gathered from all devices; what thresholds are searched in; the best of all.
        copies = COPIES_OF_LOGITS[key[2]] if key[0] == "draw" else 1
        return 64 * MIB + copies * key[1] * model.vocab_size * 4
    return 64 * MIB


def check_step(planned, wanted):
    """Compile a step's programs and hold them to all of the above."""
    programs = compile_programs(planned, wanted)
    kinds = {program.key[0] for program in programs}
    assert kinds >= {
        "decode_embed", "decode_unit", "prefill_embed", "prefill_unit", "prefill_last", "head",
        "logits",
    }  # fmt: skip
    for program in programs:
        assert program.problems == (), program.name
        assert program.temp_bytes < most_temporaries(planned, program.key), program.name
        if program.key[0].endswith(("_unit", "_last")):
            assert program.alias_bytes >= planned.arena_bytes, program.name
            # Attention of every layer is a kernel, not XLA's fallback.
            assert program.kernels >= planned.deployment.model.unit_layers, program.name
    check_total(planned, programs)
    assert needed_bytes(planned, programs) <= HBM_BYTES[planned.deployment.slice.generation]
    # The arena is what memory_fraction leaves beside the weights, to the last block.
    budget = planned.hbm_bytes * planned.deployment.settings.memory_fraction
    unused = budget - planned.weights.whole - planned.arena_bytes
    assert 0 <= unused < 2 * planned.shapes.arena_layout.block_bytes


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_step_of_8b(generation):
    settings = {"num_rows": 16, "max_prefill_tokens": 128, "prefill_buckets": (128,)}
    # 15 GiB of weights leave nothing of a v5e chip's memory.
    width = 4 if generation == "v5e" else 1
    planned = plan(deployment("llama-3.1-8b", generation, width, **settings))
    picked = largest(planned.deployment.settings)

    def greedy(key):
        return picked(key) and key[0] != "draw"

    check_step(planned, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_large_step_of_8b(generation, block_size):
    settings = {"num_rows": 128, "max_prefill_tokens": 2048, "block_size": block_size}
    width = 4 if generation == "v5e" else 1
    planned = plan(deployment("llama-3.1-8b", generation, width, **settings))
    check_step(planned, largest(planned.deployment.settings))


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_large_step_of_70b(generation):
    settings = {"num_rows": 128, "max_prefill_tokens": 2048}
    # 131 GiB of weights do not fit eight v5e chips (below).
    width = 16 if generation == "v5e" else 8
    planned = plan(deployment("llama-3.1-70b", generation, width, **settings))
    check_step(planned, largest(planned.deployment.settings))


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_bucket_of_8b(generation):
    width = 4 if generation == "v5e" else 1
    planned = plan(deployment("llama-3.1-8b", generation, width, num_rows=32))
    check_step(planned, lambda key: key[0] != "draw")


@pytest.mark.parametrize(
    ("model", "generation", "width", "enough"),
    [("llama-3.1-8b", "v5e", 1, 2), ("llama-3.1-70b", "v5e", 8, 16), ("llama-3.1-70b", "v4", 4, 8)],
)
def test_what_does_not_fit_is_refused_with_a_width_that_does(model, generation, width, enough):
    with pytest.raises(DoesNotFitError, match=rf"Weights take .* --tensor_parallel={enough}\."):
        plan(deployment(model, generation, width))
    plan(deployment(model, generation, enough))


def test_an_arena_as_large_as_all_memory_leaves_no_room_for_the_programs():
    planned = plan(
        deployment("tiny-llama", "v6e", 1, num_rows=2, max_model_len=256, memory_fraction=1.0)
    )
    programs = compile_programs(planned, lambda key: key == ("decode_embed", 2))
    with pytest.raises(DoesNotFitError, match=r"lower --memory_fraction to 0\.99"):
        check_total(planned, programs)
