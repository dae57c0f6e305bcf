"""Reads the Triton kernels that lowered programs hand to XLA."""

import re

from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect


def kernels_in(text: str) -> list[str]:
    """Each kernel of a lowered program, read by the dialect that JAX has of its own, as XLA reads it, and printed."""
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    kernels = []
    for code in re.findall(r'\bir = "((?:[^"\\]|\\.)*)"', text):
        code = re.sub(r"\\([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), code).replace('\\"', '"')
        # XLA has this operation, JAX's copy has not.
        code = code.replace("ttg.barrier all", "")
        with context:
            kernels.append(str(ir.Module.parse(code)))
    return kernels
