"""Products with packed weights without a GPU: the reference, the kernel interpreted, and compiled for GPUs.

The oracle takes the packed words apart bit by bit, and shares no code with what it checks.
"""

import os
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, pack_integers, tuning, unpack_integers
from pallas_kernels.grouped_matmul import triton as kernels_of
from tests.helpers.oracles import stored_integers
from tests.helpers.triton_on_cpu import assert_interpreted, compiled, interpreted

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Product:
    """Rows, inputs, outputs, inputs of a group (all of them without one), and whether groups have zeros."""

    rows: int
    d_in: int
    d_out: int
    group: int
    zeros: bool = False
    dtype: np.dtype = F16
    bits: int = 4

    def build(self, seed: int) -> dict:
        rng = np.random.default_rng(seed)
        shape = (self.d_in // self.group, self.d_out)
        zero = rng.integers(-8, 9, shape).astype(np.int8) if self.zeros else None
        if zero is not None:
            zero[0, 0], zero[-1, -1] = 56, -56
        return {
            # Rows and groups of very different sizes.
            "x": (rng.standard_normal((self.rows, self.d_in)) * rng.uniform(0.1, 2, (self.rows, 1))).astype(self.dtype),
            "weights": rng.integers(-(2**31), 2**31, (self.d_in * self.bits // 256, self.d_out, 8), np.int32),
            "scale": np.exp(rng.normal(-5, 1, shape)).astype(np.float32),
            "zero": zero,
        }


def check(case: Product, seed: int, run, bound: float) -> None:
    """Compares in float64, with the sum of the terms' sizes as the measure of an error."""
    inputs = case.build(seed)
    values = stored_integers(inputs["weights"], case.bits).astype(np.float64)
    zero = 0 if inputs["zero"] is None else np.repeat(inputs["zero"].astype(np.float64), case.group, axis=0)
    weights = (values - zero) * np.repeat(inputs["scale"].astype(np.float64), case.group, axis=0)
    x = inputs["x"].astype(np.float64)
    out = run(**{name: None if array is None else jnp.asarray(array) for name, array in inputs.items()})
    assert out.shape == (case.rows, case.d_out) and out.dtype == case.dtype
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=0)
    error = np.abs(np.asarray(out, np.float64) - x @ weights)
    assert (error <= bound * size).all(), (error / size).max()


ROUNDING = {F32: 2e-6, F16: 2.0**-10, BF16: 2.0**-7}
CASES = {
    "one row, groups of 128": Product(1, 512, 192, 128),
    "seventeen rows, zeros": Product(17, 384, 160, 128, zeros=True),
    "groups of 32": Product(5, 256, 128, 32),
    "groups of 64 with zeros": Product(16, 320, 96, 64, zeros=True),
    "groups of 16": Product(3, 192, 64, 16, zeros=True),
    "groups of 48": Product(3, 192, 64, 48),
    "by channel, inputs no multiple of a tile": Product(33, 448, 72, 448),
    "one group with zeros, odd outputs": Product(2, 192, 33, 192, zeros=True),
    "one block, one output": Product(1, 64, 1, 64),
    "float32": Product(18, 320, 80, 64, zeros=True, dtype=F32),
    "float32, by channel": Product(1, 192, 130, 192, dtype=F32),
    "more rows than a tile": Product(140, 256, 40, 128, zeros=True),
    "eight bits by channel": Product(5, 224, 72, 224, bits=8),
    "eight bits, groups of 32 with zeros": Product(18, 192, 48, 32, zeros=True, bits=8),
    "eight bits, groups of 16": Product(3, 64, 33, 16, bits=8),
    "eight bits, groups of 128, float32": Product(7, 256, 72, 128, zeros=True, dtype=F32, bits=8),
}


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_integer_in_its_place(bits):
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (192, 24))
    packed = np.asarray(pack_integers(jnp.asarray(values, jnp.int8), bits))
    assert packed.shape == (192 * bits // 256, 24, 8) and packed.dtype == np.int32
    np.testing.assert_array_equal(stored_integers(packed, bits), values)
    np.testing.assert_array_equal(unpack_integers(jnp.asarray(packed), bits), values)
    with pytest.raises(ValueError, match=f"multiple of {256 // bits} inputs"):
        pack_integers(jnp.zeros((112, 8), jnp.int8), bits)


@pytest.mark.skipif(INTERPRET, reason="is about the reference")
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES)))
def test_the_reference(seed, name, dtype):
    case = Product(**CASES[name].__dict__ | {"dtype": dtype})
    check(case, seed, partial(jax.jit(grouped_matmul, static_argnames=("dtype", "backend")), dtype=dtype,
                              backend="reference"), ROUNDING[dtype])  # fmt: skip


@pytest.mark.skipif(INTERPRET, reason="is the outer process")
def test_interpreted():
    assert_interpreted(__file__, "test_kernel_interpreted", 2 * len(CASES))


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES)))
def test_kernel_interpreted(seed, name, is_split, monkeypatch):
    def sizes(op, device, key):
        found = tuning.block_sizes(op, device, key)
        return found | {"max_splits": 8 if is_split else 1} if op == "grouped_matmul" else found

    monkeypatch.setattr(kernels_of, "block_sizes", sizes)
    with interpreted(kernels_of):
        check(CASES[name], seed, partial(grouped_matmul, dtype=CASES[name].dtype, backend="triton"),
              ROUNDING[CASES[name].dtype])  # fmt: skip


