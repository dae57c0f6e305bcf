"""Rows rounded to float8 (e4m3) for products of float8 operands: contracts, checks, choice of back end.

Each row is divided by a scale of its own, so that its largest value becomes the largest of float8: the per-token
quantization of W8A8 (vLLM and compressed-tensors name it so). What makes the rows is fused with the rounding, because
every pass over the activations takes time beside the product that it feeds.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend, converts_float8
from pallas_kernels.float8 import reference, triton
from pallas_kernels.float8.types import Float8Rows, ScaledProduct
from pallas_kernels.pool import expect_rank


def round_rows(x: jax.Array, *, backend: Backend) -> Float8Rows:
    """Rounds each row of ``[T, n]``, floating, to float8: ``values[t] = x[t] / scale[t]``.

    ``scale[t]`` is the largest ``|x[t]|`` over 448, the largest float8. A row of zeros stays one. A row with NaN or
    infinity has NaN in it.

    Raises:
      ValueError: x is no matrix.
    """
    expect_rank("x", x, 2)
    if not _has_kernels(backend):
        return reference.round_rows(x)
    return triton.round_rows(x)


def add_norm_round(
    x: jax.Array,
    term: ScaledProduct | None,
    scale: jax.Array,
    epsilon: float,
    *,
    keeps_normed: bool,
    backend: Backend,
) -> tuple[jax.Array, jax.Array | None, Float8Rows]:
    """``x + term``, its root-mean-square norm (arXiv 1910.07467), and that rounded to float8.

    Args:
      x: hidden states ``[T, h]``.
      term: what is added to them, ``[T, h]``; None for nothing.
      scale: of the norm, ``[h]``.
      epsilon: of the norm, above 0.
      keeps_normed: whether the norm is wanted before it is rounded, too.
      backend: which implementation runs; static.

    Returns:
      ``x + term`` and the norm ``[T, h]`` in x's dtype, computed in float32 (the norm is of the sum as rounded to that
      dtype), and the norm in float8. The second is None unless ``keeps_normed``.

    Raises:
      ValueError: shapes that do not fit the above.
    """
    num_columns = expect_rank("x", x, 2)[1]
    if scale.shape != (num_columns,):
        raise ValueError(f"scale must be [{num_columns}] for x {x.shape}, got {scale.shape}")
    if term is not None:
        term.check("term", x.shape)
    if _has_kernels(backend):
        return triton.add_norm_round(x, term, scale, epsilon, keeps_normed)
    x, normed, rows = reference.add_norm_round(x, term, scale, epsilon)
    return x, normed if keeps_normed else None, rows


def silu_round(
    gate_up: ScaledProduct, *, dtype: jnp.dtype, keeps_activations: bool, backend: Backend
) -> tuple[jax.Array | None, Float8Rows]:
    """``silu(gate) * up`` of a product ``[T, 2 * n]`` with columns gate, up, and that rounded to float8.

    Args:
      gate_up: the product.
      dtype: of the activations, which are computed in float32 and rounded to it ahead of float8.
      keeps_activations: whether they are wanted in ``dtype``, too.
      backend: which implementation runs; static.

    Returns:
      The activations ``[T, n]``, None unless ``keeps_activations``, and the activations in float8.

    Raises:
      ValueError: an odd number of columns, or shapes that do not fit each other.
    """
    num_columns = expect_rank("gate_up", gate_up.sums, 2)[1]
    if num_columns % 2:
        raise ValueError(f"gate_up must have as many columns for gate as for up, got {num_columns}")
    gate_up.check("gate_up", gate_up.shape)
    if _has_kernels(backend):
        return triton.silu_round(gate_up, dtype, keeps_activations)
    activations, rows = reference.silu_round(gate_up, dtype)
    return activations if keeps_activations else None, rows


def _has_kernels(backend: Backend) -> bool:
    return backend != "reference" and converts_float8()
