"""Ragged paged attention, and rotary embedding with the KV write: contracts, argument checks, choice of back end."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.float8 import ScaledProduct
from pallas_kernels.paged_attention import hopper, reference, rotary_reference, rotary_triton, triton
from pallas_kernels.paged_attention.hopper import HopperAttentionPlan
from pallas_kernels.paged_attention.reference import ReferenceAttentionPlan
from pallas_kernels.paged_attention.triton import TritonAttentionPlan
from pallas_kernels.pool import Layer, check_pool, check_tokens_per_row, expect_int32, expect_rank

AttentionPlan = ReferenceAttentionPlan | TritonAttentionPlan | HopperAttentionPlan
"""Opaque to callers but for ``tokens_per_row``, as given to ``plan_attention``; its type says which back end runs."""


class _BackEnd(NamedTuple):
    """One back end's functions, which take arguments that this module has checked."""

    plan: Callable[..., AttentionPlan]
    paged_attention: Callable[..., jax.Array]
    rotary_write_kv: Callable[..., tuple[jax.Array, jax.Array]]


_BACK_ENDS: dict[Backend, _BackEnd] = {
    "reference": _BackEnd(reference.plan, reference.paged_attention, rotary_reference.rotary_write_kv),
    "triton": _BackEnd(triton.plan, triton.paged_attention, rotary_triton.rotary_write_kv),
    "hopper": _BackEnd(hopper.plan, hopper.paged_attention, rotary_triton.rotary_write_kv),
}
_OF_PLAN: dict[type[AttentionPlan], _BackEnd] = {
    ReferenceAttentionPlan: _BACK_ENDS["reference"],
    TritonAttentionPlan: _BACK_ENDS["triton"],
    HopperAttentionPlan: _BACK_ENDS["hopper"],
}


