import numpy as np
import pytest

from tools.bench.workload import LengthRange, Workload


def workload(seed=0, prompt=(4, 8), output=(2, 2)):
    return Workload(LengthRange(*prompt), LengthRange(*output), LengthRange(100, 500), seed)


@pytest.mark.parametrize("text", ["", "x", "0", "5:3", "1:2:3", "-1"])
def test_wrong_lengths_are_refused(text):
    with pytest.raises(ValueError, match="expected tokens as 128 or LOW:HIGH"):
        LengthRange.parse(text)


def test_lengths_are_read():
    assert LengthRange.parse("128") == LengthRange(128, 128)
    assert LengthRange.parse("64:256") == LengthRange(64, 256)


def test_same_seed_same_tasks_other_salt_other_tasks():
    assert workload().tasks(5, rate=2.0) == workload().tasks(5, rate=2.0)
    assert workload().tasks(5)[0].prompt != workload().tasks(5, salt=1)[0].prompt
    assert workload().tasks(5)[0].prompt != workload(seed=1).tasks(5)[0].prompt


def test_lengths_and_ids_stay_in_their_ranges_and_reach_both_ends():
    tasks = workload().tasks(500)
    assert {len(task.prompt) for task in tasks} == {4, 5, 6, 7, 8}
    assert {task.output_tokens for task in tasks} == {2}
    ids = [token for task in tasks for token in task.prompt]
    assert min(ids) == 100
    assert max(ids) == 500


def test_arrivals_are_poisson_at_the_rate():
    at = np.array([task.at_s for task in workload().tasks(4001, rate=5.0)])
    gaps = np.diff(at)
    assert at[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential: both are equal


def test_without_a_rate_all_are_due_at_once():
    assert {task.at_s for task in workload().tasks(5)} == {0.0}
