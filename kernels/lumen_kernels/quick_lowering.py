"""Less work in lowering kernels for NVIDIA GPUs.

Mosaic GPU's layout inference (jax 0.11) puts variables in the order of their names. A name is that
of a value in the text of its kernel, and for each one all values of the kernel are numbered anew.
Here they are numbered once per kernel: names, order and what is made of them stay the same. For the
units of an 8B model, lowering takes a fifth to a third less.

And every kernel has a number in it, for files that nobody asked for. Without it, XLA recognises a
kernel that it has compiled before in this process, for another program.
"""

import io
from types import SimpleNamespace
from typing import Any

from jax.experimental.mosaic.gpu import layout_inference
from jaxlib.mlir import ir

_FILE = "mosaic_gpu.dump_basename"


def install() -> None:
    """From now on, in this process. Where JAX is another than is known here, nothing happens."""
    infer = getattr(layout_inference, "infer_layout", None)
    site = getattr(layout_inference, "ValueSite", None)
    if infer is None or site is None or hasattr(infer, "quick"):
        return
    name = site.__str__

    def infer_layout(module: ir.Module, *arguments: Any, **options: Any) -> Any:
        state = ir.AsmState(module.operation)

        def quick_name(self: Any) -> str:
            operation = _Numbered(self.operation, state)
            named = SimpleNamespace(operation=operation, type=self.type, index=self.index)
            found: str = name(named)
            return found

        attributes = module.operation.attributes
        if _FILE in attributes:
            name_in_file, _, _ = ir.StringAttr(attributes[_FILE]).value.rpartition("_")
            attributes[_FILE] = ir.StringAttr.get(name_in_file, module.context)
        site.__str__ = quick_name
        try:
            return infer(module, *arguments, **options)
        finally:
            site.__str__ = name

    infer_layout.quick = True  # type: ignore[attr-defined]
    layout_inference.infer_layout = infer_layout


class _Numbered:
    """An operation that is written down with the numbers that all values have already."""

    def __init__(self, operation: Any, state: ir.AsmState) -> None:
        self._operation, self._state = operation, state

    def __str__(self) -> str:
        text = io.StringIO()
        self._operation.operation.print(self._state, file=text)
        return text.getvalue()
