"""Products with weights of few bits, in groups with scales of their own: contract, checks, choice of back end."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul import reference, triton
from pallas_kernels.grouped_matmul.packing import inputs_of_block, unpack_integers
from pallas_kernels.pool import expect_rank

_ACTIVATIONS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    dtype: jnp.dtype,
    backend: Backend,
) -> jax.Array:
    """Multiplies activations by weights that are stored in few bits.

    Semantics, with ``values`` ``[in, out]`` the stored numbers, and input k in group ``g = k // (in / G)``::

        out[t, n] = sum over k of  x[t, k] * (values[k, n] - zero[g, n]) * scale[g, n]

    accumulated in float32. Products of float32 activations are of float32. The Triton kernel takes packed weights as
    it reads them. Where a step has so many rows that reading weights no longer counts, they are written to memory in
    the dtype of x first, as they always are for other weights; how many is a block size (``most_rows``).

    Args:
      x: ``[T, in]`` bfloat16, float16 or float32.
      weights: packed values ``[in / 64, out, 8]`` int32 of 4 bits, or ``[in / 32, out, 8]`` of 8, as from
        ``pack_integers``, in groups of a multiple of 16 inputs; or values ``[in, out]`` of any narrow dtype.
      scale: ``[G, out]`` float32, where G divides in.
      zero: ``[G, out]`` int8, from -56 to 56 where weights are packed 4-bit values; None for zeros.
      dtype: of the result.
      backend: which implementation runs; static.

    Returns:
      ``[T, out]``.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    d_in, bits = _check(x, weights, scale, zero)
    dtype = jnp.dtype(dtype)
    if bits and d_in // scale.shape[0] % triton.LEAST_GROUP:
        raise ValueError(
            f"groups of packed weights must be of a multiple of {triton.LEAST_GROUP} inputs, got {scale.shape[0]} "
            f"groups of {d_in}; give the values unpacked"
        )
    if bits and backend != "reference" and x.shape[0] <= triton.most_rows():
        return triton.grouped_matmul(x, weights, scale, zero, dtype, bits)
    values = unpack_integers(weights, bits) if bits else weights
    return reference.grouped_matmul(x, values, scale, zero, dtype)


def _check(x, weights, scale, zero) -> tuple[int, int]:
    """Returns the number of inputs, and bits of packed weights; 0 of those that are not packed."""
    _, d_in = expect_rank("x", x, 2)
    if x.dtype not in _ACTIVATIONS:
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    bits = 0
    if weights.ndim == 3:
        blocks, d_out, words = weights.shape
        bits = next((bits for bits in (4, 8) if blocks * inputs_of_block(bits) == d_in), 0)
        if not bits or words != 8 or weights.dtype != jnp.int32:
            raise ValueError(
                f"packed weights for {d_in} inputs must be int32 [in / 64, out, 8] or [in / 32, out, 8], got "
                f"{weights.dtype} {weights.shape}"
            )
    else:
        _, d_out = expect_rank("weights", weights, 2)
        if weights.shape[0] != d_in:
            raise ValueError(f"weights must be [{d_in}, out] for x {x.shape}, got {weights.shape}")
    num_groups, columns = expect_rank("scale", scale, 2)
    if columns != d_out or not num_groups or d_in % num_groups or scale.dtype != jnp.float32:
        raise ValueError(
            f"scale must be float32 [G, {d_out}], where G divides {d_in} inputs, got {scale.dtype} {scale.shape}"
        )
    if zero is not None and (zero.shape != scale.shape or zero.dtype != jnp.int8):
        raise ValueError(f"zero must be int8 {scale.shape} as scale, got {zero.dtype} {zero.shape}")
    return d_in, bits
