import pytest

from serving.errors import ConfigurationError
from serving.launch.jax_start import split_devices


def test_each_replica_gets_devices_of_its_own():
    assert split_devices([0, 1, 2, 3], 2, 2) == [[0, 1], [2, 3]]
    assert split_devices([0, 1, 2, 3], 1, 2) == [[0, 1]]


def test_by_default_there_are_as_many_replicas_as_fit():
    assert split_devices([0, 1, 2, 3], None, 1) == [[0], [1], [2], [3]]
    assert split_devices([0, 1, 2, 3, 4], None, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("replicas", "width"), [(3, 2), (None, 5), (5, 1)])
def test_too_few_devices_are_counted_for_the_reader(replicas, width):
    with pytest.raises(ConfigurationError, match=r"--replicas=\d .*has 4"):
        split_devices([0, 1, 2, 3], replicas, width)
