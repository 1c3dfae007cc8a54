"""The operations under measurement, found at run time so that a missing one is only a table row."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations with the signatures of `lumen_kernels`; one that does not exist raises
    NotImplementedError when called."""

    decode: Operation
    decode_schedule: Operation
    prefill: Operation
    kv_write: Operation
    rotary_write: Operation
    gather: Operation
    scatter: Operation
    copy: Operation
    merge: Operation
    matmul: Operation
    silu_gated: Operation
    add_rms_norm: Operation
    dense_chain: Operation


def lumen_operations() -> Operations:
    """Those of this checkout."""
    return Operations(
        decode=_operation("paged_attention", "decode"),
        decode_schedule=_operation("paged_attention", "decode_schedule"),
        prefill=_operation("paged_attention", "prefill"),
        kv_write=_operation("kv_write", "write"),
        rotary_write=_operation("rotary_write", "write"),
        gather=_operation("block_copy", "gather"),
        scatter=_operation("block_copy", "scatter"),
        copy=_operation("block_copy", "copy"),
        merge=_operation("attention_merge", "merge"),
        matmul=_operation("matmul", "matmul"),
        silu_gated=_operation("matmul", "silu_gated"),
        add_rms_norm=_operation("add_norm", "add_rms_norm"),
        dense_chain=_operation("dense_chain", "dense_chain"),
    )


def _operation(package: str, name: str) -> Operation:
    try:
        found: Operation = getattr(importlib.import_module(f"lumen_kernels.{package}"), name)
    except (ImportError, AttributeError) as error:
        problem = str(error)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"lumen_kernels.{package}.{name} is missing: {problem}")

        return missing
    return found
