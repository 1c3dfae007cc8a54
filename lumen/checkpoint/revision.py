"""A cheap, stable fingerprint of the weights in a set of files.

The prefix cache keys KV blocks by it, so two different models must not share one and a restart
must not change it. Hashing every byte of a large checkpoint would delay the start by minutes;
instead the hash covers the configuration, every tensor's name, shape and type, each file's size
and evenly spaced samples of its content. Weights that differ only between the samples while all
else is equal are not told apart; retrained or re-quantised weights differ everywhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lumen.config import ModelConfig

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def config_identity(config: ModelConfig) -> bytes:
    """The configuration as bytes to hash.

    How layers are grouped into units is left out, since it does not change the weights.
    """
    identity = dataclasses.asdict(config)
    del identity["unit_layers"]
    return json.dumps(identity, sort_keys=True).encode()


def fingerprint(
    config: ModelConfig, tensors: Mapping[str, tuple[str, tuple[int, ...]]], files: Iterable[Path]
) -> str:
    """32 hexadecimal digits of a sha256 over configuration, headers, sizes and samples.

    tensors: name to (stored type, shape). files: in an order that does not depend on the
    directory listing; their paths are not part of the fingerprint.
    """
    digest = hashlib.sha256(config_identity(config))
    digest.update(json.dumps(sorted((n, d, list(s)) for n, (d, s) in tensors.items())).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"|{size}|".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE)
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
