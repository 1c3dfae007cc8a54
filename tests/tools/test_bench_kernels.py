import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.target import CPU

from serving import results_file
from tools.bench import results
from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Case, DoesNotFitError, Measurement, Work, WrongResultError
from tools.bench.kernels.ceilings import Ceilings
from tools.bench.kernels.operations import lumen_operations
from tools.bench.kernels.pool import KvPool
from tools.bench.kernels.report import MEASURED, markdown, measured_row, other_row
from tools.bench.kernels.runner import OPERATIONS, NoSuchRowError, Options, run
from tools.bench.kernels.sizes import FULL, SMOKE
from tools.bench.kernels.timing import Program, Timing, compile_all, side_by_side

TOOL = Path(__file__).parents[2] / "tools" / "bench_kernels.py"


def smoke(*only, operations=None, match=""):
    options = Options(
        only=only, match=match, arena_gib=0.01, reps=2, batch_ms=0.0, smoke=True
    )  # fmt: skip
    return run(options, operations)


def test_smoke_run_measures_every_operation_and_gives_a_results_file(tmp_path):
    outcome = smoke(*OPERATIONS)
    assert outcome.failures == []
    statuses = {one["name"]: one["status"] for one in outcome.rows}
    assert set(statuses.values()) == {MEASURED}, statuses
    for operation in ("decode", "prefill", "gather", "scatter", "copy", "KV write", "rotary write",
                      "matmul", "add and norm", "dense chain", "merge"):  # fmt: skip
        assert any(name.startswith(operation) for name in statuses)
    assert all(len(one["samples"]) == 2 and one["median"] > 0 for one in outcome.rows)

    results_file.write(tmp_path / "kernels.json", results.results(outcome.rows, outcome.facts, {}))
    read = json.loads((tmp_path / "kernels.json").read_text())
    assert [one["name"] for one in read["rows"]] == list(statuses)
    assert len(markdown(read["rows"]).splitlines()) == 2 + len(statuses)


def wrong_attention(operation):
    def wrong(*arguments, **options):
        out, lse, arena = operation(*arguments, **options)
        return out.at[0].multiply(1.02), lse, arena

    return wrong


def wrong_layer(operation):
    def wrong(*arguments, **options):
        *rest, layer_offset = arguments
        return operation(*rest, jnp.zeros_like(layer_offset), **options)

    return wrong


def leaking(operation):
    """Right, and writes into a slot that is nobody's."""

    def wrong(arena, *rest, **options):
        (segment,) = operation(arena, *rest, **options)
        return (segment.at[-1, 0, 0, 0].add(1.0),)

    return wrong


def wrong_write(operation):
    def wrong(k, v, arena, slots, offsets, layer_offset, *, target):
        return operation(v, k, arena, slots, offsets, layer_offset, target=target)

    return wrong


def wrong_rotation(operation):
    def wrong(projections, rotation, *rest, **options):
        return operation(projections, -rotation, *rest, **options)

    return wrong


def wrong_places(operation):
    def wrong(projections, rotation, arena, places, *rest, **options):
        return operation(projections, rotation, arena, places.at[1].add(1) % 16, *rest, **options)

    return wrong


def wrong_gather(operation):
    def wrong(*arguments, **options):
        return jnp.roll(operation(*arguments, **options), 1, axis=0)

    return wrong


def wrong_merge(operation):
    del operation
    return lambda outs, lses: (jnp.nanmean(outs, axis=0), jnp.max(lses, axis=0))


def wrong_matmul(operation):
    return lambda x, w, **options: operation(x, w, **options).at[-1, -1].add(8.0)


def wrong_sum(operation):
    """Norms of what was there before."""

    def wrong(x, hidden, *given, **options):
        _, normed = operation(jnp.zeros_like(x), hidden, *given, **options)
        return hidden + x, normed

    return wrong


def wrong_norms(operation):
    """Those of the first layer, in all of them."""
    return lambda *given, norm, **options: operation(*given, norm=0, **options)


def wrong_projections(operation):
    def wrong(*given, **options):
        made = operation(*given, **options)
        return made._replace(projected=made.projected.at[-1].multiply(1.02))

    return wrong


@pytest.mark.parametrize(
    ("name", "group", "spoil"),
    [
        ("decode", "decode", wrong_attention),
        ("decode", "decode", wrong_layer),
        ("prefill", "prefill", wrong_attention),
        ("gather", "block_copy", wrong_gather),
        ("scatter", "block_copy", leaking),
        ("copy", "block_copy", leaking),
        ("kv_write", "kv_write", wrong_write),
        ("rotary_write", "rotary_write", wrong_rotation),
        ("rotary_write", "rotary_write", wrong_places),
        ("merge", "merge", wrong_merge),
        ("matmul", "matmul", wrong_matmul),
        ("add_rms_norm", "add_norm", wrong_sum),
        ("dense_chain", "dense_chain", wrong_norms),
        ("dense_chain", "dense_chain", wrong_projections),
    ],
)
def test_a_wrong_kernel_is_refused(name, group, spoil):
    operations = lumen_operations()
    planted = {name: spoil(getattr(operations, name))}
    outcome = smoke(group, operations=dataclasses.replace(operations, **planted))
    wrong = [one for one in outcome.rows if one["status"].startswith("WRONG")]
    assert len(outcome.failures) == len(wrong) > 0
    assert all(one["median"] is None and one["samples"] == [] for one in wrong)


