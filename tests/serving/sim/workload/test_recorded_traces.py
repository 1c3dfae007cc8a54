"""Whole public traces, where they lie in a folder shared/traces beside or above the repository."""

from pathlib import Path

import numpy as np
import pytest

from serving.sim.workload.azure import read_azure
from serving.sim.workload.mooncake import read_mooncake
from serving.sim.workload.prompts import Prompts
from serving.sim.workload.table import RequestTable
from serving.sim.workload.transforms import at_rate, window


def recorded(name):
    for folder in Path(__file__).parents:
        if (found := folder / "shared" / "traces" / name).exists():
            return found
    pytest.skip(f"RECORDED TRACES ARE NOT TESTED: no shared/traces/{name} here")


@pytest.mark.parametrize(
    ("name", "count", "seconds", "prompts", "outputs"),
    [
        # Mean, P50, P95 and P99 of the lengths, counted with other programs than ours.
        ("conv", 19366, 3502, (1155, 1020, 4083, 4142), (211, 129, 451, 601)),
        ("code", 8819, 3436, (2048, 1469, 7303, 7436), (28, 13, 90, 251)),
    ],
)
def test_azure(name, count, seconds, prompts, outputs):
    workload = read_azure(recorded(f"AzureLLMInferenceTrace_{name}.csv"))
    table = RequestTable.of(workload.requests)
    assert len(table) == count
    assert workload.seconds == pytest.approx(seconds, abs=1)
    for lengths, expected in ((table.prompt, prompts), (table.output, outputs)):
        found = (lengths.mean(), *np.percentile(lengths, (50, 95, 99)))
        assert found == pytest.approx(expected, abs=1)


def test_three_minutes_of_azure_at_another_rate():
    workload = read_azure(recorded("AzureLLMInferenceTrace_conv.csv"))
    stretch = at_rate(window(workload, 0, 180), 16.6)
    assert stretch.rate == pytest.approx(16.6)
    assert len(stretch.requests) == 785
    assert stretch.requests[1].at_s == pytest.approx(4.3145790 * 785 / 180 / 16.6)


def test_mooncake():
    workload = read_mooncake(recorded("mooncake_conversation_trace.jsonl"))
    table = RequestTable.of(workload.requests)
    assert (len(table), workload.prefix_tokens) == (12031, 512)
    assert workload.seconds == pytest.approx(3537, abs=1)
    assert table.prompt.mean() == pytest.approx(12035, abs=1)
    assert np.percentile(table.output, (50, 95, 99)) == pytest.approx((350, 698, 1119), abs=1)
    blocks = [one for prefix in table.prefix for one in prefix]
    assert 1 - len(set(blocks)) / len(blocks) == pytest.approx(0.37, abs=0.01)
    assert [len(prefix) for prefix in table.prefix] == (-(-table.prompt // 512)).tolist()
    # The first two have nothing but their first block in common, so have their prompts.
    first, second = Prompts(workload, 128_000, 0)[:2]
    assert (first[:512] == second[:512]).all()
    assert (first[512:1024] == second[512:1024]).sum() < 3
