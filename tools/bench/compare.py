"""Lumen beside transformers on one machine, taking turns, with the same work on both sides."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serving.results_file import Row, row
from tools.bench.clients import Client
from tools.bench.load import run_streams
from tools.bench.peer import Peer
from tools.bench.record import RequestRecord
from tools.bench.summary import elapsed_s, rows_of, streams_name
from tools.bench.workload import Workload

# Floors of the first release: this share of transformers' rate with one stream, and this
# multiple of our own one-stream rate with sixteen.
ONE_STREAM_FLOOR = 0.7
BATCH_FLOOR = 3.0


@dataclass(slots=True)
class _Turns:
    """Output tokens per second of each turn."""

    lumen: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    same_tokens: list[float] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)


async def compare(
    client: Client,
    peer: Peer,
    workload: Workload,
    streams: Sequence[int],
    repetitions: int,
    ended: Callable[[], None],
) -> list[Row]:
    """Rows of output tokens per second, ours with the peer's in the same unit.

    Each repetition goes through all numbers of streams, ours then the peer's on the same prompts,
    after one turn of each that is not counted. A rate is all output tokens over the time from
    the first request to the last token, prefill included.
    """
    turns: Mapping[int, _Turns] = {count: _Turns() for count in streams}
    for repetition in range(repetitions + 1):
        for count, seen in turns.items():
            tasks = workload.tasks(count, salt=repetition * 1000 + count)
            tokens = sum(task.output_tokens for task in tasks)
            records = await run_streams(client, tasks, count, ended)
            if failed := [record.error for record in records if record.error]:
                raise RuntimeError(f"{len(failed)} of {count} requests failed: {failed[0]}.")
            # In a thread, so that the loop still notices when the server closes a connection.
            seconds, answers = await asyncio.to_thread(peer.generate, tasks)
            ended()
            if repetition == 0:
                continue
            seen.lumen.append(tokens / elapsed_s(records))
            seen.peer.append(tokens / seconds)
            seen.records.extend(records)
            by_prompt = {record.task.prompt: record.tokens for record in records}
            seen.same_tokens.extend(
                _same_share(by_prompt[task.prompt], answer)
                for task, answer in zip(tasks, answers, strict=True)
                if by_prompt[task.prompt]
            )
    return _rows(turns, peer)


def _rows(turns: Mapping[int, _Turns], peer: Peer) -> list[Row]:
    source = (
        f"transformers {peer.facts['versions']['transformers']} generate, fp32, "
        f"{peer.facts['attention']} attention, KV cache, one batch, {peer.facts['threads']} threads"
    )
    one_stream = float(np.median(turns[1].lumen)) if 1 in turns else None
    rows = []
    for count, seen in turns.items():
        name = streams_name(count)
        theirs = float(np.median(seen.peer))
        floor: float | None = None
        if count == 1:
            floor = ONE_STREAM_FLOOR * theirs
        elif count == 16 and one_stream is not None:
            floor = BATCH_FLOOR * one_stream
        rows.append(
            row(
                f"{name}, output tokens, beside the peer",
                "1/s",
                seen.lumen,
                peer=float(f"{theirs:.6g}"),
                peer_samples=[float(f"{rate:.6g}") for rate in seen.peer],
                peer_source=source,
                floor=None if floor is None else float(f"{floor:.6g}"),
                share_of_peer=float(f"{np.median(seen.lumen) / theirs:.4g}"),
            )
        )
        if seen.same_tokens:
            rows.append(row(f"{name}, tokens equal to the peer's", "share", seen.same_tokens))
        rows.extend(one for one in rows_of(name, seen.records) if "percentiles" in one)
    return rows


def _same_share(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of tokens before the first that differs: near ties part two right answers."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    return 1.0 if same is None else same / len(theirs)
