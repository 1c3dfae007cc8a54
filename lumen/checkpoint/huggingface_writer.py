"""Writes any source as a Hugging Face directory that transformers reads."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import save_file

from lumen.checkpoint.casting import cast, common_dtype
from lumen.checkpoint.layout import required_shapes
from lumen.checkpoint.native import Tensors
from lumen.checkpoint.native_writer import OnTensor, partial_path
from lumen.checkpoint.validation import check
from lumen.errors import CheckpointError
from lumen.hf_config import hf_config_dict
from lumen.tensor_source import TensorSource
from lumen.tokenizer import Tokenizer

SHARD_BYTES = 1 << 30


def write_huggingface(
    source: TensorSource,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    on_tensor: OnTensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert a source into config.json and safetensors at `directory`, which must not exist yet.

    One shard, about `shard_bytes`, is in memory at a time; several shards get an index. Written
    to a temporary directory beside the target and renamed at the end. dtype: "float32",
    "bfloat16" or "float16"; None keeps what is stored.

    Raises CheckpointError if the source does not match its configuration, a value does not fit
    the dtype, or the target exists; ModelConfigError if the format cannot express the model.
    """
    check(source)
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; choose another place or remove it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        dtype_name = _write_weights(source, partial, dtype, on_tensor, shard_bytes)
        # "mixed" is nothing transformers knows; it then keeps what each tensor says.
        config = hf_config_dict(source.config, "float32" if dtype_name == "mixed" else dtype_name)
        _write_json(partial / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(partial)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(
    source: TensorSource,
    folder: Path,
    dtype: str | None,
    on_tensor: OnTensor | None,
    shard_bytes: int,
) -> str:
    names = list(required_shapes(source.config))
    shards: list[list[str]] = []
    shard: Tensors = {}
    dtypes: set[str] = set()
    size = total = 0

    def write_shard() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for done, name in enumerate(names, start=1):
        tensor = cast(name, source.read(name), dtype)
        if shard and size + tensor.nbytes > shard_bytes:
            write_shard()
            size = 0
        shard[name] = tensor
        dtypes.add(tensor.dtype.name)
        size += tensor.nbytes
        total += tensor.nbytes
        if on_tensor is not None:
            on_tensor(done, len(names))
    write_shard()
    _name_shards(folder, shards, total)
    return common_dtype(dtypes)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards the names transformers looks for, which contain their number."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for index, tensors in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / name)
        where |= dict.fromkeys(tensors, name)
    index_content = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index_content)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
