import pytest

from serving.sim.workload.azure import read_azure
from serving.sim.workload.burstgpt import read_burstgpt
from serving.sim.workload.mooncake import read_mooncake
from serving.sim.workload.requests import WorkloadRequest
from serving.sim.workload.sharegpt import read_sharegpt
from tools.make_workload_samples import FOLDER, SAMPLES

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_azure(file):
    workload = read_azure(
        file(
            "\ufeff" + AZURE.replace("\n", "\r\n") + "2023-11-16 23:59:59.6805900,374,44\r\n\r\n"
            '"2023-11-17 00:00:01.1805901", 7 ,1\r\n2023-11-17 01:00:03+01:00,8,2'
        )
    )
    first, second, third = workload.requests
    assert first == WorkloadRequest(0.0, 374, 44)
    assert (second.prompt, second.output, third.prompt) == (7, 1, 8)
    assert second.at_s == pytest.approx(1.5000001, abs=1e-9)
    assert third.at_s == pytest.approx(3.31941, abs=1e-9)
    # Three requests, two gaps: played again, the next one would come after a third.
    assert workload.seconds == pytest.approx(1.5 * 3.31941)
    assert (workload.name, workload.left_out, workload.prefix_tokens) == ("trace", 0, 0)


def test_columns_may_come_in_any_order_and_with_others(file):
    text = "ContextTokens,x,GeneratedTokens,TIMESTAMP\n3,,4,2024-05-12T00:00:00\n"
    (one,) = read_azure(file(text)).requests
    assert one == WorkloadRequest(0.0, 3, 4)


def test_mooncake(file):
    workload = read_mooncake(
        file(
            '{"timestamp": 1500, "input_length": 1000, "output_length": 3, "hash_ids": [7, 8]}\r\n'
            '{"hash_ids": [7], "timestamp": 2750.5, "input_length": 513, "output_length": 1}\n\n'
        )
    )
    first, second = workload.requests
    assert first == WorkloadRequest(0.0, 1000, 3, prefix=(7, 8))
    assert second == WorkloadRequest(1.2505, 513, 1, prefix=(7,))
    assert (workload.prefix_tokens, workload.seconds) == (512, 2.501)
    assert read_mooncake(file('{"timestamp":0,"input_length":17,"output_length":1,'
                              '"hash_ids":[0,1]}'), 16).prefix_tokens == 16  # fmt: skip


def test_burstgpt(file):
    path = file(
        BURST + "5,ChatGPT,472,18,490,Conversation log\n6,GPT-4,9,0,9,API log\n"
        "6,ChatGPT,0,0,0,API log\n7.5,GPT-4,9,3,12,API log\n"
    )
    workload = read_burstgpt(path)
    assert workload.requests == (WorkloadRequest(0.0, 472, 18), WorkloadRequest(2.5, 9, 3))
    assert workload.left_out == 2
    # Times count from the first row of the file, so that parts of one file fit together.
    part = read_burstgpt(path, model="GPT-4", log_type="API log")
    assert part.requests == (WorkloadRequest(2.5, 9, 3),)
    assert part.left_out == 1


def test_burstgpt_of_later_releases(file):
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n0.5,,3.2,GPT-4,1,2,3,API log\n"
    )
    assert read_burstgpt(file(text)).requests == (WorkloadRequest(0.0, 1, 2),)


def talk(*turns):
    said = ", ".join(f'{{"from": "{who}", "value": "{what}"}}' for who, what in turns)
    return f'{{"id": "x", "conversations": [{said}]}}'


def test_sharegpt(file):
    path = file(
        "[\n"
        + ",\n".join((
            talk(("system", "be kind"), ("human", "one two three four"), ("gpt", "five six")),
            talk(("user", "a b c"), ("assistant", "d\\ud800"), ("user", "e"), ("assistant", "f")),
            talk(("human", "no answer")),
            talk(("human", "asked"), ("human", "twice"), ("gpt", "x")),
            talk(("human", "empty"), ("gpt", "")),
            talk(),
        ))
        + "\n]\n"
    )  # fmt: skip
    guessed = read_sharegpt(path, tokens_per_word=2.5)
    assert guessed.requests == (WorkloadRequest(0.0, 10, 5), WorkloadRequest(0.0, 8, 2))
    assert guessed.left_out == 4
    assert guessed.name == "trace (2.5 tokens a word)"
    counted = read_sharegpt(path, count_tokens=len)
    assert [(one.prompt, one.output) for one in counted.requests] == [(18, 8), (5, 2)]
    assert counted.name == "trace (lengths by the tokenizer)"
    assert counted.seconds == 0.0


@pytest.mark.parametrize(
    ("read", "name", "count", "left_out"),
    [
        (read_azure, "azure.csv", 240, 0),
        (read_mooncake, "mooncake.jsonl", 120, 0),
        (read_burstgpt, "burstgpt.csv", None, None),
        (read_sharegpt, "sharegpt.json", 29, 1),
    ],
)
def test_the_samples_that_come_with_lumen(read, name, count, left_out):
    workload = read(FOLDER / name)
    if count is None:  # one in twenty failed
        assert 2 <= workload.left_out <= 20
        assert len(workload.requests) + workload.left_out == 200
    else:
        assert (len(workload.requests), workload.left_out) == (count, left_out)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_what_their_tool_makes(name):
    assert (FOLDER / name).read_bytes().decode() == SAMPLES[name]()


def test_prefixes_of_the_mooncake_sample_are_shared():
    blocks = [
        one for row in read_mooncake(FOLDER / "mooncake.jsonl").requests for one in row.prefix
    ]
    assert len(set(blocks)) < 0.7 * len(blocks)
