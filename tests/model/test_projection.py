"""Quantised linear maps against what their layouts say, in float64 NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import round_rows
from slora_jax.model.projection import Projection, fp8_product, quantize_map
from slora_jax.model.quantization import ChannelFp8, GroupedWeights
from tests.helpers.oracles import stored_integers

FP8 = ml_dtypes.float8_e4m3fn


def drawn(*shape, seed=0):
    """Rows of very different sizes, as activations and channels have them."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 2, (shape[0], *[1] * (len(shape) - 1))))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def rounded(x):
    """Each row to float8_e4m3fn and back, by its own scale: values float64, scales ``[n, 1]``."""
    scale = (np.abs(x).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
    return (x / scale).astype(FP8).astype(np.float64), scale.astype(np.float64)


def product_of(x, weight, channel_scale, dtype):
    return fp8_product(round_rows(x, backend="reference"), weight, channel_scale, dtype).value(dtype)


def test_rows_are_rounded_to_the_nearest_value_of_eight_bits():
    x = drawn(40, 64)
    values, scale = round_rows(jnp.asarray(x), backend="reference")
    expected, expected_scale = rounded(x)
    np.testing.assert_allclose(scale, expected_scale[:, 0], rtol=1e-6)
    # A last bit of the scale may decide between two neighbours.
    assert np.mean(np.asarray(values, np.float64) == expected) > 0.999
    np.testing.assert_array_equal(np.abs(np.asarray(values, np.float32)).max(axis=1), 448)
    # Half of the last of four bits of a normal number, or of the smallest step.
    error = np.abs(np.asarray(values, np.float64) * expected_scale - x)
    assert (error <= np.maximum(np.abs(x) / 16, expected_scale * 2.0**-10) * 1.001).all()


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-42, 0.0], [3e38, -3e38], [1e-30, -2e-30]])
def test_rows_of_any_size_stay_finite(row):
    values, scale = round_rows(jnp.asarray([row], jnp.float32), backend="reference")
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None]
    np.testing.assert_allclose(back, np.float64([row]), rtol=1 / 16, atol=1e-31)


def test_a_row_that_is_no_number_spoils_itself_only():
    x = np.ones((3, 4), np.float32)
    x[1, 2] = np.nan
    y = np.asarray(product_of(jnp.asarray(x), jnp.ones((5, 4), FP8), jnp.ones(5), jnp.float32))
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[[0, 2]], 4.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (jnp.float32, 1e-6),
        (jnp.bfloat16, 2**-7),  # two roundings to eight bits: of the sum, and of its product with the scales
        (jnp.float16, 2**-10),
    ],
)
def test_the_product_is_that_of_the_rounded_operands(dtype, bound):
    x = np.asarray(jnp.asarray(drawn(24, 576) / 50, dtype))
    kernel = drawn(96, 576, seed=1).T / 200
    params = quantize_map(jnp.asarray(kernel), ChannelFp8())
    # Compiled in one, as a step is: a compiler could leave out the rounding.
    projection = Projection(96, dtype, ChannelFp8())
    y = jax.jit(lambda params, x: projection.apply({"params": params}, x).value(dtype))(params, jnp.asarray(x))
    assert y.dtype == dtype
    # What these are is tested above; here it is their product.
    xq, sx, wq, sw = (
        np.asarray(a, np.float64)
        for a in (*round_rows(x, backend="reference"), params["weight"], params["channel_scale"])
    )
    sx, sw = sx[:, None], sw[:, None]
    expected = (xq * sx) @ (wq * sw).T
    size = np.linalg.norm(xq * sx, axis=1)[:, None] * np.linalg.norm(wq * sw, axis=1)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    allowed = bound * np.maximum(np.abs(expected), size / 10) + smallest
    assert (np.abs(np.asarray(y, np.float64) - expected) <= allowed).all()
    # And not far from the unrounded one, of which this is an approximation.
    exact = x.astype(np.float64) @ kernel
    assert 0.01 < np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 0.05


def test_sums_of_large_values_fit_in_float16():
    x, weight = jnp.full((2, 512), 3.0, jnp.float16), jnp.full((8, 512), 448.0, FP8)
    y = product_of(x, weight, jnp.full(8, 1e-3), jnp.dtype(jnp.float16))
    np.testing.assert_allclose(np.asarray(y, np.float32), 3 * 448 * 512e-3, rtol=2e-3)


GROUPED = [
    GroupedWeights(values, group_size, has_zeros)
    for values in ("int4", "int8", "float8_e4m3fn")
    for group_size, has_zeros in ((None, False), (32, False), (32, True))
]


