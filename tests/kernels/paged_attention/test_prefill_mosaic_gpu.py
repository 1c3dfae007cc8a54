"""The Hopper prefill kernel: in its interpreter against dense float64, and lowered for CUDA."""

import functools
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from lumen_kernels.arena import arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention import prefill, prefill_schedule
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.paged_attention.prefill import mosaic_gpu
from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as schedule
from lumen_kernels.target import CPU, HOPPER, Target, interpreted

from tests.kernels.paged_attention.oracle import Case, assert_same_arena, bfloat16_case


def interpreter(cores: int = 1) -> Target:
    return interpreted(replace(HOPPER, cores=cores))


@dataclass
class Stream:
    """Rows with `prefixes` in the arena and `counts` new tokens, whose K and V are there too."""

    case: Case
    prefixes: list[int]
    counts: list[int]
    q: np.ndarray

    @staticmethod
    def of(prefixes: list[int], counts: list[int], tokens: int, group: int, kv_heads=1, **rest):
        rng = np.random.default_rng(sum(prefixes) + tokens + group)
        case = bfloat16_case(rng, prefixes, kv_heads, room=max(counts), **rest)
        for row, count in enumerate(counts):
            case.grow(row, case.draw(count), case.draw(count))
        return Stream(case, prefixes, counts, case.draw(tokens, kv_heads * group))

    def attend(self, prefixes: list[int], counts: list[int], q: np.ndarray, cores=1, **options):
        """Output [tokens, heads, head_dim] and log-sum-exp [tokens, heads] in float32."""
        case = self.case
        shape = arena_shape("prefill", case.arena, case.head_dim)
        settings = Options(
            case.kv_heads, case.head_dim**-0.5, options.get("sliding_window"),
            options.get("soft_cap"), options.get("with_lse", True), interpreter(cores),
        )  # fmt: skip
        run = jax.jit(lambda q, arena, *rows: mosaic_gpu.attend(q, arena, shape, *rows, settings))
        rows = (np.array(prefixes, np.int32), np.array(counts, np.int32))
        arena = tuple(jnp.asarray(part) for part in case.arena)
        out, lse = run(q.astype(ml_dtypes.bfloat16), arena, case.tables, *rows, case.layer_offset)
        assert_same_arena(case, arena)
        return np.asarray(out.astype(jnp.float32)), None if lse is None else np.asarray(lse)

    def check(self, cores=1, **options) -> None:
        out, lse = self.attend(self.prefixes, self.counts, self.q, cores, **options)
        token = 0
        for row, count in enumerate(self.counts):
            for i in range(count):
                expected, expected_lse = self.case.dense(
                    self.q[token], row, self.prefixes[row] + i, self.case.head_dim**-0.5,
                    options.get("sliding_window"), options.get("soft_cap"),
                )  # fmt: skip
                np.testing.assert_allclose(out[token], expected, atol=0.03, rtol=0.02)
                if lse is not None:
                    np.testing.assert_allclose(lse[token], expected_lse, atol=2e-5)
                token += 1
        assert not out[token:].any()
        assert lse is None or np.isneginf(lse[token:]).all()


# A row that ends inside a tile, one that begins unaligned, an empty one, and padding behind.
RAGGED = ([0, 37, 5, 130], [5, 70, 0, 66], 152)


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(2, 128, 64), (3, 128, 16), (4, 64, 32), (1, 256, 128)]
)
def test_ragged_rows_equal_dense_attention(group: int, head_dim: int, block_size: int) -> None:
    Stream.of(*RAGGED, group, head_dim=head_dim, block_size=block_size).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"),
    list(itertools.product([1, 2, 3, 5, 8, 16], [64, 128, 256], [16, 32, 64, 128])),
)
def test_every_shape(group: int, head_dim: int, block_size: int) -> None:
    Stream.of(*RAGGED, group, head_dim=head_dim, block_size=block_size).check()


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 70, "soft_cap": 5.0},
        {"soft_cap": 2.0, "with_lse": False},
    ],
)
def test_options(options: dict) -> None:
    Stream.of([0, 200], [40, 90], 136, 2, segments=2).check(**options)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 63, 64, 65, 128, 200, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_window(window: int, head_dim: int) -> None:
    Stream.of(*RAGGED, 2, head_dim=head_dim).check(sliding_window=window)


@pytest.mark.parametrize(("segments", "head_dim"), [(4, 128), (3, 64)])
def test_segments_and_several_cores(segments: int, head_dim: int) -> None:
    stream = Stream.of([0, 100], [30, 80], 112, 2, 2, head_dim=head_dim, segments=segments)
    stream.check(cores=2)


