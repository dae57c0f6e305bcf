"""Launches Mosaic GPU kernels that are lowered once, for programs of any size.

Pallas lowers a kernel anew wherever a program calls it with other shapes: half a second for one of attention, in each
of the dozens of programs that a server compiles. Here the kernel is lowered for arrays longer than any that come, and
every program is given that same kernel. XLA then compiles it once for all of them, too, as it knows kernels by a hash.

What this needs of JAX, where an upgrade may break it; ``tests/kernels/test_mosaic_launch.py`` tells:

* A function that does nothing but launch a Mosaic kernel lowers to one ``stablehlo.custom_call``, on the function's
  arguments in their order, with row-major layouts and no aliases.
* Everything about the kernel is in the attribute ``mhlo.backend_config`` of that call: byte strings and booleans.
* ``jax.ffi.ffi_call`` makes the same call of the same attributes.
"""

import functools
from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

import jax
from jax.interpreters import mlir

_LENGTH = 1 << 16
"""For arrays of what length kernels are lowered; where one is longer, for the next power of two."""


def mosaic_call(
    launch: Callable[..., jax.Array],
    *operands: jax.Array,
    any_length: Collection[int],
    length: int,
    **static: Hashable,
) -> jax.Array:
    """Returns ``launch(*operands, **static)``, by a kernel that is lowered once for operands of all lengths.

    The kernel is told of longer arrays than lie in memory. So it must learn from its operands how much there is, and
    must not read or write past that; its grid must not depend on lengths either.

    Args:
      launch: a function of a module that does nothing but launch a Mosaic kernel (``plgpu.kernel``), with one output.
      operands: arrays.
      any_length: which operands may have a first axis of another length in another call.
      length: of the output's first axis; another in another call.
      static: keyword arguments of ``launch``.

    Raises:
      RuntimeError: ``launch`` does something else, or JAX lowers it to what this module does not know.
    """
    shapes = [_lengthened(x.shape) if i in any_length else x.shape for i, x in enumerate(operands)]
    types = tuple((shape, x.dtype) for shape, x in zip(shapes, operands, strict=True))
    kernel = _lowered(launch, types, tuple(sorted(static.items())))
    out_type = jax.ShapeDtypeStruct((length, *kernel.out_type.shape[1:]), kernel.out_type.dtype)
    return jax.ffi.ffi_call(kernel.target, out_type)(*operands, **kernel.attributes)


class _Kernel(NamedTuple):
    """A lowered kernel: which function of XLA runs it, all that this is told, and the output as lowered for."""

    target: str
    attributes: dict[str, bytes | bool]
    out_type: jax.ShapeDtypeStruct


def _lengthened(shape: tuple[int, ...]) -> tuple[int, ...]:
    return max(_LENGTH, 1 << (shape[0] - 1).bit_length()), *shape[1:]


@functools.cache
def _lowered(launch: Callable, types: tuple, static: tuple[tuple[str, Any], ...]) -> _Kernel:
    operands = [jax.ShapeDtypeStruct(*of_one) for of_one in types]
    traced = jax.jit(functools.partial(launch, **dict(static))).trace(*operands)
    module: Any = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    (block,) = module.body.operations[0].regions[0].blocks
    call, *rest = block.operations
    if not (
        call.operation.name == "stablehlo.custom_call"
        and list(call.operands) == list(block.arguments)
        and len(call.operands) == len(operands)
        and len(call.results) == 1
        and len(call.attributes["output_operand_aliases"]) == 0
        and [list(after.operands) for after in rest] == [list(call.results)]
    ):
        raise RuntimeError(
            f"{launch.__name__} must lower to a custom call on all of its operands, in order, and return the one result"
            f"; got {[operation.operation.name for operation in block.operations]}: launch one Mosaic kernel and do "
            "nothing else, and where JAX was upgraded see what pallas_kernels/mosaic_launch.py needs of it"
        )
    attributes = {entry.name: _value(entry.attr) for entry in call.attributes["mhlo.backend_config"]}
    return _Kernel(call.attributes["call_target_name"].value, attributes, traced.out_info)


def _value(attribute) -> bytes | bool:
    if isinstance(attribute, mlir.ir.StringAttr):
        return attribute.value_bytes
    if isinstance(attribute, mlir.ir.BoolAttr):
        return attribute.value
    raise RuntimeError(
        f"attributes of a Mosaic kernel's call must be byte strings and booleans, got {attribute}: where JAX was"
        " upgraded see what pallas_kernels/mosaic_launch.py needs of it"
    )