@pytest.mark.parametrize("layout", GROUPED, ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, jnp.float32), (7, jnp.bfloat16), (20, jnp.float32), (20, jnp.bfloat16)]
)
def test_grouped_weights_are_values_less_zeros_times_scales(layout, rows, dtype):
    kernel = drawn(96, 80, seed=2)
    params = {name: np.array(leaf) for name, leaf in quantize_map(jnp.asarray(kernel), layout, unit=48).items()}
    if layout.has_zeros:
        params["group_zero"][:] = np.random.default_rng(3).integers(-8, 9, params["group_zero"].shape)
    values = params["kernel"].astype(np.float64)
    group = 96 if layout.is_by_channel else 16  # what 48 and 32 share
    scale = np.repeat(params["channel_scale" if layout.is_by_channel else "group_scale"].reshape(-1, 80), group, axis=0)
    zero = np.repeat(params["group_zero"], group, axis=0).astype(np.float64) if layout.has_zeros else 0
    weights = (values - zero) * scale
    x = drawn(rows, 96, seed=4).astype(dtype)
    y = Projection(80, dtype, layout, unit=48).apply({"params": params}, jnp.asarray(x))
    expected = x.astype(np.float64) @ weights
    size = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(weights, axis=0)
    assert (np.abs(np.asarray(y, np.float64) - expected) <= (1e-6 if dtype == jnp.float32 else 2**-7) * size).all()
    if not layout.has_zeros:
        bits = {"int4": 1 / 14, "int8": 1 / 254, "float8_e4m3fn": 1 / 16}[layout.values]
        largest = np.abs(kernel.reshape(-1, group, 80)).max(axis=1).repeat(group, axis=0)
        assert (np.abs(weights - kernel) <= bits * largest * 1.001).all()


@pytest.mark.parametrize(
    "layout",
    [
        GroupedWeights(values, *rest)
        for values in ("int4", "int8")
        for rest in ((None, False), (128, False), (32, True), (None, True))
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, jnp.float32), (7, jnp.bfloat16), (20, jnp.float32), (20, jnp.bfloat16)]
)
def test_packed_weights_are_the_same(layout, rows, dtype):
    kernel = drawn(256, 80, seed=2)
    params = {name: np.array(leaf) for name, leaf in quantize_map(jnp.asarray(kernel), layout, unit=64).items()}
    assert params["packed"].shape == (layout.bits, 80, 8) and "kernel" not in params
    bytes_held = sum(array.nbytes for array in params.values())
    assert bytes_held == layout.num_bytes(256, 80, 64)
    if layout.has_zeros:
        params["group_zero"][:] = np.random.default_rng(3).integers(-8, 9, params["group_zero"].shape)
    group = 256 if layout.is_by_channel else {None: 64, 128: 64, 32: 32}[layout.group_size]
    scale = np.repeat(params["channel_scale" if layout.is_by_channel else "group_scale"].reshape(-1, 80), group, axis=0)
    zero = np.repeat(params["group_zero"], group, axis=0).astype(np.float64) if layout.has_zeros else 0
    weights = (stored_integers(params["packed"], layout.bits) - zero) * scale
    if not layout.has_zeros:
        largest = np.abs(kernel.reshape(-1, group, 80)).max(axis=1).repeat(group, axis=0)
        assert (np.abs(weights - kernel) <= largest / (14 if layout.bits == 4 else 254) * 1.001).all()
    x = drawn(rows, 256, seed=4).astype(dtype)
    y = Projection(80, dtype, layout, unit=64).apply({"params": params}, jnp.asarray(x))
    size = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(weights, axis=0)
    bound = 1e-6 if dtype == jnp.float32 else 2**-7
    assert (np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ weights) <= bound * size).all()


@pytest.mark.parametrize("rows", [4, 512])
def test_the_fp8_product_is_lowered_as_one_of_eight_bit_operands(rows):
    """XLA's rewriter for GPUs makes ``__cublas$lt$matmul$f8`` of this, without a transposed copy of the weights."""
    shapes = [((rows, 64), jnp.bfloat16), ((96, 64), FP8), ((96,), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    lowered = jax.jit(lambda x, w, s: product_of(x, w, s, jnp.dtype(jnp.bfloat16))).trace(*arguments)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert f"(tensor<{rows}x64xf8E4M3FN>, tensor<96x64xf8E4M3FN>) -> tensor<{rows}x96xbf16>" in product
    assert "contracting_dims = [1] x [1]" in product
    assert "stablehlo.transpose" not in text