SHAPES = {  # inputs, outputs, inputs of a group, zeros
    "7B qkv": (4096, 12288, 128, False),
    "8B down, AWQ": (14336, 4096, 128, True),
    "7B down, groups of 32": (11008, 4096, 32, True),
    "SmolLM2, by channel": (576, 1536, 576, False),
}
EIGHT_BITS = (4096, 6144, 4096, False)


def arguments(rows, d_in, d_out, group, zeros, dtype, bits=4):
    of_groups = (d_in // group, d_out)
    return (
        jax.ShapeDtypeStruct((rows, d_in), dtype),
        jax.ShapeDtypeStruct((d_in * bits // 256, d_out, 8), jnp.int32),
        jax.ShapeDtypeStruct(of_groups, jnp.float32),
        jax.ShapeDtypeStruct(of_groups, jnp.int8) if zeros else None,
    )


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(("rows", "dtype"), [(1, BF16), (64, BF16), (128, F16), (512, BF16), (20, F32)])
def test_kernels_compile(rows, dtype, capability, monkeypatch):
    kind = {80: "NVIDIA A100-SXM4-40GB", 86: "NVIDIA A10G", 90: "NVIDIA H200"}[capability]
    monkeypatch.setattr(kernels_of, "device_kind", lambda: kind)
    name = list(SHAPES)[rows % len(SHAPES) if capability == 90 else 1]
    run = partial(grouped_matmul, dtype=dtype, backend="triton")
    with compiled(kernels_of, capability) as kernels:
        (out,) = [jax.eval_shape(run, *arguments(rows, *SHAPES[name], dtype))]
    assert out == jax.ShapeDtypeStruct((rows, SHAPES[name][1]), dtype)
    ((kernel, code),) = kernels
    assert kernel == "_grouped_matmul_kernel"
    assert code.metadata.shared <= {80: 163, 86: 99, 90: 227}[capability] * 1024


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
def test_two_weights_are_unpacked_at_once(monkeypatch):
    """By arithmetic on pairs: a conversion of each number alone would take longer than reading it."""
    monkeypatch.setattr(kernels_of, "device_kind", lambda: "NVIDIA H200")
    with compiled(kernels_of, 90) as kernels:
        run = partial(grouped_matmul, dtype=BF16, backend="triton")
        jax.eval_shape(run, *arguments(1, *SHAPES["8B down, AWQ"], BF16))
        jax.eval_shape(run, *arguments(64, *EIGHT_BITS, BF16, 8))
    for _, code in kernels:
        assert "wgmma.mma_async" in code.asm["ptx"]
        assert "cvt.rn" not in code.asm["ptx"]


def grid_of(rows, d_in, d_out, monkeypatch) -> list[tuple[int, ...]]:
    grids = []

    def call(*_, grid, out_type, **__):
        grids.append(grid)
        return jnp.zeros(out_type.shape, out_type.dtype)

    monkeypatch.setattr(kernels_of, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(kernels_of.launch, "triton_call", call)
    jax.eval_shape(
        partial(grouped_matmul, dtype=BF16, backend="triton"), *arguments(rows, d_in, d_out, 128, False, BF16)
    )
    return grids


@pytest.mark.skipif(INTERPRET, reason="is about the launch")
def test_inputs_are_shared_out_where_outputs_and_rows_do_not_fill_the_gpu(monkeypatch):
    ((rows, columns, splits),) = grid_of(1, 4096, 4096, monkeypatch)
    assert rows == 1 and columns == 32 and splits == 8
    # A third of a wave more would cost as much as a whole one.
    assert grid_of(1, 4096, 12288, monkeypatch) == [(1, 96, 5)]
    # Sums of so many rows would cost more than the multiprocessors that are left idle.
    assert grid_of(512, 4096, 12288, monkeypatch) == [(4, 96, 1)]


def test_what_does_not_fit_is_refused():
    x, packed, scale, zero = (
        jnp.zeros(a.shape, a.dtype) for a in arguments(2, 128, 8, 64, True, BF16)
    )  # fmt: skip
    run = partial(grouped_matmul, dtype=BF16, backend="reference")
    for changed, message in (
        ((x.astype(jnp.int8), packed, scale, zero), "x must be bfloat16, float16 or float32, got int8"),
        ((x[:, :96], packed, scale, zero), "packed weights for 96 inputs must be int32"),
        ((x, packed.astype(jnp.uint32), scale, zero), r"packed weights .* got uint32 \(2, 8, 8\)"),
        ((x, unpack_integers(packed, 4)[:64], scale, zero), r"weights must be \[128, out\]"),
        ((x, packed, scale[:, :4], zero), r"scale must be float32 \[G, 8\]"),
        ((x, packed, jnp.zeros((3, 8)), None), "where G divides 128 inputs"),
        ((x, packed, jnp.zeros((16, 8)), None), "groups of packed weights must be of a multiple of 16 inputs"),
        ((x, packed, scale, zero[:1]), r"zero must be int8 \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*changed)
