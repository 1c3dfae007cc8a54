"""How chains are cut over a chip, for every model that has a name here."""

import pytest
from lumen_kernels.dense_chain import cut
from lumen_kernels.dense_chain.cut import ROWS, SUBTILE, Role

from lumen.presets import PRESETS

SHARED_MEMORY = 227 << 10  # bytes a block of a Hopper may have
CUT = {"llama-3.1-8b", "llama-3.1-70b", "qwen2.5-14b", "qwen2.5-72b"}
CORES = [132, 114, 78]  # SXM, PCIe, and one where pairs do not come out even with rows of tiles


def phases_of(name, last=False, tensor=1):
    config = PRESETS[name]
    q, kv = (heads * config.head_dim // tensor for heads in (config.num_heads, config.num_kv_heads))
    inner = config.intermediate_size // tensor
    return cut.layer_phases(config.hidden_size, q, inner, None if last else q + 2 * kv)


def shared_memory(one):
    """Bytes of all rings and staging buffers."""
    window = ROWS - one.rows
    x = one.x_stages * one.x_rows + window
    w = one.w_stages * one.w_slot
    buffers = {Role.RESIDUAL: 3, Role.GATED: 1, Role.PLAIN: 1}
    staging = max(ROWS * one.tile(phase) * 2 * buffers[phase.role] for phase in one.phases)
    return (x + w) * SUBTILE * 2 + staging


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_is_cut_so_that_everything_fits_or_not_at_all(name, last):
    phases = phases_of(name, last)
    for m in range(1, 33):
        for cores in CORES:
            one = cut.cut(m, phases, cores)
            assert (one is not None) == (name in CUT)
            if one is not None:
                check(one, m, cores)


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(CUT))
def test_parts_of_a_layer_are_cut_alike(name, tensor):
    for m in (1, 8, 16, 24, 32):
        one = cut.fitted(m, phases_of(name, tensor=tensor), 132)
        if one is not None:
            check(one, m, 132)


def check(one, m, cores):
    assert one.m == m
    assert one.rows % 8 == 0
    assert one.rows - m < 8
    assert one.clusters * one.sharing <= cores
    assert shared_memory(one) <= SHARED_MEMORY
    assert one.w_stages >= 3
    assert one.x_stages >= 2
    for phase in one.phases:
        tile, w_subtiles = one.tile(phase), one.w_subtiles(phase)
        assert phase.columns % tile == 0
        assert tile % 8 == 0
        assert tile * phase.halves <= 256  # columns of one WGMMA
        if phase.role is Role.RESIDUAL:
            assert SUBTILE % tile == 0
        if phase.norm is not None:
            assert phase.columns // tile % 8 == 0  # sums of squares are added by eights
        assert phase.depth == one.w_steps(phase) * w_subtiles * SUBTILE
        assert tile * phase.halves * w_subtiles <= one.w_slot
        assert one.w_slot % w_subtiles == 0
        assert w_subtiles % one.x_subtiles_of(phase) == 0
        assert one.x_subtiles_of(phase) <= one.x_subtiles
        # A block without a tile of some phase would not wait for that phase.
        assert one.groups(phase) >= one.clusters
        assert one.groups(phase) * one.sharing * tile >= phase.columns


def test_chains_that_were_not_measured_to_win_are_not_cut():
    phases = phases_of("llama-3.1-8b")
    assert [m for m in (0, 1, 32, 33, 64) if cut.cut(m, phases, 132)] == [1, 32]
    assert cut.fitted(64, phases, 132) is not None
    small = cut.layer_phases(1024, 1024, 4096, 2048)
    assert cut.cut(8, small, 64) is None
    assert cut.fitted(8, small, 64) is not None


def test_a_chain_that_would_leave_many_cores_idle_is_not_cut():
    """A narrow phase holds the whole chain to its number of tiles."""
    assert cut.fitted(8, cut.layer_phases(1024, 8192, 8192, 8192), 132) is None
    assert cut.fitted(8, cut.layer_phases(1024, 8192, 8192, 8192), 64) is not None


@pytest.mark.parametrize(
    ("hidden", "q", "inner", "qkv"),
    [
        (4096, 4064, 14336, 6144),  # depths that are no multiples of 64
        (4096, 4096, 14304, 6144),
        (4032, 4096, 14336, 6144),  # sums of squares cannot be added by eights
        (4096, 4096, 14336, 6145),  # no tile divides the columns
    ],
)
def test_shapes_that_do_not_divide_are_not_cut(hidden, q, inner, qkv):
    assert cut.fitted(8, cut.layer_phases(hidden, q, inner, qkv), 132) is None


def test_rows_do_not_change_the_order_of_sums():
    """A row's sums are those of its tiles: the same for all numbers of rows, shared x or not."""
    for name in sorted(CUT):
        phases = phases_of(name)
        assert len({cut.cut(m, phases, 132).tiles for m in range(1, 33)}) == 1
