"""The root-mean-square norm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """``x / sqrt(mean of x² + epsilon) * scale``, with the mean over the last axis.

    Args:
      x: ``[..., h]``, floating.
      scale: ``[h]``.
      epsilon: above 0.

    Returns:
      As x; computed in float32.
    """
    values = x.astype(jnp.float32)
    values = values * jax.lax.rsqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True) + epsilon)
    return (values * scale.astype(jnp.float32)).astype(x.dtype)
