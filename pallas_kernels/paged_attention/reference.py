"""Plain-JAX ragged paged attention: what a CPU runs. See ``api`` for the contract.

Queries are cut into tiles of one sequence each, so that a mixture of one-token and many-token sequences costs little
padding; the context is walked in blocks with a running softmax, so memory does not grow with its length and no shape
depends on it.
"""

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.pool import PAGE_SIZE, from_token_rows, owner, take, token_rows

QUERY_TILE = 16
_BLOCK = 128
"""Keys of a block; a whole number of pages."""


@struct.dataclass
class ReferenceAttentionPlan:
    """What every layer of a step needs to know of its sequences, N tiles of at most M query tokens each.

    Attributes:
      pages: ``[N, P]`` int32, the tile's sequence's pages; P a multiple of the block's.
      token: ``[N, M]`` int32, the tile's query tokens; lanes beyond them hold any valid token.
      in_tile: ``[N, M]`` bool, which lanes are tokens of the tile.
      position: ``[N, M]`` int32, position of each query token, -1 beyond.
      num_blocks: int32, context blocks of the longest sequence.
      target: ``[N * M]`` int32, ``token`` with lanes beyond sent out of bounds.
      tokens_per_row: static; see ``pallas_kernels.pool``.
    """

    pages: jax.Array
    token: jax.Array
    in_tile: jax.Array
    position: jax.Array
    num_blocks: jax.Array
    target: jax.Array
    tokens_per_row: int = struct.field(pytree_node=False)

    @property
    def pages_per_block(self) -> int:
        return _pages_per_block(self.tokens_per_row)


def _pages_per_block(tokens_per_row: int) -> int:
    return _BLOCK // (PAGE_SIZE * tokens_per_row)


def plan(page_table, query_start, context_len, *, num_tokens, num_kv_heads, max_query_len=None, tokens_per_row=1):
    """Cuts the queries into tiles; ``api.plan_attention`` has the arguments' meaning."""
    del num_kv_heads
    tile = 1 if max_query_len == 1 else QUERY_TILE
    num_sequences, table_width = page_table.shape
    sequence, token, in_tile = _tiles(query_start, num_tokens, num_sequences, tile)
    position = jnp.where(in_tile, (context_len - query_start[1:])[sequence][:, None] + token, -1)
    unit = _pages_per_block(tokens_per_row)
    padded_width = -(-table_width // unit) * unit
    pages = jnp.pad(page_table, ((0, 0), (0, padded_width - table_width)))[sequence]
    has_queries = query_start[1:] > query_start[:-1]
    num_blocks = (jnp.max(jnp.where(has_queries, context_len, 0)) + _BLOCK - 1) // _BLOCK
    target = jnp.where(in_tile, token, num_tokens).reshape(-1)
    token = jnp.minimum(token, num_tokens - 1)
    return ReferenceAttentionPlan(pages, token, in_tile, position, num_blocks, target, tokens_per_row)


def _tiles(query_start, num_tokens, num_sequences, tile):
    """Returns each tile's sequence ``[N]``, its lanes' tokens ``[N, tile]``, and whether these are the sequence's."""
    if tile == 1:
        first_token = jnp.arange(num_tokens, dtype=jnp.int32)
        sequence = owner(query_start, first_token)
    else:
        tiles_before = jnp.cumulative_sum((jnp.diff(query_start) + tile - 1) // tile, include_initial=True)
        index = jnp.arange(-(-num_tokens // tile) + num_sequences, dtype=jnp.int32)
        sequence = owner(tiles_before, index)
    # Padding falls behind the last sequence.
    exists = sequence < num_sequences
    sequence = jnp.minimum(sequence, num_sequences - 1)
    if tile != 1:
        first_token = query_start[sequence] + (index - tiles_before[sequence]) * tile
    token = first_token[:, None] + jnp.arange(tile, dtype=jnp.int32)
    return sequence, token, exists[:, None] & (token < query_start[sequence + 1][:, None])


def paged_attention(q, pool, layer, plan: ReferenceAttentionPlan, *, num_kv_heads, scale):
    """Attention of every token over its own sequence's pages; ``api.paged_attention`` has the arguments' meaning."""
    _, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    num_tiles, tile = plan.token.shape
    queries = take(q, plan.token).astype(jnp.float32).reshape(num_tiles, tile, num_kv_heads, group, head_dim) * scale

    by_token = token_rows(pool, plan.tokens_per_row)
    num_rows, page_size = by_token.shape[2], PAGE_SIZE * plan.tokens_per_row
    flat, first_row = by_token.reshape(-1, by_token.shape[3]), 2 * layer * num_rows

    def attend(i, carry):
        out, total, top = carry
        pages = jax.lax.dynamic_slice_in_dim(plan.pages, i * plan.pages_per_block, plan.pages_per_block, axis=1)
        rows = (pages[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)).reshape(num_tiles, _BLOCK)
        # Without the barrier XLA fuses the gather into the matmuls, and repeats it for every query.
        k, v = jax.lax.optimization_barrier((take(flat, first_row + rows), take(flat, first_row + num_rows + rows)))
        k, v = (from_token_rows(x, plan.tokens_per_row) for x in (k, v))
        k, v = (x.astype(jnp.float32).reshape(num_tiles, _BLOCK, num_kv_heads, head_dim) for x in (k, v))
        scores = jnp.einsum("ntkgd,nckd->nkgtc", queries, k, precision="highest")
        seen = (i * _BLOCK + jnp.arange(_BLOCK)) <= plan.position[:, :, None]
        # Rows past the context may hold anything, NaN included: mask the values too, not only their weights.
        v = jnp.where(seen.any(axis=1)[:, :, None, None], v, 0.0)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        base = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(top - base)
        out = out * decay[..., None] + jnp.einsum("nkgtc,nckd->nkgtd", weights, v, precision="highest")
        return out, total * decay + weights.sum(axis=-1), new_top

    shape = (num_tiles, num_kv_heads, group, tile)
    start = (jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, -jnp.inf))
    out, total, _ = jax.lax.fori_loop(0, plan.num_blocks, attend, start)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(-1, num_heads, head_dim)
    if tile == 1:
        return jnp.where(plan.in_tile[:, :, None], out, 0.0).astype(q.dtype)
    return jnp.zeros(q.shape, q.dtype).at[plan.target].set(out.astype(q.dtype), mode="drop")
