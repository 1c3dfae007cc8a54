"""The engine's loops over the device executor: many requests give what each gives alone."""

import itertools

import pytest

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import AddRequest
from serving.engine.loop import LoopPorts, run_overlapped, run_plain
from serving.engine.mailbox import Mailbox
from serving.engine.request import EngineRequest, FinishReason, SamplingParams

COUNT = 10


def sampling_of(index, **changes):
    return SamplingParams(
        temperature=float(index % 3 == 2), seed=index, max_tokens=3 + 2 * index, **changes
    )


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("run", "depth"), [(run_plain, 1), (run_overlapped, 2)])
def test_requests_together_give_what_each_gives_alone(driver, prompt, run, depth, steps):
    executor = driver.executor
    prompts = [prompt(5 + 7 * index, seed=index) for index in range(COUNT)]
    alone = [
        driver.generate(0, tokens, 3 + 2 * index, sampling_of(index), room=24)
        for index, tokens in enumerate(prompts)
    ]
    stop = alone[7][5]
    core = EngineCore(executor.limits, EngineConfig(pipeline_depth=depth, decode_steps=steps))
    mailbox, ticks = Mailbox(), itertools.count()
    tokens: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}

    def publish(outputs, load):
        for output in outputs:
            assert output.start_index == len(tokens.setdefault(output.request_id, []))
            tokens[output.request_id] += output.tokens
            if output.finish is not None:
                ends[output.request_id] = output.finish
        if len(ends) == COUNT:
            mailbox.close()

    for index, context in enumerate(prompts):
        sampling = sampling_of(index, stop_token_ids=(stop,) if index == 7 else ())
        mailbox.put(AddRequest(EngineRequest(f"r{index}", 1, tuple(context.tolist()), sampling)))
    run(LoopPorts(core, executor, publish, lambda: float(next(ticks))), mailbox)

    assert ends.pop("r7") is FinishReason.STOP
    assert tokens.pop("r7") == alone[7][: alone[7].index(stop) + 1]
    assert set(ends.values()) == {FinishReason.LENGTH}
    assert tokens == {f"r{i}": alone[i] for i in range(COUNT) if i != 7}


def test_stop_tokens_are_ruled_out_before_min_tokens(driver, prompt):
    executor = driver.executor
    context = prompt(12)
    free = driver.generate(0, context, 8)
    core = EngineCore(executor.limits, EngineConfig(pipeline_depth=1))
    mailbox = Mailbox()
    got = []

    def publish(outputs, load):
        for output in outputs:
            got.extend(output.tokens)
            if output.finish is not None:
                mailbox.close()

    sampling = SamplingParams(
        temperature=0.0, max_tokens=8, min_tokens=4, stop_token_ids=(free[0], free[1])
    )
    request = EngineRequest("r", 1, tuple(context.tolist()), sampling)
    mailbox.put(AddRequest(request))
    run_plain(LoopPorts(core, executor, publish, lambda: 0.0), mailbox)
    assert len(got) >= 5
    assert not {free[0], free[1]} & set(got[:4])
