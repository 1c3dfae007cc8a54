"""The layout of heads over devices."""

import pytest

from lumen.errors import ModelConfigError
from lumen.sharding import HeadLayout, padded


@pytest.mark.parametrize(
    ("heads", "tensor", "kv_per_device", "q_per_device"),
    [
        ((32, 8), 1, 8, 32),
        ((32, 8), 4, 2, 8),
        ((32, 8), 8, 1, 4),
        ((32, 8), 16, 1, 2),
        ((9, 3), 1, 3, 9),
        ((9, 3), 2, 2, 6),
        ((9, 3), 4, 1, 3),
        ((9, 3), 6, 1, 2),
        ((9, 3), 8, 1, 2),
        ((9, 3), 9, 1, 1),
        ((4, 1), 3, 1, 2),
    ],
)
def test_heads_per_device(heads, tensor, kv_per_device, q_per_device):
    layout = HeadLayout(*heads, tensor)
    assert (layout.kv_per_device, layout.q_per_device) == (kv_per_device, q_per_device)


@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (14, 2), (4, 1), (6, 6), (40, 8)])
@pytest.mark.parametrize("tensor", range(1, 17))
def test_every_query_head_is_computed_once_beside_its_kv_head(heads, tensor):
    num_heads, num_kv_heads = heads
    layout = HeadLayout(num_heads, num_kv_heads, tensor)
    seen = []
    for device in range(tensor):
        queries, keys = layout.q_heads(device), layout.kv_heads(device)
        assert (len(queries), len(keys)) == (layout.q_per_device, layout.kv_per_device)
        for i, head in enumerate(queries):
            if head is not None:
                assert keys[i // layout.group] == head // (num_heads // num_kv_heads)
                seen.append(head)
    assert sorted(seen) == list(range(num_heads))


def test_no_devices_are_refused():
    with pytest.raises(ModelConfigError, match="positive number of devices"):
        HeadLayout(9, 3, 0)


def test_padding_is_the_next_multiple():
    assert [padded(n, 4) for n in (1, 4, 5, 509)] == [4, 4, 8, 512]
