"""Plain-JAX ragged paged attention: what a CPU runs. See ``api`` for the contract.

Queries are cut into tiles of one sequence each, so that a mixture of one-token and many-token sequences costs little
padding; the context is walked in blocks with a running softmax, so memory does not grow with its length and no shape
depends on it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pool import PAGE_SIZE

QUERY_TILE = 16
_PAGES_PER_BLOCK = 8


def paged_attention(q, pool, layer, page_table, query_start, context_len, *, num_kv_heads, scale, tile):
    num_tokens, num_heads, head_dim = q.shape
    num_sequences, table_width = page_table.shape
    group = num_heads // num_kv_heads
    sequence, token, in_sequence = _tiles(query_start, num_tokens, num_sequences, tile)
    position = jnp.where(in_sequence, (context_len - query_start[1:])[sequence][:, None] + token, -1)

    queries = q[token].astype(jnp.float32).reshape(*token.shape, num_kv_heads, group, head_dim) * scale
    padded_width = -(-table_width // _PAGES_PER_BLOCK) * _PAGES_PER_BLOCK
    table = jnp.pad(page_table, ((0, 0), (0, padded_width - table_width)))[sequence]
    block = _PAGES_PER_BLOCK * PAGE_SIZE

    def attend(i, carry):
        out, total, top = carry
        pages = jax.lax.dynamic_slice_in_dim(table, i * _PAGES_PER_BLOCK, _PAGES_PER_BLOCK, axis=1)
        rows = (pages[:, :, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)).reshape(-1, block)
        k, v = (
            pool[layer, plane, rows].astype(jnp.float32).reshape(-1, block, num_kv_heads, head_dim) for plane in (0, 1)
        )
        scores = jnp.einsum("ntkgd,nckd->nkgtc", queries, k, precision="highest")
        seen = (i * block + jnp.arange(block)) <= position[:, :, None]
        # Rows past the context may hold anything, NaN included: mask the values too, not only their weights.
        v = jnp.where(seen.any(axis=1)[:, :, None, None], v, 0.0)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        base = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(top - base)
        out = out * decay[..., None] + jnp.einsum("nkgtc,nckd->nkgtd", weights, v, precision="highest")
        return out, total * decay + weights.sum(axis=-1), new_top

    shape = (sequence.shape[0], num_kv_heads, group, tile)
    start = (jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, -jnp.inf))
    has_queries = query_start[1:] > query_start[:-1]
    num_blocks = (jnp.max(jnp.where(has_queries, context_len, 0)) + block - 1) // block
    out, total, _ = jax.lax.fori_loop(0, num_blocks, attend, start)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(-1, num_heads, head_dim)
    # Lanes beyond a tile's tokens are sent out of bounds and dropped.
    target = jnp.where(in_sequence, token, num_tokens).reshape(-1)
    return jnp.zeros(q.shape, q.dtype).at[target].set(out.astype(q.dtype), mode="drop", unique_indices=False)


def _tiles(query_start, num_tokens, num_sequences, tile):
    """Each tile's sequence ``[N]``, and its lanes' tokens and whether they are that sequence's ``[N, tile]``."""
    if tile == 1:
        num_tiles = num_tokens
        first_token = jnp.arange(num_tokens, dtype=jnp.int32)
        sequence = jnp.searchsorted(query_start, first_token, side="right").astype(jnp.int32) - 1
    else:
        num_tiles = -(-num_tokens // tile) + num_sequences
        tiles_before = jnp.cumulative_sum((jnp.diff(query_start) + tile - 1) // tile, include_initial=True)
        index = jnp.arange(num_tiles, dtype=jnp.int32)
        sequence = jnp.searchsorted(tiles_before, index, side="right").astype(jnp.int32) - 1
    # Padding falls behind the last sequence.
    exists = sequence < num_sequences
    sequence = jnp.minimum(sequence, num_sequences - 1)
    if tile != 1:
        first_token = query_start[sequence] + (index - tiles_before[sequence]) * tile
    token = first_token[:, None] + jnp.arange(tile, dtype=jnp.int32)
    in_sequence = exists[:, None] & (token < query_start[sequence + 1][:, None])
    return sequence, jnp.minimum(token, num_tokens - 1), in_sequence


def write_kv(pool, layer, rows, k, v):
    values = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return pool.at[layer, :, rows].set(values, mode="promise_in_bounds")
