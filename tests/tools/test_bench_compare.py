"""The comparison with a client and a peer whose speed and tokens are known."""

import pytest

from tools.bench.compare import compare
from tools.bench.workload import LengthRange, Workload

WORKLOAD = Workload(LengthRange(3, 3), LengthRange(4, 4), LengthRange(10, 9999), 0)


class FakeClient:
    def __init__(self, error=""):
        self.error = error
        self.prompts = []

    async def send(self, task, record):
        self.prompts.append(task.prompt)
        record.arrived(4)
        record.tokens = [1, 2, 3, 4]
        record.output_tokens = 4
        record.finish(self.error)


class FakePeer:
    def __init__(self):
        self.facts = {"versions": {"transformers": "5"}, "threads": 2, "attention": "sdpa"}
        self.prompts = []

    def generate(self, tasks):
        self.prompts.extend(task.prompt for task in tasks)
        return 2.0, [[1, 2, 9, 4]] * len(tasks)


async def test_both_sides_get_the_same_prompts_and_rows_say_how_they_compare():
    client, peer = FakeClient(), FakePeer()
    ended = []
    rows = await compare(client, peer, WORKLOAD, [1, 16], 3, lambda: ended.append(1))
    by_name = {row["name"]: row for row in rows}
    assert sorted(client.prompts) == sorted(peer.prompts)
    assert len(set(client.prompts)) == len(client.prompts) == 4 * 17  # one turn is not counted
    assert len(ended) == 4 * (17 + 2)
    one = by_name["1 stream, output tokens, beside the peer"]
    many = by_name["16 streams, output tokens, beside the peer"]
    assert one["peer_samples"] == [2.0] * 3  # 4 tokens in 2 s
    assert many["peer_samples"] == [32.0] * 3
    assert one["floor"] == pytest.approx(0.7 * 2.0)
    assert many["floor"] == pytest.approx(3 * one["median"], rel=1e-4)
    assert one["share_of_peer"] == pytest.approx(one["median"] / 2.0, rel=1e-3)
    assert by_name["1 stream, tokens equal to the peer's"]["samples"] == [0.5] * 3


async def test_a_failed_request_ends_the_comparison():
    with pytest.raises(RuntimeError, match="HTTP 500"):
        await compare(FakeClient("HTTP 500"), FakePeer(), WORKLOAD, [1], 1, lambda: None)
