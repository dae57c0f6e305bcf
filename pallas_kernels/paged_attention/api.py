"""Ragged paged attention and the KV write: contracts and argument checks."""

import jax

from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import reference, triton
from pallas_kernels.paged_attention.reference import ReferenceAttentionPlan
from pallas_kernels.paged_attention.triton import TritonAttentionPlan
from pallas_kernels.pool import check_pool, expect_int32, expect_rank

AttentionPlan = ReferenceAttentionPlan | TritonAttentionPlan
"""Opaque to callers; its type says which back end runs."""


def plan_attention(
    page_table: jax.Array,
    query_start: jax.Array,
    context_len: jax.Array,
    *,
    num_tokens: int,
    backend: Backend,
    max_query_len: int | None = None,
) -> AttentionPlan:
    """Works out once a step what ``paged_attention`` needs in every layer.

    Args:
      page_table: ``[S, P]`` int32 page numbers.
      query_start: ``[S + 1]`` int32, non-decreasing from 0: first query token of each sequence.
      context_len: ``[S]`` int32, tokens of each sequence including its query tokens; at most ``P * PAGE_SIZE``.
      num_tokens: T, the step's tokens with padding; static.
      backend: which implementation ``paged_attention`` is to run; static.
      max_query_len: static upper bound of query tokens a sequence, if known; 1 makes a decode-only step cheaper.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    num_sequences, table_width = expect_rank("page_table", page_table, 2)
    expect_int32("page_table", page_table, (num_sequences, table_width))
    expect_int32("query_start", query_start, (num_sequences + 1,))
    expect_int32("context_len", context_len, (num_sequences,))
    planner = triton.plan if backend == "triton" else reference.plan
    return planner(page_table, query_start, context_len, num_tokens=num_tokens, max_query_len=max_query_len)


def paged_attention(
    q: jax.Array, pool: jax.Array, layer: int, plan: AttentionPlan, *, num_kv_heads: int, scale: float
) -> jax.Array:
    """Causal attention of every token over its own sequence's pages: decode, chunked prefill, and any mixture.

    Semantics, with ``page_table``, ``query_start`` and ``context_len`` as given to ``plan_attention``, for sequence s,
    query token t with ``query_start[s] <= t < query_start[s + 1]`` at position
    ``p = context_len[s] - query_start[s + 1] + t``, head h of KV head ``g = h // (H // num_kv_heads)``::

        row(c)    = page_table[s, c // PAGE_SIZE] * PAGE_SIZE + c % PAGE_SIZE
        w[c]      = softmax over c in [0, p] of  scale * q[t, h] . K[row(c), g]
        out[t, h] = sum over c of  w[c] * V[row(c), g]

    with ``K = pool[layer, 0]`` and ``V = pool[layer, 1]``, each row seen as ``[num_kv_heads, D]``. Products and the
    softmax accumulate in float32.

    Padding: tokens from ``query_start[S]`` on belong to no sequence; their output is 0. A sequence without
    query tokens is skipped. Entries of ``page_table`` past a sequence's context are never used.

    Args:
      q: ``[T, H, D]``, any float dtype; H a multiple of ``num_kv_heads``.
      pool: ``[layers, 2, rows, num_kv_heads * D]``; the K and V of the query tokens are already written.
      layer: which layer's planes to read; static.
      plan: from ``plan_attention``, for the same T.
      num_kv_heads: KV heads; static.
      scale: multiplies the scores; static.

    Returns:
      ``[T, H, D]`` of q's dtype.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
      NotImplementedError: the plan's back end cannot do this shape; the message names one that can.
    """
    _, num_heads, head_dim = expect_rank("q", q, 3)
    check_pool(pool, layer, num_kv_heads * head_dim)
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, which is not a multiple of num_kv_heads={num_kv_heads}")
    backend = triton if isinstance(plan, TritonAttentionPlan) else reference
    return backend.paged_attention(q, pool, layer, plan, num_kv_heads=num_kv_heads, scale=scale)


def write_kv(
    pool: jax.Array, layer: int, rows: jax.Array, k: jax.Array, v: jax.Array, *, backend: Backend
) -> jax.Array:
    """Writes the K and V of new tokens into the pool; in place where the caller has donated it.

    Semantics: ``pool[layer, 0, rows[t]] = k[t]`` and ``pool[layer, 1, rows[t]] = v[t]``, cast to the pool's dtype.
    Padding: padded tokens name a row of the trash page; rows of the trash page may repeat and hold any value after.

    Args:
      pool: ``[layers, 2, rows, W]``.
      layer: static.
      rows: ``[T]`` int32, distinct outside the trash page.
      k, v: ``[T, W]``.
      backend: static.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    num_tokens, width = expect_rank("k", k, 2)
    check_pool(pool, layer, width)
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")
    expect_int32("rows", rows, (num_tokens,))
    return (triton if backend == "triton" else reference).write_kv(pool, layer, rows, k, v)
