"""Launches Triton kernels as XLA launches its own: a kernel becomes a part of the program that calls it.

Triton turns a kernel's Python into its intermediate representation (TTIR), and XLA compiles that with the rest of the
program, as it compiles Pallas kernels for Triton. The call that jax-triton makes goes through XLA's foreign function
interface instead. That costs twice there: XLA asks each such function before every run of a program, and a CUDA graph
cannot hold it as it is, but is given what it launches anew whenever an address changes.
"""

import functools
import re
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TARGET = "__gpu$xla.gpu.triton"
_POINTER_TO = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "float8_e4m3fn": "*fp8e4nv",
    "int32": "*i32",
    "int8": "*i8",
}
TRITON_TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
"""By dtypes' names, as kernels take them for constants."""
_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)|^#loc.*\n", re.MULTILINE)
_PARAMETER = re.compile(r"(%[\w$.-]+): ([^,{}]+?)( \{[^}]*\})?(?:, |$)")


def triton_call(*args, kernel, out_type, grid: tuple[int, ...], num_warps: int, num_stages: int, **constants):
    """Calls a Triton kernel, whose parameters are ``args``, the outputs, and ``constants``.

    Args:
      args: arrays; integers, which are compiled in; references (``jax.new_ref``) to arrays that the kernel changes; and
        None for what a kernel is compiled without.
      kernel: decorated with ``triton.jit``; parameters that are not in ``constants`` come in the order above.
      out_type: a pytree of shapes and dtypes, of arrays that the kernel writes; and None, as in ``args``.
      grid: up to three numbers of programs.
      num_warps, num_stages: as Triton has them.
      constants: values of the ``tl.constexpr`` parameters, hashable.

    Returns:
      Arrays as of ``out_type``.
    """
    constants |= absent(kernel, args, out_type, constants)
    args = tuple(arg for arg in args if arg is not None)
    outputs, tree = jax.tree.flatten(out_type)
    pointers = [arg for arg in args if not isinstance(arg, int)]
    refs = {i: arg for i, arg in enumerate(pointers) if isinstance(arg, jax.Ref)}
    operands = [arg[...] if i in refs else arg for i, arg in enumerate(pointers)]
    changed = [jax.ShapeDtypeStruct(ref.shape, ref.dtype) for ref in refs.values()]
    aliases = {i: len(outputs) + n for n, i in enumerate(refs)}
    parameters = [arg if isinstance(arg, int) else _POINTER_TO[arg.dtype.name] for arg in (*args, *outputs)]
    types = tuple("i32" if isinstance(parameter, int) else parameter for parameter in parameters)
    text = _ttir(kernel, types, tuple(sorted(constants.items())), num_warps, num_stages, _capability())
    text = _of_pointers(text, kernel.__name__, parameters, [_POINTER_TO[ref.dtype.name] for ref in refs.values()])
    x, y, z = (*grid, 1, 1)[:3]
    call = jax.ffi.ffi_call(_TARGET, [*outputs, *changed], input_output_aliases=aliases)
    results = call(
        *operands,
        name=kernel.__name__,
        ir=text,
        num_stages=np.int32(num_stages),
        num_warps=np.int32(num_warps),
        grid_x=np.int32(x),
        grid_y=np.int32(y),
        grid_z=np.int32(z),
        debug=False,
    )
    for ref, result in zip(refs.values(), results[len(outputs) :], strict=True):
        ref[...] = result
    return jax.tree.unflatten(tree, results[: len(outputs)])


def absent(kernel, args: tuple, out_type, constants: dict[str, Any]) -> dict[str, None]:
    """The kernel's parameters for which ``triton_call`` is given None, by name."""
    outputs = jax.tree.leaves(out_type, is_leaf=lambda leaf: leaf is None)
    names = (name for name in kernel.arg_names if name not in constants)
    return {name: None for name, value in zip(names, (*args, *outputs), strict=True) if value is None}


@functools.cache
def _ttir(
    kernel,
    types: tuple[str, ...],
    constants: tuple[tuple[str, Hashable], ...],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> str:
    """The kernel's TTIR, with a parameter for each of ``types``.

    It takes a tenth of a second. It does not depend on what the integers are, so steps of all sizes share it.
    """
    values: dict[str, Any] = dict(constants)
    names = [name for name in kernel.arg_names if name not in values]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(values, "constexpr")
    places = [kernel.arg_names.index(name) for name in names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in zip(places, types, strict=True) if kind != "i32"}
    backend = triton.compiler.make_backend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({"num_warps": num_warps, "num_stages": num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, values, aligned)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(backend.target, options, codegen, modules, context)
    module = backend.make_ttir(module, {}, options, capability)
    return _LOCATION.sub("", str(module))


def _of_pointers(text: str, name: str, parameters: Sequence[int | str], changed: Sequence[str]) -> str:
    """The same as a function of pointers alone: to the operands, the outputs, and the operands that it changes.

    Integers are compiled in. XLA passes what is changed once more, as results, so there are parameters for them too.
    """
    head, opening, rest = text.partition(f"tt.func public @{name}(")
    listed, closing, body = rest.partition(") attributes {noinline = false} {\n")
    assert opening and closing, "Triton prints a function so"
    found = _PARAMETER.findall(listed)
    assert len(found) == len(parameters), "all parameters are found"
    kept, compiled_in = [], []
    for (variable, kind, attributes), value in zip(found, parameters, strict=True):
        if isinstance(value, int):
            compiled_in.append(f"    {variable} = arith.constant {value} : {kind}\n")
        else:
            kept.append(f"{variable}: {kind}{attributes}")
    kept += [f"%changed_{i}: !tt.ptr<{_MLIR[kind]}>" for i, kind in enumerate(changed)]
    return f"{head}{opening}{', '.join(kept)}{closing}{''.join(compiled_in)}{body}"


_MLIR = {"*bf16": "bf16", "*fp16": "f16", "*fp32": "f32", "*i32": "i32", "*i8": "i8"}


def _capability() -> int:
    """Of this process's GPU, such as 90; 90 where there is none, as when lowering for CUDA on a CPU."""
    device = jax.devices()[0]
    return int(device.compute_capability.replace(".", "")) if device.platform == "gpu" else 90
