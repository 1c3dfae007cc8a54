"""The Hopper decode kernel in its interpreter, against dense attention in float64."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention.decode import mosaic_gpu
from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.target import HOPPER, Backend, Target

from tests.kernels.paged_attention.oracle import GARBAGE, LAYERS, Case, bfloat16_case

# Two cores, four workers (two for heads of 256): small cases are cut like large ones on a chip.
SMALL = Target(Backend.MOSAIC_GPU, "gpu", "NVIDIA H200", 2, interpret=True)
RAGGED = [100, 0, 1, 63, 64, 65, 200]


def options_of(case_heads: int, head_dim: int, **rest) -> Options:
    settings = {"sliding_window": None, "soft_cap": None, "with_lse": True, "target": SMALL}
    return Options(kv_heads=case_heads, scale=head_dim**-0.5, **(settings | rest))


@functools.cache
def compiled(shape: ArenaShape, options: Options):
    return jax.jit(
        lambda q, arena, *rest: mosaic_gpu.attend(q, arena, shape, *rest, options, schedule=None)
    )


def run(case: Case, q: np.ndarray, lengths: list[int], **rest):
    """Output and log-sum-exp as numpy arrays; the schedule is made inside."""
    options = options_of(case.kv_heads, case.head_dim, **rest)
    arena = tuple(jnp.asarray(part) for part in case.arena)
    call = compiled(arena_shape("decode", arena, case.head_dim), options)
    out, lse = call(
        jnp.asarray(q.astype(ml_dtypes.bfloat16)), arena, jnp.asarray(case.tables),
        jnp.asarray(np.array(lengths, np.int32)), case.layer_offset,
    )  # fmt: skip
    return np.asarray(out.astype(jnp.float32)), None if lse is None else np.asarray(lse)


def check(case: Case, group: int, n: int = 1, **rest) -> None:
    """The last n tokens of every row attend to the row; compare with the oracle."""
    heads = case.kv_heads * group
    q = np.stack([case.draw(n, heads) for _ in case.lengths])
    out, lse = run(case, q, case.lengths, **rest)
    for row, length in enumerate(case.lengths):
        for i in range(n):
            expected, expected_lse = case.dense(
                q[row, i], row, length - n + i, case.head_dim**-0.5,
                rest.get("sliding_window"), rest.get("soft_cap"),
            )  # fmt: skip
            # Weights and results are rounded to bfloat16: 8 bits.
            np.testing.assert_allclose(out[row, i], expected, atol=0.02, rtol=0.02)
            error = np.linalg.norm(out[row, i] - expected)
            assert error <= 5e-3 * max(float(np.linalg.norm(expected)), 1e-9)
            if lse is not None:
                np.testing.assert_allclose(lse[row, i], expected_lse, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "block_size", "head_dim"),
    [(4, 16, 128), (1, 128, 128), (3, 32, 128), (16, 64, 128), (2, 16, 64)],
)
def test_equals_dense_attention(group: int, block_size: int, head_dim: int) -> None:
    case = bfloat16_case(
        np.random.default_rng(group), RAGGED, 2, head_dim=head_dim, block_size=block_size
    )
    check(case, group)


def test_heads_of_256() -> None:
    case = bfloat16_case(np.random.default_rng(0), [70, 0, 130], 1, head_dim=256, block_size=64)
    check(case, 4)


@pytest.mark.parametrize("by_position", [False, True])
def test_several_tokens_window_and_soft_cap(by_position: bool) -> None:
    case = bfloat16_case(np.random.default_rng(1), [2, 130, 0, 67, 250], 2)
    check(case, 2, n=3, batch_invariant=by_position, sliding_window=50, soft_cap=8.0)


def test_sixty_four_queries() -> None:
    case = bfloat16_case(np.random.default_rng(2), [130, 3], 1, block_size=64)
    check(case, 4, n=16, with_lse=False)


def test_blocks_before_the_window_are_not_looked_at() -> None:
    rng = np.random.default_rng(3)
    case = bfloat16_case(rng, [300, 90, 65], 2)
    window = 70
    for row, length in enumerate(case.lengths):
        for column in range(max(length - window, 0) // case.block_size):
            base = case.tables[row, column]
            case.flat[base : base + LAYERS * case.kv_heads] = np.nan
            case.tables[row, column] = GARBAGE if column % 2 else -1
    check(case, 4, sliding_window=window)


def test_segments() -> None:
    case = bfloat16_case(np.random.default_rng(4), [200, 64, 17], 2, segments=4, block_size=32)
    check(case, 4)


def test_sums_by_position_have_the_same_bits_in_any_batch() -> None:
    """Alone, a sequence is cut into four; in company it is whole or cut elsewhere."""
    rng = np.random.default_rng(5)
    case = bfloat16_case(rng, [1100, 40, 300], 1, block_size=64)
    q = np.stack([case.draw(1, 4) for _ in case.lengths])
    others = [[1100, 40, 0], [1100, 40, 300], [1100, 1, 70]]

    def same(by_position: bool) -> list[bool]:
        """Whether the first row has the bits it has alone, by batch."""
        out, lse = run(case, q, [1100, 0, 0], batch_invariant=by_position)
        found = [run(case, q, lengths, batch_invariant=by_position) for lengths in others]
        return [bool((o[0] == out[0]).all() and (e[0] == lse[0]).all()) for o, e in found]

    assert all(same(by_position=True))
    assert not all(same(by_position=False))  # these batches can tell


def equations(jaxpr) -> Iterator:
    """All of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_merge_computes_with_vectors() -> None:
    """Mosaic contracts their products and sums, not those of scalars: other bits on a chip only."""
    case = bfloat16_case(np.random.default_rng(9), [20, 30], 1, block_size=64)
    options = options_of(1, 128, target=HOPPER, batch_invariant=True)
    shape = arena_shape("decode", case.arena, 128)

    def call(q, arena, *rest):
        return mosaic_gpu.attend(q, arena, shape, *rest, options, schedule=None)

    q, lengths = jnp.zeros((2, 1, 4, 128), jnp.bfloat16), jnp.array([20, 30], jnp.int32)
    traced = jax.make_jaxpr(call)(q, case.arena, case.tables, lengths, case.layer_offset)
    rounding = {"add", "sub", "mul", "div", "exp2", "log2"}
    shapes = [
        out.aval.shape
        for equation in equations(traced.jaxpr)
        if equation.primitive.name in rounding
        for out in equation.outvars
        if jnp.issubdtype(out.aval.dtype, jnp.floating)
    ]
    assert len(shapes) > 20
    assert () not in shapes


