"""Rows rounded to float8 in plain JAX. See ``api`` for the contracts."""

import jax
import jax.numpy as jnp

from pallas_kernels.float8.types import Float8Rows, ScaledProduct
from pallas_kernels.norm import rms_norm
from pallas_kernels.pool import FLOAT8, FLOAT8_MAX

LEAST_AMPLITUDE = 1e-30
"""Far below any activation or weight, and far above where 1 / 448 of it would be flushed to zero."""


def round_rows(x):
    x = x.astype(jnp.float32)
    amplitude = jnp.max(jnp.abs(x), axis=1)
    scale = jnp.maximum(amplitude, LEAST_AMPLITUDE) / FLOAT8_MAX
    # No clipping: a quotient that rounding has put above 448 is rounded back to it.
    return Float8Rows((x / scale[:, None]).astype(FLOAT8), scale)


def add_norm_round(x, term: ScaledProduct | None, scale, epsilon):
    if term is not None:
        x = term.added_to(x)
    normed = rms_norm(x, scale, epsilon)
    return x, normed, round_rows(normed)


def silu_round(product: ScaledProduct, dtype):
    gate, up = jnp.split(product.in_float32(), 2, axis=1)
    activations = (jax.nn.silu(gate) * up).astype(dtype)
    return activations, round_rows(activations)
