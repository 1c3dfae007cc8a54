"""Generate the message classes in `serving/api/proto/` from the .proto files beside it.

    python tools/generate_protos.py          # rewrites serving/api/proto/
    python tools/generate_protos.py DIR      # writes DIR/serving/api/proto/ (the test compares)

protoc derives a module's imports from the path a file is included under. The files are therefore
included under the virtual path `serving/api/proto`, and nothing has to be edited afterwards.
"""

import importlib.resources
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "serving" / "api"
PACKAGE = "serving/api/proto"


def generate(out: Path) -> list[Path]:
    """Write the modules under `out`/serving/api/proto and return their paths, sorted.

    Raises RuntimeError if protoc refuses a file (it prints why).
    """
    names = sorted(path.name for path in SOURCES.glob("*.proto"))
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    standard = importlib.resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PACKAGE}={SOURCES}",
            f"--proto_path={standard}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *(f"{PACKAGE}/{name}" for name in names),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}; its message is above")
    return sorted((out / PACKAGE).glob("*_pb2*"))


def main() -> None:
    """Generate into the repository, or into the folder named by the only argument."""
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT):
        print(path)


if __name__ == "__main__":
    main()
