import numpy as np
import pytest

from serving.errors import ConfigurationError
from serving.sim.workload.prompts import Prompts
from serving.sim.workload.requests import Workload, WorkloadRequest
from serving.sim.workload.transforms import repeated

PREFIXES = ((1, 2, 3), (1, 2, 4), (9, 2), (1, 2, 3), (), (2,))


def workload(prompt=40, piece=16):
    rows = tuple(WorkloadRequest(0.0, prompt, 1, prefix=prefix) for prefix in PREFIXES)
    return Workload("w", 1.0, rows, piece)


def common(one, other):
    """Leading tokens that two prompts share."""
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if differ.size else len(one)


def test_equal_numbers_are_equal_tokens_and_nothing_else_is():
    first, second, third, fourth, fifth, sixth = Prompts(workload(), 100_000, 0)
    assert common(first, second) == 32
    assert common(first, third) == 0
    assert (first[16:32] == third[16:32]).all()
    assert (first[16:32] == sixth[:16]).all()  # wherever in a prompt it stands
    assert common(first, fourth) == 40  # the last piece is shorter than a piece
    assert common(first, fifth) == 0
    assert common(second[32:], fifth[:8]) == 0  # piece 4 is not what prompt 4 has of its own
    assert len({one.tobytes() for one in (first, second, third, fifth)}) == 4


def test_after_the_prefix_each_prompt_goes_its_own_way():
    first, second, third, fourth, _, _ = Prompts(workload(100), 100_000, 0)
    assert (common(first, second), common(first, fourth)) == (32, 48)
    own = [prompt[48:] for prompt in (first, second, fourth)] + [third[32:]]
    assert len({token for prompt in own for token in prompt.tolist()}) > 0.99 * sum(map(len, own))


def test_prompts_are_the_same_whatever_was_asked_for_before():
    prompts = Prompts(workload(), 500, 7)
    assert len(prompts) == 6
    assert [one.tolist() for one in prompts] == [
        prompts[place].tolist() for place in (0, 1, 2, 3, 4, 5)
    ]
    assert prompts[-1].tolist() == prompts[5].tolist()
    assert [one.tolist() for one in prompts[1:3]] == [prompts[1].tolist(), prompts[2].tolist()]
    assert prompts[0].tolist() == Prompts(workload(), 500, 7)[0].tolist()
    assert prompts[0].tolist() != Prompts(workload(), 500, 8)[0].tolist()
    assert (prompts[0].dtype, prompts[0].shape) == (np.int32, (40,))
    with pytest.raises(IndexError):
        prompts[6]


def test_tokens_are_even_over_the_vocabulary():
    rows = tuple(WorkloadRequest(0.0, 10_000, 1) for _ in range(10))
    tokens = np.concatenate(Prompts(Workload("w", 1.0, rows), 7, 0)[:])
    assert np.bincount(tokens, minlength=7) / len(tokens) == pytest.approx([1 / 7] * 7, abs=0.005)
    assert abs(np.corrcoef(tokens[1:], tokens[:-1])[0, 1]) < 0.02
    (large,) = Prompts(Workload("w", 1.0, rows[:1]), 1 << 31, 1)
    assert large.min() >= 0
    assert large.max() > 0.99 * 2**31


def test_a_repeated_workload_has_other_prompts():
    prompts = Prompts(repeated(workload(), 2), 100_000, 0)
    assert all(common(prompts[place], prompts[place + 6]) < 3 for place in range(6))
    assert common(prompts[6], prompts[7]) == 32


@pytest.mark.parametrize(("vocab", "seed"), [(0, 0), (2**31 + 1, 0), (5, -1)])
def test_wrong_settings_are_refused(vocab, seed):
    with pytest.raises(ConfigurationError, match="must be"):
        Prompts(workload(), vocab, seed)
