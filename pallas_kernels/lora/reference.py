"""Plain-JAX gathered LoRA: what a CPU runs. See ``api`` for the contract.

The rank rows of all adapters in the batch are stacked into one matrix of ``total_rank`` rows, so that each module is
two dense products whose width follows the sum of the real ranks; a mask keeps each token to its own adapter's rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pool import PAGE_SIZE


def lora_shrink(x, pool, layer, segments, modules):
    num_tokens, d_in = x.shape
    outputs = []
    for m in modules:
        a, _, _, _ = _stack(pool, layer, segments, m, segments.start_a, d_in)
        products = jax.lax.dot_general(
            x, a, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        # Column j of `products` belongs to segment owner[j]; pick each token's own run of columns.
        segment, has_segment = _segment_of_token(segments, num_tokens)
        first = jnp.cumulative_sum(segments.rank[:, m], include_initial=True)[segment]
        column = first[:, None] + jnp.arange(segments.max_rank)
        own = has_segment[:, None] & (jnp.arange(segments.max_rank) < segments.rank[segment, m][:, None])
        picked = jnp.take_along_axis(products, jnp.minimum(column, segments.total_rank - 1), axis=1)
        outputs.append(jnp.where(own, picked * segments.scale[segment, m][:, None], 0.0))
    return jnp.stack(outputs, axis=1)


def lora_expand(partial_sums, ys, pool, layer, segments, modules):
    num_tokens = partial_sums.shape[0]
    segment, has_segment = _segment_of_token(segments, num_tokens)
    outputs = []
    for j, (m, y) in enumerate(zip(modules, ys, strict=True)):
        b, owner, index, exists = _stack(pool, layer, segments, m, segments.start_b, y.shape[1])
        own = has_segment[:, None] & exists & (owner == segment[:, None])
        spread = jnp.where(own, partial_sums[:, j, :][:, index], 0.0)
        delta = jnp.dot(spread, b.astype(jnp.float32), precision="highest")
        outputs.append((y.astype(jnp.float32) + delta).astype(y.dtype))
    return tuple(outputs)


def _segment_of_token(segments, num_tokens):
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(segments.token_start, token, side="right").astype(jnp.int32) - 1
    last = segments.rank.shape[0] - 1
    return jnp.clip(segment, 0, last), (segment >= 0) & (segment <= last)


def _stack(pool, layer, segments, m, starts, width):
    """The rank rows of one matrix of every adapter, one below the other: ``[total_rank, width]``.

    With it, for each row: its segment, its index within that adapter's rank, and whether it exists; the others are 0.
    """
    ranks = segments.rank[:, m]
    ends = jnp.cumsum(ranks)
    stacked = jnp.arange(segments.total_rank, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, stacked, side="right").astype(jnp.int32)
    exists = owner < ranks.shape[0]
    owner = jnp.minimum(owner, ranks.shape[0] - 1)
    index = jnp.clip(stacked - (ends - ranks)[owner], 0, segments.max_rank - 1)

    chunks = -(-width // pool.shape[3])
    entry = (starts[owner, m] + index)[:, None] + jnp.arange(chunks) * ranks[owner][:, None]
    num_pages = segments.page_start[owner + 1] - segments.page_start[owner]
    rows_per_plane = (PAGE_SIZE * jnp.maximum(num_pages, 1))[:, None]
    plane, row = entry // rows_per_plane, entry % rows_per_plane
    page_index = segments.page_start[owner][:, None] + row // PAGE_SIZE
    page = segments.pages[jnp.clip(page_index, 0, segments.pages.shape[0] - 1)]
    matrix = pool[layer, jnp.clip(plane, 0, 1), page * PAGE_SIZE + row % PAGE_SIZE].reshape(stacked.shape[0], -1)
    return jnp.where(exists[:, None], matrix[:, :width], 0), owner, index, exists
