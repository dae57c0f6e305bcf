"""The Triton kernels that round rows to float8; ``triton`` launches them, and ``api`` has what they compute.

A program does one row, which its threads hold in registers from the one time that it is read. So a row's sum of squares
and its largest value cost no pass over memory.
"""

import triton
import triton.language as tl


@triton.jit
def _add_norm_round_kernel(
    x,  # [T, COLUMNS]
    sums,  # [T, COLUMNS]; None: there is nothing to add to x
    row_scale,  # [T] float32, or None
    column_scale,  # [COLUMNS] float32, or None
    update,  # [T, COLUMNS], or None
    weight,  # [COLUMNS]
    total,  # [T, COLUMNS]: x with what is added to it; None where nothing is
    normed,  # [T, COLUMNS]; None where nobody reads it
    values,  # [T, COLUMNS] float8_e4m3fn
    scale,  # [T] float32
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # COLUMNS or more
    EPSILON: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < COLUMNS
    at = row * COLUMNS + column
    dtype = x.dtype.element_ty
    row_of_x = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if sums is not None:
        row_of_x += _scaled(sums, tl.load(row_scale + row), column_scale, update, at, column, here)
        # The norm is of what the next layers see.
        row_of_x = row_of_x.to(dtype).to(tl.float32)
        tl.store(total + at, row_of_x.to(dtype), mask=here)
    mean = tl.sum(row_of_x * row_of_x, axis=0) / COLUMNS
    result = row_of_x * tl.rsqrt(mean + EPSILON)
    result *= tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    result = result.to(dtype)
    if normed is not None:
        tl.store(normed + at, result, mask=here)
    _round_row(result.to(tl.float32), values, scale, row, at, here, FLOAT8_MAX, LEAST)


@triton.jit
def _silu_round_kernel(
    sums,  # [T, 2 * COLUMNS]: gate, up
    row_scale,  # [T] float32
    column_scale,  # [2 * COLUMNS] float32
    update,  # [T, 2 * COLUMNS], or None
    activations,  # [T, COLUMNS]; None where nobody reads them
    values,  # [T, COLUMNS] float8_e4m3fn
    scale,  # [T] float32
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # COLUMNS or more
    DTYPE: tl.constexpr,  # of activations, whether these are stored or not
    FLOAT8_MAX: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < COLUMNS
    of_row = tl.load(row_scale + row)
    at = row * (2 * COLUMNS) + column
    gate = _scaled(sums, of_row, column_scale, update, at, column, here)
    up = _scaled(sums, of_row, column_scale, update, at + COLUMNS, column + COLUMNS, here)
    result = (gate * tl.sigmoid(gate) * up).to(DTYPE)
    at = row * COLUMNS + column
    if activations is not None:
        tl.store(activations + at, result, mask=here)
    _round_row(result.to(tl.float32), values, scale, row, at, here, FLOAT8_MAX, LEAST)


@triton.jit
def _round_rows_kernel(
    x,  # [T, COLUMNS]
    values,  # [T, COLUMNS] float8_e4m3fn
    scale,  # [T] float32
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # COLUMNS or more
    FLOAT8_MAX: tl.constexpr,
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < COLUMNS
    at = row * COLUMNS + column
    _round_row(tl.load(x + at, mask=here, other=0.0).to(tl.float32), values, scale, row, at, here, FLOAT8_MAX, LEAST)


@triton.jit
def _scaled(sums, of_row, column_scale, update, at, column, here):
    """A row of a product in float32, its scales applied; 0 where ``here`` is false."""
    row = tl.load(sums + at, mask=here, other=0.0).to(tl.float32)
    row *= of_row * tl.load(column_scale + column, mask=here, other=0.0)
    if update is not None:
        row += tl.load(update + at, mask=here, other=0.0).to(tl.float32)
    return row


@triton.jit
def _round_row(row_values, values, scale, row, at, here, FLOAT8_MAX: tl.constexpr, LEAST: tl.constexpr):
    """Stores a row of float32 as float8, and its scale."""
    amplitude = tl.maximum(tl.max(tl.abs(row_values), axis=0), LEAST)
    tl.store(scale + row, amplitude / FLOAT8_MAX)
    # A product that rounding has put above the largest number is rounded back to it.
    rounded = (row_values * (FLOAT8_MAX / amplitude)).to(values.dtype.element_ty)
    tl.store(values + at, rounded, mask=here)
