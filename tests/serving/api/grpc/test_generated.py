"""The committed message classes are what the .proto files give."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
COMMITTED = ROOT / "serving" / "api" / "proto"


def test_regenerating_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate_protos.py"), str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "serving/api/proto").iterdir()}
    committed = {p.name: p.read_bytes() for p in COMMITTED.glob("*_pb2*")}
    assert fresh == committed, "run tools/generate_protos.py and commit what it writes"


def test_generated_classes_are_packaged_modules():
    assert importlib.util.find_spec("serving.api.proto.lumen_v1_pb2") is not None
    assert importlib.util.find_spec("serving.api.proto.lumen_internal_v1_pb2_grpc") is not None
