"""Interprets or compiles Triton kernels on the CPU, where the code under test calls ``triton_call``.

To interpret, ``TRITON_INTERPRET=1`` must be in the environment before the first import of the kernels. The
interpreter's product of bfloat16 blocks is wrong: give it float32 or float16. So is its rounding to float8, which drops
what is carried into the exponent: that is done here in its place.
"""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import ml_dtypes
import numpy as np
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import interpreter

from pallas_kernels.launch import absent

TRITON_DTYPE = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8e4nv",
    np.dtype(np.int32): "i32",
    np.dtype(np.int8): "i8",
}


class _Tensor:
    """As much of a tensor of the interpreter's usual framework as it asks for."""

    def __init__(self, array):
        self.array = array
        self.dtype = TRITON_DTYPE[array.dtype]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, _):
        """The interpreter wrote into ``array`` itself."""

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def element_size(self):
        return self.array.itemsize


def tensor_of(array: np.ndarray):
    """An argument for an interpreted kernel, which writes into the array itself."""
    return _Tensor(array)


class _Ref:
    def __init__(self, array):
        self.array = np.array(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype


def _to_tensor(argument):
    if isinstance(argument, tuple):
        return tuple(map(_to_tensor, argument))
    if isinstance(argument, _Ref):
        return _Tensor(argument.array)
    if isinstance(argument, jax.Array | np.ndarray):
        return _Tensor(np.array(argument))
    return argument


def _interpret(*args, kernel, out_type, grid, num_warps, num_stages, **metaparams):
    """As ``launch.triton_call``, with outputs that hold NaN before."""
    metaparams |= absent(kernel, args, out_type, metaparams)
    args = tuple(arg for arg in args if arg is not None)
    leaves, tree = jax.tree.flatten(out_type)
    outputs = [np.full(leaf.shape, np.nan, leaf.dtype) for leaf in leaves]
    names = [name for name in kernel.arg_names if name not in metaparams]
    values = zip(names, [*map(_to_tensor, args), *map(_Tensor, outputs)], strict=True)
    kernel[grid](**dict(values), **metaparams)
    return jax.tree.unflatten(tree, [jax.numpy.asarray(output) for output in outputs])


_convert_as_it_does = interpreter._convert_float


def _convert_float(values, from_type, to_type, rounding):
    if (from_type.name, to_type.name) == ("fp32", "fp8e4nv"):
        return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return _convert_as_it_does(values, from_type, to_type, rounding)


def assert_interpreted(file: str, chosen: str, num_tests: int) -> None:
    """Runs tests of a file, chosen as by pytest's -k, in a process where kernels interpret: all must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stdout
    assert f"{num_tests} passed" in result.stdout


@contextlib.contextmanager
def interpreted(module):
    """Inside, ``module`` runs its kernels in the interpreter, operation by operation."""
    stub = SimpleNamespace(triton_call=_interpret)
    with (
        mock.patch.object(module, "launch", stub),
        mock.patch.object(interpreter, "_convert_float", _convert_float),
        mock.patch.object(jax, "new_ref", _Ref),
        mock.patch.object(jax, "freeze", lambda ref: jax.numpy.asarray(ref.array)),
    ):
        yield


@contextlib.contextmanager
def compiled(module, capability):
    """Inside, ``module`` compiles its kernels for a GPU and runs none; yields a list of their (name, code)."""
    kernels = []

    def call(*args, kernel, out_type, grid, num_warps, num_stages, **constants):
        assert isinstance(grid, tuple) and all(isinstance(n, int) for n in grid)
        constants |= absent(kernel, args, out_type, constants)
        values = (*(arg for arg in args if arg is not None), *jax.tree.leaves(out_type))
        names = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(names, map(_signature, values), strict=True))
        places = [kernel.arg_names.index(name) for name in names]
        paths = [path for i, value in zip(places, values, strict=True) for path in _arrays(value, (i,))]
        attributes = {path: [["tt.divisibility", 16]] for path in paths}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        kernels.append((kernel.__name__, compile(source, GPUTarget("cuda", capability, 32), options)))
        return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), out_type)

    with mock.patch.object(module, "launch", SimpleNamespace(triton_call=call)):
        yield kernels


def _signature(value):
    if isinstance(value, tuple):
        return tuple(map(_signature, value))
    return "i32" if isinstance(value, int) else "*" + TRITON_DTYPE[np.dtype(value.dtype)]


def _arrays(value, path):
    if isinstance(value, tuple):
        return [leaf for i, element in enumerate(value) for leaf in _arrays(element, (*path, i))]
    return [] if isinstance(value, int) else [path]
