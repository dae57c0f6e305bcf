"""Products that XLA computes."""

import jax
import jax.numpy as jnp


def dot(x, kernel, dimension_numbers, out_dtype=jnp.float32):
    """``jax.lax.dot_general``, in which float32 means float32: without this a GPU would round the operands to tf32."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, preferred_element_type=out_dtype)
