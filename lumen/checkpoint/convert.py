"""Converts a model to the native format in a process of its own.

Writing with Orbax initialises JAX's backends, and on a GPU host that reserves most of the memory
of every device. Whoever converts on behalf of a server therefore does it in a child process that
sees the CPU only. Run as `python -m lumen.checkpoint.convert SOURCE TARGET DTYPE`; prints
"done total" after each tensor, and an error as the last line on standard error.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lumen.checkpoint.native_writer import OnTensor, write_native
from lumen.checkpoint.opening import open_source, open_tokenizer
from lumen.errors import CheckpointError, LumenError


def convert_in_child(
    source: Path, target: Path, dtype: str, on_tensor: OnTensor | None = None
) -> None:
    """Convert the model at `source` into a native checkpoint at `target`.

    Raises CheckpointError with the child's last words if it fails.
    """
    command = [sys.executable, "-m", "lumen.checkpoint.convert", str(source), str(target), dtype]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                done, _, total = line.partition(" ")
                if on_tensor is not None and done.isdigit():
                    on_tensor(int(done), int(total))
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit status {child.returncode}"])[-1]
            raise CheckpointError(f"Converting {source} failed: {last}")


def main() -> None:
    """The child: convert as the command line says."""
    source, target, dtype = sys.argv[1:]
    path = Path(source)
    try:
        write_native(
            open_source(path),
            Path(target),
            open_tokenizer(path),
            dtype,
            on_tensor=lambda done, total: print(done, total, flush=True),
        )
    except LumenError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
