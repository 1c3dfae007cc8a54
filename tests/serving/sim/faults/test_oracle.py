from serving.engine.executor import ExecutorLimits
from serving.engine.request import FinishReason, SamplingParams
from serving.sim.faults.oracle import Numerics, Oracle

LIMITS = ExecutorLimits(
    num_rows=2,
    num_blocks=10,
    slots_per_block=6,
    block_size=4,
    max_model_len=64,
    max_prefill_tokens=8,
    max_prefills=2,
    vocab_size=97,
    max_logprobs=2,
    model_revision="r1",
)
PROMPT = (1, 2, 3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def oracle_of(drift: bool, engines: int) -> Oracle:
    oracle = Oracle(Numerics(LIMITS, eos_token_ids=(7,), eos_every=0, drift=drift))
    for index in range(engines):
        oracle.started(f"engine {index}")
    return oracle


def test_the_reference_explains_itself_and_nothing_else():
    oracle = oracle_of(drift=False, engines=3)
    tokens = oracle.reference(PROMPT, GREEDY)
    assert tokens is not None
    assert len(tokens) == 8
    for index in range(8):
        assert oracle.explains(PROMPT, tokens, index, GREEDY, None)
    wrong = [*tokens[:4], (tokens[4] + 1) % 97, *tokens[5:]]
    assert not oracle.explains(PROMPT, wrong, 4, GREEDY, None)
    assert not oracle.explains(PROMPT, wrong, 5, GREEDY, None)  # its context is another one


def test_drifting_engines_draw_differently():
    plain, drifting = oracle_of(drift=False, engines=1), oracle_of(drift=True, engines=1)
    tokens = plain.reference(PROMPT, GREEDY)
    assert tokens is not None
    assert drifting.reference(PROMPT, GREEDY) is None
    assert not all(drifting.explains(PROMPT, tokens, i, GREEDY, None) for i in range(8))


def test_the_end_follows_from_the_tokens():
    oracle = oracle_of(drift=False, engines=1)
    stops = SamplingParams(max_tokens=4, min_tokens=1, stop_token_ids=(9,))
    assert oracle.end(PROMPT, (), stops) is None
    assert oracle.end(PROMPT, (5, 9), stops) is FinishReason.STOP
    assert oracle.end(PROMPT, (9,), stops) is None  # min_tokens
    assert oracle.end(PROMPT, (5, 7), stops) is FinishReason.STOP  # the model's own
    assert oracle.end(PROMPT, (5, 5, 5, 5), stops) is FinishReason.LENGTH
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    assert oracle.end((1,) * 30, (5,) * 10, long) is FinishReason.LENGTH  # 40 tokens of arena
