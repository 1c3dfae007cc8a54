import pytest

from serving.cluster.admission import Admission, check_fits
from serving.cluster.generation import GenerationRequest
from serving.engine.request import SamplingParams
from serving.errors import InvalidRequestError, QueueFullError


def test_retry_after_is_the_time_to_serve_half_of_the_queue():
    admission = Admission(max_queued=40)
    for _ in range(40):
        admission.enter(0.0)
    for second in range(1, 11):
        admission.leave(float(second))
        admission.enter(float(second))
    with pytest.raises(QueueFullError, match="40 requests wait") as refused:
        admission.enter(11.0)
    assert refused.value.retry_after_s == pytest.approx(20.0)  # 10 left in 10 s; 20 are half


@pytest.mark.parametrize(("gap_s", "expected"), [(0.0001, 1.0), (1000.0, 60.0)])
def test_retry_after_stays_in_a_sensible_range(gap_s, expected):
    admission = Admission(max_queued=10)
    for _ in range(10):
        admission.enter(0.0)
    for place in range(3):
        admission.leave(place * gap_s)
        admission.enter(place * gap_s)
    assert admission.retry_after_s(4 * gap_s) == expected


def test_what_fits_depends_on_the_largest_replica_known():
    request = GenerationRequest("r", (1,) * 10, SamplingParams())
    check_fits(request, None)
    check_fits(request, 11)
    with pytest.raises(InvalidRequestError, match="at most 9"):
        check_fits(request, 10)
