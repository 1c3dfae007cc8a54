"""Converts a model to Lumen's native format or to a Hugging Face directory.

    python tools/convert_checkpoint.py --source=DIR_OR_GGUF --target=DIR --dtype=bfloat16

Reads native checkpoints, Hugging Face directories, GGUF files and random:PRESET.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags
from rich.progress import MofNCompleteColumn, Progress

from lumen.checkpoint.casting import DTYPES
from lumen.checkpoint.huggingface_writer import write_huggingface
from lumen.checkpoint.native_writer import write_native
from lumen.errors import LumenError
from lumen.model_spec import resolve_model

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "What to convert: a directory (native or Hugging Face), a .gguf file or random:PRESET.",
    required=True,
)
_TARGET = flags.DEFINE_string(
    "target", None, "Directory to write; it must not exist yet.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "native",
    ["native", "huggingface"],
    "native: Orbax, restorable unit by unit. huggingface: config.json and safetensors.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Number type of the weights written; by default that of the source.",
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who serve
    try:
        convert(_SOURCE.value, Path(_TARGET.value), _FORMAT.value, _DTYPE.value)
    except LumenError as error:
        sys.exit(f"convert_checkpoint: {error}")


def convert(source: str, target: Path, form: str, dtype: str | None) -> None:
    """Convert, with a progress bar. form: "native" or "huggingface". Raises LumenError."""
    model = resolve_model(source)
    write = write_native if form == "native" else write_huggingface
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task(f"Converting {model.model_id}", total=None)
        write(
            model.source,
            target,
            model.tokenizer,
            dtype,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"Wrote {target}")


if __name__ == "__main__":
    app.run(main)
