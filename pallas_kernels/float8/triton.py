"""Rows rounded to float8 for NVIDIA GPUs, from Ada on, in Triton: launches. See ``api`` for the contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import triton

from pallas_kernels import launch
from pallas_kernels.float8.reference import LEAST_AMPLITUDE
from pallas_kernels.float8.triton_kernels import _add_norm_round_kernel, _round_rows_kernel, _silu_round_kernel
from pallas_kernels.float8.types import Float8Rows, ScaledProduct, operands_of
from pallas_kernels.launch import TRITON_TYPES
from pallas_kernels.pool import FLOAT8, FLOAT8_MAX

_VALUES_OF_THREAD = 16
_MOST_WARPS = 16


def round_rows(x):
    (rows,) = _launch(_round_rows_kernel, x.shape, (x,))
    return rows


def add_norm_round(x, term: ScaledProduct | None, scale, epsilon, keeps_normed: bool):
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed, rows = _launch(
        _add_norm_round_kernel,
        x.shape,
        (x, *operands_of(term), scale),
        (None if term is None else like_x, like_x if keeps_normed else None),
        EPSILON=epsilon,
    )
    return x if total is None else total, normed, rows


def silu_round(product: ScaledProduct, dtype, keeps_activations: bool):
    shape = product.shape[0], product.shape[1] // 2
    kept = jax.ShapeDtypeStruct(shape, dtype) if keeps_activations else None
    return _launch(_silu_round_kernel, shape, product, (kept,), DTYPE=TRITON_TYPES[np.dtype(dtype).name])


def _launch(kernel, shape: tuple[int, int], operands: tuple, outputs: tuple = (), **constants):
    """Returns the outputs in their order, None where one is None, and rows of this shape behind them."""
    num_rows, num_columns = shape
    block = triton.next_power_of_2(num_columns)
    values, scale = jax.ShapeDtypeStruct(shape, FLOAT8), jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    *made, values, scale = launch.triton_call(
        *operands,
        kernel=kernel,
        out_type=(*outputs, values, scale),
        grid=(num_rows,),
        num_warps=min(_MOST_WARPS, max(1, block // (32 * _VALUES_OF_THREAD))),
        num_stages=1,
        COLUMNS=num_columns,
        BLOCK=block,
        FLOAT8_MAX=FLOAT8_MAX,
        LEAST=LEAST_AMPLITUDE,
        **constants,
    )
    return *made, Float8Rows(values, scale)
