"""Plain-JAX rotary embedding and KV write: what a CPU runs. See ``api.rotary_write_kv`` for the contract."""

import jax.numpy as jnp


def rotary_write_kv(qkv, rope, pool, layer, rows, *, num_kv_heads, head_dim):
    """Rotates q and k, and writes K and V; ``api.rotary_write_kv`` has the arguments' meaning."""
    num_tokens = qkv.shape[0]
    heads = qkv.reshape(num_tokens, -1, head_dim)
    turned = _rotate(heads[:, :-num_kv_heads].astype(jnp.float32), *rope)
    q, k = turned[:, :-num_kv_heads], turned[:, -num_kv_heads:]
    v = heads[:, -num_kv_heads:]
    values = jnp.stack([k.astype(pool.dtype), v.astype(pool.dtype)], axis=1).reshape(num_tokens, 2, -1)
    return q.astype(qkv.dtype), pool.at[layer, :, rows].set(values, mode="promise_in_bounds")


def _rotate(x, cos, sin):
    """Rotates ``x [T, heads, D]`` by the angles whose cosine and sine are ``[T, D / 2]``."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