def plan_attention(
    page_table: jax.Array,
    query_start: jax.Array,
    context_len: jax.Array,
    *,
    num_tokens: int,
    num_kv_heads: int,
    backend: Backend,
    max_query_len: int | None = None,
    tokens_per_row: int = 1,
) -> AttentionPlan:
    """Works out once a step what ``paged_attention`` needs in every layer.

    Args:
      page_table: ``[S, P]`` int32 page numbers.
      query_start: ``[S + 1]`` int32, non-decreasing from 0: first query token of each sequence.
      context_len: ``[S]`` int32, tokens of each sequence including its query tokens; at most
        ``P * PAGE_SIZE * tokens_per_row``.
      num_tokens: T, the step's tokens with padding; static.
      num_kv_heads: KV heads of every layer, as ``paged_attention`` gets them; static.
      backend: which implementation ``paged_attention`` is to run; static.
      max_query_len: static upper bound of query tokens a sequence, if known; 1 makes a decode-only step cheaper.
      tokens_per_row: how many tokens have their K in one row of the pool: 1, in the pool's dtype, or as many as an
        element of the pool has bytes, in float8_e4m3fn (see ``pallas_kernels.pool``); static.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    num_sequences, table_width = expect_rank("page_table", page_table, 2)
    expect_int32("page_table", page_table, (num_sequences, table_width))
    expect_int32("query_start", query_start, (num_sequences + 1,))
    expect_int32("context_len", context_len, (num_sequences,))
    planner = _BACK_ENDS[backend].plan
    sizes = {
        "num_tokens": num_tokens,
        "num_kv_heads": num_kv_heads,
        "max_query_len": max_query_len,
        "tokens_per_row": tokens_per_row,
    }
    return planner(page_table, query_start, context_len, **sizes)


def paged_attention(
    q: jax.Array, pool: jax.Array, layer: Layer, plan: AttentionPlan, *, num_kv_heads: int, scale: float
) -> jax.Array:
    """Causal attention of every token over its own sequence's pages: decode, chunked prefill, and any mixture.

    Semantics, with ``page_table``, ``query_start`` and ``context_len`` as given to ``plan_attention``, for sequence s,
    query token t with ``query_start[s] <= t < query_start[s + 1]`` at position
    ``p = context_len[s] - query_start[s + 1] + t``, head h of KV head ``g = h // (H // num_kv_heads)``::

        row(c)    = page_table[s, c // N] * N + c % N,    N = PAGE_SIZE * tokens_per_row
        w[c]      = softmax over c in [0, p] of  scale * q[t, h] . K[row(c), g]
        out[t, h] = sum over c of  w[c] * V[row(c), g]

    with ``K = pool[layer, 0]`` and ``V = pool[layer, 1]`` as token rows, each seen as ``[num_kv_heads, D]``. Both
    matmuls and the softmax accumulate in float32.

    Padding: tokens from ``query_start[S]`` on belong to no sequence; their output is 0. A sequence without
    query tokens is skipped. Entries of ``page_table`` past a sequence's context are never used.

    Args:
      q: ``[T, H, D]``, any float dtype; H a multiple of ``num_kv_heads``.
      pool: ``[layers, 2, rows, num_kv_heads * D]``; the K and V of the query tokens are already written.
      layer: which layer's planes to read.
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
    check_tokens_per_row(pool, plan.tokens_per_row)
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, which is not a multiple of num_kv_heads={num_kv_heads}")
    attend = _OF_PLAN[type(plan)].paged_attention
    return attend(q, pool, layer, plan, num_kv_heads=num_kv_heads, scale=scale)


def rotary_write_kv(
    qkv: jax.Array | ScaledProduct,
    rope: tuple[jax.Array, jax.Array],
    pool: jax.Array,
    layer: Layer,
    rows: jax.Array,
    *,
    num_kv_heads: int,
    head_dim: int,
    backend: Backend,
    tokens_per_row: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Rotates q and k of new tokens (arXiv 2104.09864), and writes their K and V into the pool.

    Semantics, with ``D = head_dim``, ``K = num_kv_heads`` and the columns of ``qkv`` seen as the heads
    ``[q_0 .. q_(H-1) | k_0 .. k_(K-1) | v_0 .. v_(K-1)]`` of D elements each, for token t, head h, ``i < D / 2``::

        rotate(x)[i]         = x[i] * cos[t, i] - x[i + D / 2] * sin[t, i]
        rotate(x)[i + D / 2] = x[i + D / 2] * cos[t, i] + x[i] * sin[t, i]

        q[t, h]                    = rotate(q_h[t])
        pool[layer, 0, rows[t], h] = rotate(k_h[t])
        pool[layer, 1, rows[t], h] = v_h[t]

    with the pool's token rows seen as ``[K, D]``; rotated in float32, cast to the dtype of ``q`` and of the token
    rows. Float8 takes what is beyond its largest number as that number. The two halves of D are the pair's parts, as
    in Hugging Face checkpoints. The write is in place where the caller has donated the pool.

    Padding: padded tokens name a row of the trash page; rows of the trash page may repeat and hold any value after.

    Args:
      qkv: ``[T, (H + 2 * K) * D]``, any float dtype; H a multiple of K. Or a product of that shape whose scales are
        still to be applied.
      rope: cosine and sine, ``[T, D / 2]`` float32 each.
      pool: ``[layers, 2, rows, K * D]``.
      layer: which layer's planes to write.
      rows: ``[T]`` int32 token rows, distinct outside the trash page.
      num_kv_heads, head_dim: static; ``head_dim`` even.
      backend: static.
      tokens_per_row: as for ``plan_attention``; static.

    Returns:
      Rotated q ``[T, H, D]`` of qkv's dtype, of the pool's where qkv is a product, and the pool.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    num_tokens, width = expect_rank("qkv", qkv.sums if isinstance(qkv, ScaledProduct) else qkv, 2)
    if isinstance(qkv, ScaledProduct):
        qkv.check("qkv", qkv.shape)
    check_pool(pool, layer, num_kv_heads * head_dim)
    check_tokens_per_row(pool, tokens_per_row)
    group, rest = divmod(width - 2 * num_kv_heads * head_dim, num_kv_heads * head_dim)
    if group < 1 or rest or head_dim % 2:
        raise ValueError(
            f"qkv must be [T, (H + 2 * {num_kv_heads}) * {head_dim}] with H a multiple of {num_kv_heads} and an even "
            f"head_dim, got {qkv.shape}"
        )
    for name, angles in zip(("cos", "sin"), rope, strict=True):
        if angles.shape != (num_tokens, head_dim // 2) or angles.dtype != jnp.float32:
            expected = (num_tokens, head_dim // 2)
            raise ValueError(f"{name} must be float32 {expected}, got {angles.dtype} {angles.shape}")
    expect_int32("rows", rows, (num_tokens,))
    write = _BACK_ENDS[backend].rotary_write_kv
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "tokens_per_row": tokens_per_row}
    return write(qkv, rope, pool, layer, rows, **sizes)
