"""Plain-JAX products with grouped weights: what a CPU runs, and a GPU where there are many rows. See ``api``."""

import jax
import jax.numpy as jnp

from pallas_kernels.products import dot

_FEW_ROWS, _LEAST_ROWS = 16, 4
"""Up to so many rows programs on GPUs use XLA's own kernels for products; see ``engine.runner.compiler_options``."""


def grouped_matmul(x, values, scale, zero, dtype):
    num_rows, (num_groups, d_out) = x.shape[0], scale.shape
    if num_groups == 1 and zero is None:
        # Half the bytes of float32 in a pass over the output. Not float16, which ends at 65,504.
        summed_as = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
        y = dot(x, values.astype(x.dtype), (((1,), (0,)), ((), ())), summed_as)
        return (y.astype(jnp.float32) * scale[0]).astype(dtype)
    if num_rows > _FEW_ROWS:
        return dot(x, dequantized(values, scale, zero).astype(x.dtype), (((1,), (0,)), ((), ())), dtype)
    # A product for each group, whose scales come behind it: XLA's kernels then read the values as they are stored.
    # Multiplied by scales ahead of it, all of the weights would be written to memory in each step, and read again. A
    # single row XLA would make a sum of products of, which it writes to memory, too.
    groups = jnp.pad(x, ((0, max(0, _LEAST_ROWS - num_rows)), (0, 0))).reshape(
        -1, num_groups, values.shape[0] // num_groups
    )
    blocks = values.reshape(num_groups, -1, d_out).astype(x.dtype)
    sums = dot(groups, blocks, (((2,), (1,)), ((1,), (0,))), jnp.float32)
    if zero is not None:
        sums = sums - jnp.sum(groups.astype(jnp.float32), axis=2).T[:, :, None] * zero.astype(jnp.float32)[:, None]
    return jnp.sum(sums * scale[:, None], axis=0)[:num_rows].astype(dtype)


def dequantized(values: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """Weights ``[in, out]`` float32 of grouped values ``[in, out]``, scales and zeros ``[G, out]``.

    XLA writes them to memory in the activations' dtype ahead of their product.
    """
    groups = values.astype(jnp.float32).reshape(scale.shape[0], -1, values.shape[1])
    if zero is not None:
        groups = groups - zero.astype(jnp.float32)[:, None]
    return (groups * scale[:, None]).reshape(values.shape)
