"""Whatever a file holds, the one error there is says where and what."""

import random
import string

import pytest

from serving.errors import WorkloadFileError
from serving.sim.workload.azure import read_azure
from serving.sim.workload.burstgpt import read_burstgpt
from serving.sim.workload.mooncake import read_mooncake
from serving.sim.workload.sharegpt import read_sharegpt
from tools.make_workload_samples import SAMPLES

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
NOON = "2023-11-16 12:00:00"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
MOON = '{"timestamp": 5, "input_length": 513, "output_length": 2, "hash_ids": [0, 1]}\n'
TALK = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
MANY = "9" * 5000


def moon(**changed):
    fields = {"timestamp": "6", "input_length": "1", "output_length": "1", "hash_ids": "[]"}
    fields |= changed
    return "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n"


CASES = [
    (read_azure, "", "line 1: found nothing; expected a header with TIMESTAMP, ContextTokens"),
    (read_azure, " \r\n\n", "line 1: found nothing"),
    (read_azure, AZURE, "line 1: found no row after the header; expected one per request"),
    (read_azure, "\n" + AZURE.replace("Context", ""), "line 2: found .* without ContextTokens;"),
    (read_azure, AZURE + f"{NOON},3,four\n", r"line 2, column 3 \(GeneratedTokens\): found 'four'; "
     "expected a whole number from 1 to 100000000"),
    (read_azure, AZURE + f"{NOON},3,0\n", r"line 2, column 3 \(GeneratedTokens\): found '0'"),
    (read_azure, AZURE + f"{NOON},-3,4\n", r"line 2, column 2 \(ContextTokens\): found '-3'"),
    (read_azure, AZURE + f"{NOON},1_0,4\n", "column 2 .*found '1_0'"),
    (read_azure, AZURE + f"{NOON},٣,4\n", "column 2 .*found '٣'"),
    (read_azure, AZURE + f"{NOON},3.0,4\n", "column 2 .*found '3.0'"),
    (read_azure, AZURE + f"{NOON},,4\n", "column 2 .*found ''"),
    (read_azure, AZURE + f"{NOON},100000001,4\n", "column 2 .*found '100000001'"),
    (read_azure, AZURE + f"{NOON},{MANY},4\n", r"column 2 .*found '9{39}\.\.\.; expected"),
    (read_azure, AZURE + f"{NOON},3,4\nnoon,3,4\n", r"line 3, column 1 \(TIMESTAMP\): found 'noon';"
     " expected a time as 2023-11-16"),
    (read_azure, AZURE + "2023-13-16 12:00:00,3,4\n", "line 2, column 1 .*found '2023-13-16"),
    (read_azure, AZURE + "0001-01-01 00:00:00+23:59,3,4\n9999-12-31 23:59:59-23:59,3,x\n",
     "line 3, column 3"),
    (read_azure, AZURE + f"{NOON},3,4\n2023-11-16 11:59:59,3,4\n",
     "line 3, column 1 .*found '2023-11-16 11:59:59'; expected a time not before"),
    (read_azure, AZURE + f"{NOON}.5,3,4\n\n{NOON}.4999999,3,4\n", "line 4, column 1"),
    (read_azure, AZURE + f"{NOON},3,4\n{NOON},3", "line 3: found 2 cells; expected 3 as in the"),
    (read_azure, AZURE + f"{NOON},3,4,5\n", "line 2: found 4 cells"),
    (read_azure, AZURE + f'"{NOON},3,4\n', "line 2: found .*expected cells separated by commas"),
    (read_azure, AZURE.encode() + b"2023-\xe9,3,4\n", "line 2, column 6: found the byte 0xe9; "
     "expected UTF-8 text"),
    (read_azure, "TIMESTAMP".encode("utf-16"), "line 1, column 1: found the byte 0xff"),
    (read_azure, b"\xef\xbb\xbf\xc3\xa9\n\xc3\xa9\xff", "line 2, column 2: found the byte 0xff"),
    (read_azure, AZURE + f"{NOON},\x003,4\n", r"column 2 .*found '\\x003'"),
    (read_burstgpt, BURST.replace("Model,", ""), "without Model"),
    (read_burstgpt, BURST + "x,GPT-4,1,2,3,API log\n", r"line 2, column 1 \(Timestamp\): found 'x';"
     " expected seconds from 0"),
    (read_burstgpt, BURST + "nan,GPT-4,1,2,3,API log\n", "found 'nan'"),
    (read_burstgpt, BURST + "1e400,GPT-4,1,2,3,API log\n", "found '1e400'"),
    (read_burstgpt, BURST + "-1,GPT-4,1,2,3,API log\n", "found '-1'"),
    (read_burstgpt, BURST + "2,GPT-4,1,2,3,API log\n1,GPT-4,1,2,3,API log\n",
     "line 3, column 1 .*not before"),
    (read_burstgpt, BURST + "2,GPT-4,0,2,2,API log\n", r"column 3 \(Request tokens\): found '0'; "
     "expected a whole number from 1"),
    (read_burstgpt, BURST + "2,GPT-4,1,-2,2,API log\n", r"column 4 \(Response tokens\): .* from 0"),
    (read_burstgpt, BURST + "2,GPT-4,1,0,1,API log\n", "no request that succeeded, 1 that failed"),
    (read_burstgpt, BURST + "2,GPT-4,1,2", "line 2: found 4 cells; expected 6"),
    (read_mooncake, "", "line 1: found nothing; expected one JSON object a line"),
    (read_mooncake, MOON + MOON[:40], "line 2, column 39: found .*; expected a JSON object"),
    (read_mooncake, MOON + "[]\n", r"line 2, column 1: found '\[\]'"),
    (read_mooncake, MOON + MOON.strip() * 2, "line 2, column 78: found .*Extra data"),
    (read_mooncake, "[" * 100_000, "line 1, column 1: .*recursion"),
    (read_mooncake, MOON + moon(timestamp=MANY), "line 2, column 1: .*digits"),
    (read_mooncake, MOON + moon(timestamp=4), r"line 2, column 2 \(timestamp\): found 4.0; "
     "expected a time not before"),
    (read_mooncake, moon(timestamp="NaN"), r"column 2 \(timestamp\): found nan"),
    (read_mooncake, moon(timestamp="-1"), "found -1; expected milliseconds from 0"),
    (read_mooncake, moon(timestamp="1e300"), "found 1e[+]300"),
    (read_mooncake, moon(timestamp="true"), "found True"),
    (read_mooncake, moon(input_length="0"), r"column 18 \(input_length\): found 0; expected a"),
    (read_mooncake, moon(input_length="1.5"), "found 1.5"),
    (read_mooncake, moon(output_length="true"), r"\(output_length\): found True"),
    (read_mooncake, moon(output_length="null"), "found None"),
    (read_mooncake, moon(output_length="1" + "0" * 400), r"found 10{39}\.\.\.;"),
    (read_mooncake, moon(hash_ids="3"), r"\(hash_ids\): found 3; expected a list of at most 1"),
    (read_mooncake, moon(hash_ids="[1, 2]"), r"found \[1, 2\]; expected a list of at most 1"),
    (read_mooncake, moon(hash_ids="[-1]"), "found -1; expected numbers of blocks from 0"),
    (read_mooncake, moon(hash_ids='["a"]'), "found 'a'"),
    (read_mooncake, MOON + MOON.replace("output", "out"), "line 2: found no output_length, but "
     "'timestamp, input_length"),
    (read_mooncake, MOON.encode() + b'{"a": "\xff"}', "line 2, column 8: found the byte 0xff"),
    (read_sharegpt, "", "line 1, column 1: found the end of the file; expected a list"),
    (read_sharegpt, "[]", "found no conversation with a question and its answer"),
    (read_sharegpt, TALK, "line 1, column 1: found '{'; expected a list of conversations"),
    (read_sharegpt, f"[{TALK}\n {TALK}]", "line 2, column 2: found '{'; expected a comma, or ]"),
    (read_sharegpt, f"[{TALK},\n]", "line 2, column 1: found ']'; expected a conversation after"),
    (read_sharegpt, f"[{TALK}]\nx", "line 2, column 1: found 'x'; expected nothing after the list"),
    (read_sharegpt, f"[{TALK},\n{TALK[:30]}", r"line 2, column \d+: found .*; expected correct"),
    (read_sharegpt, f"[{TALK},", "line 1, column 86: found expecting value"),
    (read_sharegpt, "[" * 100_000, "line 1, column 2: .*recursion"),
    (read_sharegpt, f"[{TALK}, {MANY}]", "column 87: .*digits"),
    (read_sharegpt, f"[{TALK},\n  7]", 'line 2, column 3: found 7; expected an object as {"conv'),
    (read_sharegpt, '[{"id": 1}]', r"found {'id': 1}; expected an object as"),
    (read_sharegpt, '[{"conversations": 1}]', r"column 2 \(conversations\): found 1"),
    (read_sharegpt, '[{"conversations": ["a"]}]', r"\(conversations\): found 'a'"),
    (read_sharegpt, '[{"conversations": [{"value": "a"}]}]', r"\(from\): found None"),
    (read_sharegpt, '[{"conversations": [{"from": "gpt", "value": 3}]}]', r"\(value\): found 3"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "content", "message"), CASES)