def walk(table: np.ndarray, cut: plan.Cut, lengths: list[int]) -> None:
    """What the kernel does with a schedule: everything once, parts where the merge expects them."""
    seen: dict[tuple[int, int], list[int]] = {}
    parts: dict[int, tuple[int, int, int]] = {}  # part: row, head, first tile
    signals = np.zeros(cut.workers, int)

    def span(length: int) -> tuple[int, int]:
        first = 0 if cut.window is None else max(length - cut.tokens - cut.window + 1, 0)
        return first // plan.TILE, -(-length // plan.TILE)

    for entry in table[: cut.workers]:
        row, head, length, chunk, tile, left, part = (int(x) for x in entry[: plan.PART + 1])
        while left:
            assert length == lengths[row] > 0
            first, end = span(length)
            until = min(end, tile + left)
            assert first <= tile < until
            seen.setdefault((row, head), []).extend(range(tile, until))
            cuts = chunk if cut.by_position and tile > first else end
            assert tile == first or not cut.by_position or tile % chunk == 0
            for low in range(tile, until, cuts):
                if tile > first or until < end:
                    assert part not in parts
                    parts[part] = (row, head, low)
                    part += 1
                    signals[entry[plan.LEADER]] += tile > first
            left -= until - tile
            head += cut.lanes
            if head >= cut.kv_heads:
                head %= cut.lanes
                row, length, chunk = (int(x) for x in table[cut.workers + row][:3])
            tile = span(length)[0]
    for row, length in enumerate(lengths):
        for head in range(cut.kv_heads):
            expected = list(range(*span(length))) if length > 0 else []
            assert seen.get((row, head), []) == expected
    assert all(part < cut.parts for part in parts)
    merged = 0
    for worker, entry in enumerate(table[: cut.workers]):
        count = int(entry[plan.MERGE_PARTS])
        assert signals[worker] == max(count - 1, 0)
        places = [parts[int(entry[plan.MERGE_PART]) + i] for i in range(count)]
        assert places == sorted(places)
        items = {row * cut.kv_heads + head for row, head, _ in places}
        assert items <= {int(entry[plan.MERGE_ITEM])}
        merged += count
    assert merged == len(parts)


@functools.cache
def scheduler(cut: plan.Cut):
    return jax.jit(functools.partial(plan.schedule, cut=cut))


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(
    ("heads", "tokens", "window"), [(3, 1, None), (2, 3, 500), (34, 1, None), (1, 1, 64)]
)
def test_a_schedule_covers_everything_once(
    heads: int, tokens: int, window: int | None, by_position: bool
) -> None:
    rng = np.random.default_rng(6)
    cut = plan.Cut(24, heads, tokens, window, 40, by_position)
    batches = [
        [1024] * 24, [0] * 24, [0] * 23 + [1], [9000] + [0] * 23, [64] * 20 + [0] * 4,
        [8192] + [128] * 23, *(list(rng.integers(0, 3000, 24)) for _ in range(6)),
        *(list(rng.integers(0, 2, 24) * rng.integers(1, 200, 24)) for _ in range(4)),
        *(list((rng.exponential(900, 24) + 64).astype(int)) for _ in range(4)),
    ]  # fmt: skip
    for lengths in batches:
        table = np.asarray(scheduler(cut)(jnp.asarray(lengths, jnp.int32)))
        walk(table, cut, [int(x) for x in lengths])


