"""Many clients that read, leave, abort and come back, over a link that breaks: nothing is lost."""

import asyncio
import random

from serving.api.proto import lumen_v1_pb2 as pb


async def test_churn_loses_nothing_and_leaves_nothing_behind(deploy, greedy, caplog):
    deployment = await deploy(
        replicas=2,
        reconnect_grace_s=20.0,
        accept_timeout_s=0.2,
        progress_timeout_s=0.2,
        abort_retry_s=0.1,
    )
    draw = random.Random(20)
    behaviours = [draw.choice(["read", "leave", "abort", "resume"]) for _ in range(80)]
    clients = [
        asyncio.create_task(client(deployment, greedy, number, behaviour, draw.randrange(25)))
        for number, behaviour in enumerate(behaviours)
    ]
    async with asyncio.timeout(60):
        for _ in range(2):
            await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
            await deployment.worker.hang_up()
            await deployment.not_ready.wait()
            await deployment.worker.listen(deployment.port)
            await deployment.ready.wait()
        await asyncio.gather(*clients)
        await idle(deployment)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def client(deployment, greedy, number, behaviour, stop_at):
    """One client; what it read must be the beginning (or all) of the right answer."""
    request = greedy(
        prompt=(number + 1, 5, 6),
        max_tokens=30,
        request_id=f"r{number}",
        resume_lease_s=60.0 if behaviour == "resume" else 0.0,
    )
    expected = deployment.reference(request, 30)
    call = deployment.stub.Generate(request)
    await call.initial_metadata()  # the request is accepted
    tokens, last = await read(call, [], 30 if behaviour == "read" else stop_at)
    if behaviour == "leave":
        call.cancel()
    elif behaviour == "abort":
        await deployment.stub.Abort(pb.AbortRequest(request_id=request.request_id))
        tokens, rest = await read(call, tokens, None)
        last = rest or last
    elif behaviour == "resume":
        call.cancel()
        await call.code()
        again = pb.ResumeRequest(request_id=request.request_id, from_index=len(tokens))
        tokens, last = await read(deployment.stub.Resume(again), tokens, None)
    assert tuple(tokens) == expected[: len(tokens)]
    if behaviour in ("read", "resume"):
        assert len(tokens) == 30
    if behaviour == "abort":
        assert last.finish_reason in (pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_LENGTH)


async def read(call, tokens, until):
    """Append what comes, up to `until` tokens (None: to the end); also the last chunk."""
    tokens = list(tokens)
    last = None
    while until is None or len(tokens) < until:
        chunk = await call.read()
        if not isinstance(chunk, pb.GenerateChunk):
            break
        assert chunk.start_index == len(tokens)
        tokens.extend(chunk.token_ids)
        last = chunk
    return tokens, last


async def idle(deployment):
    """Wait until gateway and replicas hold nothing of any request."""
    while True:
        info = await deployment.stub.ServerInfo(pb.ServerInfoRequest())
        report = await deployment.stub.LoadReport(pb.LoadReportRequest())
        if info.queued == info.running == 0 and all(
            load.running == load.waiting == 0
            and load.free_blocks + load.cached_blocks == load.total_blocks
            for load in report.replicas
        ):
            return
