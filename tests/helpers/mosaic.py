"""Reads the Mosaic kernels that lowered programs hand to XLA."""

import re
from typing import NamedTuple

import jax
from jax.experimental.mosaic.gpu import dialect
from jax.interpreters import mlir
from jaxlib.mlir import ir


class Kernel(NamedTuple):
    """A call of a kernel.

    Attributes:
      code: the kernel as XLA gets it, a hash of it first.
      call: the rest of the call, as MLIR prints it.
    """

    code: tuple[bytes, bytes]
    call: str


def kernels_in(lowered: jax.stages.Lowered) -> list[Kernel]:
    """Each call of a program, in order."""
    found = []

    def look(operation):
        if "mosaic_gpu" in str(operation.attributes.get("call_target_name")):
            config = operation.attributes["mhlo.backend_config"]
            code = tuple(config[name].value_bytes for name in ("kernel_hash", "module"))
            found.append(Kernel(code, re.sub(r'"(?:[^"\\]|\\.)*"', '""', str(operation))))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


def text_of(kernel: Kernel) -> str:
    """The kernel's code as text, without its name: JAX numbers kernels of one name."""
    # JAX uses a context several times.
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    allowed, context.allow_unregistered_dialects = context.allow_unregistered_dialects, True
    with context:
        text = str(ir.Module.parse(kernel.code[1]))
    context.allow_unregistered_dialects = allowed
    return re.sub(r'mosaic_gpu.dump_basename = "\w*"', "", text)