def test_clusters_of_programs_that_read_the_same() -> None:
    Stream.of([0, 100], [30, 80], 112, 4).check(cores=4, with_lse=False)


@pytest.mark.parametrize(("counts", "tokens"), [([1], 1), ([3, 1], 5), ([0], 16), ([100], 100)])
def test_streams_that_are_no_multiple_of_anything(counts: list[int], tokens: int) -> None:
    Stream.of([9] * len(counts), counts, tokens, 2).check()


def test_bits_do_not_depend_on_how_a_prompt_is_cut() -> None:
    stream = Stream.of([0, 50], [150, 30], 184, 2)
    whole, whole_lse = stream.attend([0, 50], [150, 30], stream.q)
    cut, done = [], 0
    for count in (65, 85):
        q = np.concatenate([stream.q[done : done + count], np.zeros_like(stream.q[:3])])
        out, lse = stream.attend([done, 0], [count, 0], q)
        np.testing.assert_array_equal(lse[:count], whole_lse[done : done + count])
        cut.append(out[:count])
        done += count
    np.testing.assert_array_equal(np.concatenate(cut), whole[:150])


@pytest.fixture
def races(monkeypatch):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    yield
    assert not gpu_callbacks.get_races().races_found


# Not heads of 256: the detector takes a union of two views for one buffer.
@pytest.mark.parametrize(("group", "head_dim"), [(2, 128), (1, 64)])
def test_no_races(races, group: int, head_dim: int) -> None:
    Stream.of([0, 150], [5, 150], 160, group, head_dim=head_dim).check()


@pytest.mark.parametrize(
    ("tile_tokens", "key_tile", "window"), [(64, 128, None), (128, 128, 90), (128, 64, None)]
)
def test_work_list_covers_every_token_once(tile_tokens: int, key_tile: int, window) -> None:
    rng = np.random.default_rng(tile_tokens)
    rows, tokens = 6, 1000
    make = jax.jit(lambda s, c: schedule.work_list(s, c, tokens, tile_tokens, key_tile, window))
    for _ in range(20):
        counts = (rng.integers(0, 166, rows) * rng.integers(0, 2, rows)).astype(np.int32)
        starts = rng.integers(0, 500, rows).astype(np.int32)
        listed = make(starts, counts)
        check_work_list(np.asarray(listed.tiles), listed, starts, counts, tile_tokens, key_tile)
    full = np.array([1, 7, 0, 492, 500, 0], np.int32)
    check_work_list(
        np.asarray(make(starts, full).tiles),
        make(starts, full),
        starts,
        full,
        tile_tokens,
        key_tile,
    )


def check_work_list(tiles, listed, starts, counts, tile_tokens, key_tile) -> None:
    """Every token is in one tile, at its position, and the tiles are in order of cost."""
    used = tiles[: tiles[0, schedule.COUNT]]
    tokens = listed.token_tile.shape[0]
    row_of = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(n) for n in counts]) if counts.sum() else np.zeros(0)
    seen = np.zeros(tokens, int)
    for index, tile in enumerate(used):
        first = tile[schedule.FIRST] * schedule.ALIGN
        assert 0 <= first <= tokens - tile_tokens
        mine = np.arange(first + tile[schedule.LOW], first + tile[schedule.HIGH])
        seen[mine] += 1
        assert (np.asarray(listed.token_tile)[mine] == index).all()
        assert (np.asarray(listed.token_row)[mine] == mine - first).all()
        if mine[0] >= len(row_of):
            assert tile[schedule.BEGIN] == tile[schedule.END] == 0
            continue
        row = tile[schedule.ROW]
        assert (row_of[mine] == row).all()
        positions = starts[row] + within[mine]
        assert (tile[schedule.POSITION] + mine - first == positions).all()
        assert tile[schedule.END] == positions[-1] // key_tile + 1
        assert tile[schedule.CONTEXT] == starts[row] + counts[row]
    assert (seen == 1).all()
    cost = used[:, schedule.END] - used[:, schedule.BEGIN]
    assert (np.diff(cost) <= 0).all()


LOWERED = [
    # group, kv_heads, head_dim, block_size, segments, options
    (4, 8, 128, 64, 1, {}),
    (4, 8, 128, 16, 4, {"sliding_window": 4096, "soft_cap": 30.0, "with_lse": True}),
    (3, 3, 64, 32, 2, {"with_lse": True}),
    (16, 1, 64, 16, 1, {}),
    (2, 4, 256, 128, 1, {"soft_cap": 50.0}),
    (1, 2, 256, 16, 1, {"sliding_window": 512}),
]