@pytest.mark.parametrize("honest", [True, False])
def test_a_row_that_changes_with_its_batch_is_refused_where_it_must_not(honest):
    """A decode kernel that is off by rounding when some row is padding, honest or not about it."""
    operations = lumen_operations()

    def decode(q, k, v, arena, tables, lengths, *rest, batch_invariant=False, **options):
        out, lse, arena = operations.decode(q, k, v, arena, tables, lengths, *rest, **options)
        changes = jnp.any(lengths == 0) & (not (honest and batch_invariant))
        return jnp.where(changes, out * jnp.bfloat16(1.0078125), out), lse, arena

    planted = dataclasses.replace(operations, decode=decode)
    outcome = smoke("decode", operations=planted, match="any batch")
    rows = [one for one in outcome.rows if "any batch" in one["name"]]
    assert len(rows) == 2
    for one in rows:
        if honest:
            assert one["status"] == MEASURED
            assert "rows keep their bits" in one["note"]
            assert "(0 change" not in one["note"]
        else:
            assert "rows change with the batch" in one["status"]


def test_rows_can_be_picked_by_name():
    names = [one["name"] for one in smoke("decode", "merge", match="KV write|merge").rows]
    assert sum(name.startswith(("decode", "merge")) for name in names) == 2
    with pytest.raises(NoSuchRowError, match="--match=nonsense"):
        smoke("merge", match="nonsense")


def test_missing_operations_and_broken_ones_are_rows_and_only_the_latter_are_failures():
    def missing(*_, **__):
        raise NotImplementedError("no such thing here")

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    operations = dataclasses.replace(lumen_operations(), merge=missing, matmul=broken)
    outcome = smoke("merge", "matmul", operations=operations)
    statuses = [one["status"] for one in outcome.rows if one["status"] != MEASURED]
    assert statuses == [
        "not measured: no such thing here", "failed: RuntimeError: out of luck",
    ]  # fmt: skip
    assert len(outcome.failures) == 1
    assert "out of luck" in outcome.failures[0]
    assert markdown(outcome.rows).count("out of luck") == 1


def test_an_interrupt_keeps_what_was_measured(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "merge", interrupted)
    outcome = smoke("matmul", "merge")
    assert outcome.failures == ["interrupted: what follows was not measured"]
    assert outcome.rows[-1]["name"].startswith("matmul")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"only": ("attention",)}, "--only=attention"),
        ({"only": ()}, "--only"),
        ({"match": "("}, "--match"),
        ({"pages": (24,)}, "--pages=24"),
        ({"reps": 0}, "--reps"),
        ({"batch_ms": -1.0}, "--batch_ms"),
        ({"arena_gib": 0.0}, "--arena_gib=0.0"),
    ],
)
def test_bad_options_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Options(**settings)


