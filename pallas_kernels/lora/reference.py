"""Plain-JAX gathered LoRA: what a CPU runs. See ``api`` for the contract.

The rank rows of all adapters in the batch are stacked into one matrix of ``total_rank`` rows, so that each module is
two dense products whose width follows the sum of the real ranks; a mask keeps each token to its own adapter's rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.pool import PAGE_SIZE, owner, take


@partial(struct.dataclass, frozen=True)
class ModulePlan:
    """One module's part of a ``ReferenceLoraPlan``; R stacked rank rows.

    Attributes:
      rows_a: ``[2, R, chunks of d_in]`` int32: plane and pool row of each chunk of the stacked A.
      rows_b: ``[2, R, chunks of d_out]`` int32, the same of B.
      exists: ``[R]`` bool; the other stacked rows are padding.
      index: ``[R]`` int32, index of each stacked row within its adapter's rank.
      own: ``[T, R]`` bool, whether a stacked row belongs to the token's adapter.
      column: ``[T, max_rank]`` int32, the token's own stacked rows, counted through a flattened ``[T, R]``.
      scale: ``[T, max_rank]`` float32, 0 past the token's rank.
    """

    rows_a: jax.Array
    rows_b: jax.Array
    exists: jax.Array
    index: jax.Array
    own: jax.Array
    column: jax.Array
    scale: jax.Array


@partial(struct.dataclass, frozen=True)
class ReferenceLoraPlan:
    """What every layer of a step needs to know of its adapters."""

    modules: tuple[ModulePlan, ...]
    active: tuple[int, ...] = struct.field(pytree_node=False)
    widths: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)


def plan(segments, *, num_tokens, row_width, widths):
    last = segments.rank.shape[0] - 1
    segment = owner(segments.token_start, jnp.arange(num_tokens, dtype=jnp.int32))
    has_segment = (segment >= 0) & (segment <= last)
    segment = jnp.clip(segment, 0, last)
    modules = tuple(
        _plan_module(segments, m, segment, has_segment, row_width, *width) for m, width in enumerate(widths)
    )
    # The layers' gathers read these index arrays; without the barrier XLA recomputes them inside every gather.
    return ReferenceLoraPlan(
        jax.lax.optimization_barrier(modules), segments.active, tuple(widths), max_rank=segments.max_rank
    )


def _plan_module(segments, m, segment, has_segment, row_width, d_in, d_out):
    ranks = segments.rank[:, m]
    starts = jnp.cumulative_sum(ranks, include_initial=True).astype(jnp.int32)
    stacked = jnp.arange(segments.total_rank, dtype=jnp.int32)
    of = owner(starts, stacked)
    exists = of < ranks.shape[0]
    of = jnp.minimum(of, ranks.shape[0] - 1)
    index = jnp.clip(stacked - starts[of], 0, segments.max_rank - 1)
    lane = jnp.arange(segments.max_rank, dtype=jnp.int32)
    own_rank = jnp.where(has_segment, ranks[segment], 0)
    token = jnp.arange(segment.shape[0], dtype=jnp.int32)
    column = jnp.minimum(starts[segment][:, None] + lane, segments.total_rank - 1)
    locate = partial(_locate, segments, of=of, index=index, ranks=ranks)
    return ModulePlan(
        rows_a=locate(segments.start_a[:, m], chunks=-(-d_in // row_width)),
        rows_b=locate(segments.start_b[:, m], chunks=-(-d_out // row_width)),
        exists=exists,
        index=index,
        own=has_segment[:, None] & exists & (of == segment[:, None]),
        column=token[:, None] * segments.total_rank + column,
        scale=jnp.where(lane < own_rank[:, None], segments.scale[segment, m][:, None], 0.0),
    )


def _locate(segments, starts, *, of, index, ranks, chunks):
    """Plane and row ``[2, R, chunks]`` of every chunk of the stacked rows; of no meaning where none exists."""
    entry = (starts[of] + index)[:, None] + jnp.arange(chunks, dtype=jnp.int32) * ranks[of][:, None]
    num_pages = segments.page_start[of + 1] - segments.page_start[of]
    rows_per_plane = (PAGE_SIZE * jnp.maximum(num_pages, 1))[:, None]
    plane, row = entry // rows_per_plane, entry % rows_per_plane
    page_index = segments.page_start[of][:, None] + row // PAGE_SIZE
    page = segments.pages[jnp.clip(page_index, 0, segments.pages.shape[0] - 1)]
    return jnp.stack([jnp.clip(plane, 0, 1), page * PAGE_SIZE + row % PAGE_SIZE])


def lora_shrink(x, pool, layer, plan: ReferenceLoraPlan, modules):
    outputs = []
    for m in modules:
        of = plan.modules[m]
        a = _read(pool, layer, of.rows_a, of.exists, x.shape[1])
        products = jax.lax.dot_general(
            x, a, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        picked = take(products.reshape(-1), of.column)
        # Not a product with 0: padding tokens may hold anything.
        outputs.append(jnp.where(of.scale == 0.0, 0.0, picked * of.scale))
    return jnp.stack(outputs, axis=1)


def lora_expand(partial_sums, pool, layer, plan: ReferenceLoraPlan, modules, dtype):
    outputs = []
    for j, m in enumerate(modules):
        of = plan.modules[m]
        b = _read(pool, layer, of.rows_b, of.exists, plan.widths[m][1])
        spread = jnp.where(of.own, take(partial_sums[:, j].T, of.index).T, 0.0)
        outputs.append(jax.lax.dot(spread, b.astype(jnp.float32), precision="highest"))
    return jnp.concatenate(outputs, axis=1).astype(dtype)


def lora_delta(x, pool, layer, plan: ReferenceLoraPlan, modules):
    return lora_expand(lora_shrink(x, pool, layer, plan, modules), pool, layer, plan, modules, x.dtype)


def _read(pool, layer, rows, exists, width):
    """The stacked matrix ``[R, width]``, padding rows 0: free pages may hold anything, NaN included."""
    num_rows = pool.shape[2]
    chunks = take(pool.reshape(-1, pool.shape[3]), (2 * layer + rows[0]) * num_rows + rows[1])
    matrix = chunks.reshape(exists.shape[0], -1)[:, :width]
    return jax.lax.select(jnp.broadcast_to(exists[:, None], matrix.shape), matrix, jnp.zeros_like(matrix))