@pytest.mark.parametrize(("group", "kv_heads", "head_dim", "block_size", "segments", "o"), LOWERED)
def test_lowers_for_cuda(group, kv_heads, head_dim, block_size, segments, o) -> None:
    lower(group, kv_heads, head_dim, block_size, segments, o)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "segments", "window", "with_lse"),
    list(
        itertools.product(
            [1, 2, 3, 16], [64, 128, 256], [16, 32, 64, 128], [1, 4], [None, 9], [0, 1]
        )
    ),
)
def test_everything_lowers_for_cuda(group, head_dim, block_size, segments, window, with_lse):
    options = {"sliding_window": window, "with_lse": bool(with_lse)}
    lower(group, 2, head_dim, block_size, segments, options)


def lower(group, kv_heads, head_dim, block_size, segments, o) -> None:
    slot = (1, block_size, 128) if head_dim == 64 else (2, block_size, head_dim)
    arena = tuple(
        jax.ShapeDtypeStruct((64 * kv_heads, *slot), jnp.bfloat16) for _ in range(segments)
    )
    shape = arena_shape("prefill", arena, head_dim)
    options = Options(
        kv_heads, 0.1, o.get("sliding_window"), o.get("soft_cap"), o.get("with_lse", False), HOPPER
    )

    def call(q, arena, tables, starts, counts, layer_offset):
        assert mosaic_gpu.supports(q, shape, options)
        return mosaic_gpu.attend(q, arena, shape, tables, starts, counts, layer_offset, options)

    def ints(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.int32)

    q = jax.ShapeDtypeStruct((1000, group * kv_heads, head_dim), jnp.bfloat16)
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(
        q, arena, ints(3, 20), ints(3), ints(3), ints()
    )
    assert "mosaic_gpu" in exported.mlir_module()


def test_what_goes_to_xla() -> None:
    def supported(dtype=jnp.bfloat16, head_dim=128, block_size=64, target=HOPPER, packed=False):
        slot = (1, block_size, 2 * head_dim) if packed else (2, block_size, head_dim)
        arena = (jax.ShapeDtypeStruct((16, *slot), dtype),)
        q = jax.ShapeDtypeStruct((64, 4, head_dim), dtype)
        shape = arena_shape("prefill", arena, head_dim)
        return mosaic_gpu.supports(q, shape, Options(2, 0.1, None, None, False, target))

    assert supported()
    assert supported(head_dim=64, packed=True)
    assert not supported(head_dim=64)
    assert not supported(jnp.float32)
    assert not supported(head_dim=96)
    assert not supported(block_size=8)
    assert not supported(target=CPU)


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_schedule_made_beforehand_changes_nothing_and_is_followed(with_lse: bool) -> None:
    stream = Stream.of([0, 37], [5, 70], 80, 2)
    case, target = stream.case, interpreter()
    q = jnp.asarray(stream.q, jnp.bfloat16)
    arena = tuple(jnp.asarray(part) for part in case.arena)
    starts, counts = jnp.array(stream.prefixes, jnp.int32), jnp.array(stream.counts, jnp.int32)
    made = prefill_schedule(starts, counts, q, arena, kv_heads=case.kv_heads, target=target)
    assert made is not None

    def run(schedule):
        return prefill(
            q, None, None, arena, case.tables, starts, counts, case.layer_offset,
            target=target, scale=0.1, kv_heads=case.kv_heads, with_lse=with_lse,
            schedule=schedule,
        )[:2]  # fmt: skip

    for given, own in zip(jax.tree.leaves(run(made)), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_array_equal(np.asarray(given), np.asarray(own))
    # One tile less to do: what it would have made is missing.
    fewer = made.at[:, schedule.COUNT].add(-1)
    assert not np.array_equal(np.asarray(run(fewer)[0]), np.asarray(run(None)[0]))
    with pytest.raises(KernelArgumentError, match="as `prefill_schedule` makes it") as error:
        run(made[:-1])
    assert error.value.argument == "schedule"


def test_no_schedule_where_no_kernel_is() -> None:
    arena = (jax.ShapeDtypeStruct((8, 2, 64, 128), jnp.bfloat16),)
    q = jax.ShapeDtypeStruct((64, 4, 128), jnp.bfloat16)
    rows = jnp.zeros(2, jnp.int32)
    assert prefill_schedule(rows, rows, q, arena, kv_heads=2, target=CPU) is None


def test_a_bad_argument_is_named() -> None:
    q = jnp.zeros((64, 3, 128), jnp.bfloat16)
    arena = (jnp.zeros((8, 2, 64, 128), jnp.bfloat16),)
    rows = (jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    with pytest.raises(KernelArgumentError) as error:
        prefill(q, None, None, arena, *rows, jnp.int32(0), target=HOPPER, scale=1.0, kv_heads=2)
    assert error.value.argument == "q"
