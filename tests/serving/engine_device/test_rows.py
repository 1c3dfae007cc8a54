"""What the host knows of the rows decides which head program serves them."""

import numpy as np
import pytest

from serving.engine.device.head_programs import HeadKind
from serving.engine.device.rows import RowState
from serving.engine.plan import RowAssignment, StepPlan
from serving.engine.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0, top_k=50, top_p=0.5, min_p=0.1)  # filters change nothing
PLAIN = SamplingParams(temperature=0.7)
TOP_K = SamplingParams(top_k=50)
TOP_P = SamplingParams(top_p=0.9)
MIN_P = SamplingParams(min_p=0.05)
LOGPROBS = SamplingParams(temperature=0.0, logprobs=0)


def assigned(*requests: SamplingParams) -> RowState:
    state = RowState(num_rows=8, table_columns=1)
    rows = (RowAssignment(row, 0, sampling, ()) for row, sampling in enumerate(requests))
    state.apply(StepPlan(1, assignments=tuple(rows)))
    return state


@pytest.mark.parametrize(
    ("requests", "kind"),
    [
        ([GREEDY], HeadKind.GREEDY),
        ([PLAIN], HeadKind.SAMPLED),
        ([GREEDY, PLAIN], HeadKind.SAMPLED),
        ([TOP_K], HeadKind.TRUNCATED),
        ([TOP_P], HeadKind.TRUNCATED),
        ([MIN_P], HeadKind.TRUNCATED),
        ([PLAIN, GREEDY, MIN_P], HeadKind.TRUNCATED),
        ([LOGPROBS], HeadKind.COMPLETE),
        ([TOP_K, LOGPROBS], HeadKind.COMPLETE),
    ],
)
def test_the_neediest_row_chooses_the_head(requests, kind):
    state = assigned(*requests)
    rows = np.arange(len(requests), dtype=np.int32)
    assert state.head_kind(rows, masked=False) is kind
    assert state.head_kind(rows, masked=True) is HeadKind.COMPLETE


def test_rows_outside_the_batch_and_earlier_requests_do_not_count():
    state = assigned(TOP_P, PLAIN, LOGPROBS)
    assert state.head_kind(np.array([1], np.int32), masked=False) is HeadKind.SAMPLED
    state.apply(StepPlan(2, assignments=(RowAssignment(0, 0, GREEDY, ()),)))
    assert state.head_kind(np.array([0], np.int32), masked=False) is HeadKind.GREEDY