def test_a_bad_flag_ends_the_tool_with_one_line():
    done = subprocess.run(
        [sys.executable, str(TOOL), "--only=nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "--only=nonsense: no such operation" in done.stderr
    assert "Traceback" not in done.stderr


def test_full_sizes_are_those_of_the_8b_model():
    assert FULL.model.slots_per_block == 256
    assert FULL.model.kv_bytes_per_token == 4096
    titles = dict(FULL.ragged)
    lengths = np.minimum(64 + np.random.default_rng(0).exponential(960.0, 128), 8192)
    assert titles["128 x (64 + exponential(960))"] == tuple(lengths.astype(int).tolist())
    assert sorted(titles["one of 8192 among 127 of 128"]) == [*[128] * 127, 8192]


def test_reference_attention_is_softmax_over_what_a_query_sees():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape) for shape in ((2, 4, 8), (5, 2, 8), (5, 2, 8)))
    found = reference.attention(q, k, v, [1, 4], 0.5)
    for query, position in enumerate((1, 4)):
        for head in range(4):
            scores = k[: position + 1, head // 2] @ q[query, head] * 0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = weights @ v[: position + 1, head // 2]
            np.testing.assert_allclose(found[query, head], expected)


@pytest.mark.parametrize(
    "found", [[[1.0, np.nan]], [[1.0, 2.1]], [[1.0, 2.0], [1.0, 2.0]], [[0.0, 0.0]]]
)
def test_results_that_are_not_close_are_refused(found):
    reference.require_close("x", np.array([[1.0, 2.001]]), np.array([[1.0, 2.0]]))
    with pytest.raises(WrongResultError, match="x:"):
        reference.require_close("x", np.array(found), np.array([[1.0, 2.0]]))
    with pytest.raises(WrongResultError):
        reference.require_close("x", np.full((1, 2), 1e-9), np.zeros((1, 2)))


@pytest.fixture
def pool():
    made = KvPool(SMOKE.model, 16, 1 << 20, CPU)
    made.fill()
    return made


def test_pool_reads_tokens_and_sees_every_change(pool):
    (arena,) = pool.arena
    bases, offsets = np.array([8, 12]), np.array([3, 15])
    k, v = pool.tokens(bases, offsets, layer_offset=2)
    for token, (base, offset) in enumerate(zip(bases, offsets, strict=True)):
        for head in range(2):
            page = arena[base + 2 + head, :, offset]
            np.testing.assert_array_equal(np.asarray([k[token, head], v[token, head]]), page)
    before = pool.fingerprint()
    pool.require_only_written(before, np.array([], int))
    swapped = arena.at[9, 0, 3].set(arena[9, 0, 4]).at[9, 0, 4].set(arena[9, 0, 3])
    pool.arena = (swapped,)
    pool.require_only_written(before, np.array([9]))
    with pytest.raises(WrongResultError, match=r"1 slots changed.*first 9"):
        pool.require_only_written(before, np.array([8]))


def test_pool_poisons_only_what_lies_behind_the_last_token(pool):
    lengths = np.array([20, 32, 0])
    tables = pool.tables(np.random.default_rng(0), lengths, columns=4, layers=2)
    assert set(tables[0, 2:]) | set(tables[2]) == {-1, 2**30}
    pool.poison(tables, lengths, layers=2)
    (arena,) = pool.arena
    spoiled = np.argwhere(np.isnan(np.asarray(arena, np.float32)).all(axis=(1, 3)))
    slots = tables[0, 1] + np.arange(4)
    assert {tuple(one) for one in spoiled} == {(s, o) for s in slots for o in range(4, 16)}


def test_pool_takes_fewer_layers_for_a_context_beyond_the_arena(pool):
    assert pool.layers_for(pool.blocks) == 2
    assert pool.layers_for(pool.blocks + 1) == 1
    with pytest.raises(DoesNotFitError, match="needs 1000 blocks"):
        pool.bases(np.random.default_rng(0), 1000)


def test_batches_are_long_enough_and_count_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tools.bench.kernels.timing.time.perf_counter", lambda: now[0])
    launched = []

    class Fake:
        calls = 4

        def __call__(self, state):
            launched.append(state)
            now[0] += 1e-3
            return state + 1

    samples, state = Timing(reps=3, batch_s=0.05).samples(Fake(), 0)
    assert samples == pytest.approx([1e-3 / 4] * 3)
    assert state == len(launched)
    assert len(launched) >= 3 * 50


def test_programs_run_equal_calls_apart_and_keep_their_compile_error():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    good = Program(side_by_side(lambda a: a + 1), [x, x], ((x,), (x,)), 2)

    def fails(state):
        raise RuntimeError("cannot lower")

    bad = Program(fails, x, (), 1, alone=True)
    compile_all([good, bad], threads=2)
    first, second = good([jnp.zeros(3)] * 1 + [jnp.ones(3)], (jnp.zeros(3),), (jnp.ones(3),))
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [2.0] * 3)
    with pytest.raises(RuntimeError, match="cannot lower"):
        bad(jnp.zeros(3))


def case(unit, **bar):
    return Case("one", Work(bytes=4_000_000_000, flops=10**12), Bar(unit, **bar), [], list)


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        ({"unit": "us", "floor": 1100.0, "aim": 1000.0}, "aim"),
        ({"unit": "us", "floor": 1100.0, "aim": 900.0}, "floor"),
        ({"unit": "us", "floor": 900.0, "aim": 800.0}, "below floor"),
        ({"unit": "TB/s", "floor": 3.0}, "floor"),
        ({"unit": "TFLOP/s", "floor": 1100.0}, "below floor"),
        ({"unit": "us"}, ""),
    ],
)
def test_verdicts_and_rates(bar, verdict):
    one = measured_row(case(**bar), Measurement([1e-3, 1e-3, 9e-3]), Ceilings(5e12, 4e15, 1e-4))
    assert (one["us"], one["tb_s"], one["tflop_s"]) == (1000.0, 4.0, 1000.0)
    assert one["of_ceiling"] == 0.8
    assert one["verdict"] == verdict
    assert verdict in markdown([one])


def test_a_peer_of_the_same_run_replaces_the_known_one():
    found = Measurement([1e-3], peer_samples_s=[2e-3, 4e-3, 2e-3])
    one = measured_row(case("TB/s", peer=9.0), found, None)
    assert (one["peer"], one["peer_samples"]) == (2.0, [2.0, 1.0, 2.0])
    assert other_row(case("us"), "not measured: x")["median"] is None