def test_what_is_wrong_is_said_with_its_place(tmp_path, read, content, message):
    path = tmp_path / "some.trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WorkloadFileError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 400
    assert caught.value.path == path


READERS = {
    "azure.csv": read_azure,
    "mooncake.jsonl": read_mooncake,
    "burstgpt.csv": read_burstgpt,
    "sharegpt.json": read_sharegpt,
}


@pytest.mark.parametrize("read", READERS.values())
def test_a_file_that_is_not_there_or_none(tmp_path, read):
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(
            WorkloadFileError, match=r"found no readable file .*; expected a file of"
        ):
            read(path)


@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_no_damage_to_a_file_ends_in_another_error(tmp_path, name, read):
    """A file with a few bytes changed, removed or added is read, or refused with a place."""
    whole = b"".join(SAMPLES[name]().encode().splitlines(keepends=True)[:12])
    draw = random.Random(name)
    path = tmp_path / name
    alphabet = (string.printable * 3).encode() + bytes(range(256))
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            length = draw.choice((0, 1, 1, 2, 30))
            data[at : at + length] = bytes(draw.choices(alphabet, k=draw.choice((0, 1, 1, 3))))
        path.write_bytes(data)
        try:
            workload = read(path)
        except WorkloadFileError:
            refused += 1
        else:
            times = [one.at_s for one in workload.requests]
            assert times == sorted(times)
            assert min(min(one.prompt, one.output) for one in workload.requests) >= 1
    assert refused > 15