def test_equal_lengths_are_not_cut_where_whole_items_fill_the_chip() -> None:
    cut = plan.Cut(128, 8, 1, None, plan.workers(128, HOPPER), by_position=False)
    for length in (1024, 4000):
        table = np.asarray(scheduler(cut)(jnp.full((128,), length, jnp.int32)))
        assert not table[: cut.workers, plan.MERGE_PARTS].any()
        assert table[: cut.workers, plan.TILES].max() == 4 * -(-length // plan.TILE)


def lower(
    rows: int, heads: int, group: int, dim: int, block: int, n: int = 1, segments: int = 1, **rest
) -> str:
    """Lower for CUDA: layouts are inferred and shared memory is counted here."""
    page = (1, block, 128) if dim == 64 else (2, block, dim)
    arena = tuple(
        jax.ShapeDtypeStruct((heads * (1000 + i), *page), jnp.bfloat16) for i in range(segments)
    )
    shape = arena_shape("decode", arena, dim)
    options = options_of(heads, dim, target=HOPPER, **rest)

    def call(q, arena, tables, lengths, offset):
        return mosaic_gpu.attend(q, arena, shape, tables, lengths, offset, options, schedule=None)

    int32 = jnp.int32
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(
        jax.ShapeDtypeStruct((rows, n, heads * group, dim), jnp.bfloat16),
        arena,
        jax.ShapeDtypeStruct((rows, 64), int32),
        jax.ShapeDtypeStruct((rows,), int32),
        jax.ShapeDtypeStruct((), int32),
    )
    return exported.mlir_module()


@pytest.mark.parametrize(
    "case",
    [
        {"rows": 128, "heads": 8, "group": 4, "dim": 128, "block": 16},
        {"rows": 1, "heads": 8, "group": 4, "dim": 128, "block": 64, "batch_invariant": True},
        {"rows": 8, "heads": 2, "group": 3, "dim": 64, "block": 32, "n": 2, "segments": 4},
        {"rows": 8, "heads": 8, "group": 1, "dim": 128, "block": 64},
        {"rows": 3, "heads": 1, "group": 16, "dim": 256, "block": 128, "n": 4,
         "sliding_window": 1000, "soft_cap": 30.0},
    ],
)  # fmt: skip
def test_lowers_for_cuda(case: dict) -> None:
    assert "paged_attention_decode" in lower(**case)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 3, 4, 12, 16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_lowers_for_cuda_in_all_shapes(group: int, dim: int, block: int) -> None:
    n = 64 // group if group % 2 else 1
    lower(5, 3, group, dim, block)
    lower(5, 3, group, dim, block, n=n, sliding_window=300, batch_invariant=True, with_lse=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed: int) -> None:
    rng = np.random.default_rng([7, seed])
    head_dim = int(rng.choice([64, 128, 256]))
    group = int(rng.choice([1, 2, 3, 4, 8]))
    case = bfloat16_case(
        rng, [int(x) for x in rng.integers(0, 600, 5)], int(rng.choice([1, 2, 3])),
        head_dim=head_dim, block_size=int(rng.choice([16, 32, 64, 128])),
        segments=int(rng.choice([1, 2])),
    )  # fmt: skip
    check(
        case, group, n=int(rng.choice([1, 2, 4])), batch_invariant=bool(seed % 2),
        sliding_window=int(rng.integers(1, 400)) if seed % 3 else None,
        soft_cap=10.0 if seed % 4 == 1 else None,
    )  # fmt: skip


def test_says_what_it_cannot_do() -> None:
    split = ArenaShape((64,), 16, 128, packed=False)
    bf16 = jnp.bfloat16
    assert mosaic_gpu.supports(bf16, split, 4, 1) is None
    assert "float32" in (mosaic_gpu.supports(jnp.float32, split, 4, 1) or "")
    assert "64 rows" in (mosaic_gpu.supports(bf16, split, 16, 5) or "")
    assert "96" in (mosaic_gpu.supports(bf16, ArenaShape((64,), 16, 96, False), 4, 1) or "")
    assert "packed" in (mosaic_gpu.supports(bf16, ArenaShape((64,), 16, 64, False), 4, 1) or "")
    assert "8" in (mosaic_gpu.supports(bf16, ArenaShape((64,), 8, 128, False), 4, 1) or "")


def test_refuses_a_schedule_of_another_step() -> None:
    case = bfloat16_case(np.random.default_rng(8), [20, 30], 1)
    options = options_of(1, 128)
    shape = arena_shape("decode", case.arena, 128)
    cut = plan.Cut(3, 1, 1, None, 4, by_position=False)
    wrong = scheduler(cut)(jnp.array([1, 2, 3], jnp.int32))
    with pytest.raises(KernelArgumentError, match="schedule"):
        mosaic_gpu.attend(
            jnp.zeros((2, 1, 4, 128), jnp.bfloat16), case.arena, shape, case.tables,
            jnp.array([20, 30], jnp.int32), case.layer_offset, options, schedule=wrong,
        )  # fmt: skip
