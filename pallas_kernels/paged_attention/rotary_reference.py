"""Plain-JAX rotary embedding and KV write: what a CPU runs. See ``api.rotary_write_kv`` for the contract."""

import jax.numpy as jnp

from pallas_kernels.float8 import ScaledProduct
from pallas_kernels.pool import rounded_for_rows, to_token_rows, token_rows


def rotary_write_kv(qkv, rope, pool, layer, rows, *, num_kv_heads, head_dim, tokens_per_row):
    """Rotates q and k, and writes K and V; ``api.rotary_write_kv`` has the arguments' meaning."""
    q_dtype = pool.dtype if isinstance(qkv, ScaledProduct) else qkv.dtype
    qkv = qkv.in_float32() if isinstance(qkv, ScaledProduct) else qkv
    num_tokens = qkv.shape[0]
    heads = qkv.reshape(num_tokens, -1, head_dim)
    turned = _rotate(heads[:, :-num_kv_heads].astype(jnp.float32), *rope)
    q, k = turned[:, :-num_kv_heads], turned[:, -num_kv_heads:]
    v = heads[:, -num_kv_heads:]
    k, v = (rounded_for_rows(x, pool.dtype, tokens_per_row) for x in (k, v))
    values = to_token_rows(jnp.stack([k, v], axis=1).reshape(num_tokens, 2, -1), pool.dtype, tokens_per_row)
    q = q.astype(q_dtype)
    written = token_rows(pool, tokens_per_row).at[layer, :, rows].set(values, mode="promise_in_bounds")
    return q, written.reshape(pool.shape)


def _rotate(x, cos, sin):
    """Rotates ``x [T, heads, D]`` by the angles whose cosine and sine are ``[T, D / 2]``."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
