"""Plain-JAX gathered LoRA: what a CPU runs. See ``api`` for the contract.

The rank rows of all adapters in the batch are stacked into one matrix of ``total_rank`` rows, so that each module is
two dense matmuls whose width follows the sum of the real ranks; a mask keeps each token to its own adapter's rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.pool import PAGE_SIZE, owner, take


@struct.dataclass
class ReferenceLoraPlan:
    """What every layer of a step needs to know of its adapters: M modules, R stacked rank rows of each.

    Attributes:
      rows: ``[2 * M, 2, R, C]`` int32: plane and pool row of each chunk of every module's stacked A, then B; C the most
        chunks that one has.
      exists: ``[M, R]`` bool; the other stacked rows are padding.
      index: ``[M, R]`` int32, index of each stacked row within its adapter's rank.
      own: ``[M, T, R]`` bool, whether a stacked row belongs to the token's adapter.
      column: ``[M, T, max_rank]`` int32, the token's own stacked rows, counted through a flattened ``[T, R]``.
      scale: ``[M, T, max_rank]`` float32, 0 past the token's rank.
      chunks: static; of every module's A, then B.
    """

    rows: jax.Array
    exists: jax.Array
    index: jax.Array
    own: jax.Array
    column: jax.Array
    scale: jax.Array
    chunks: tuple[int, ...] = struct.field(pytree_node=False)
    active: tuple[int, ...] = struct.field(pytree_node=False)
    widths: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)


def plan(segments, *, num_tokens, row_width, widths):
    """Stacks the adapters' rank rows; ``api.plan_lora`` has the arguments' meaning."""
    last = segments.rank.shape[0] - 1
    segment = owner(segments.token_start, jnp.arange(num_tokens, dtype=jnp.int32))
    has_segment = (segment >= 0) & (segment <= last)
    segment = jnp.clip(segment, 0, last)
    # All modules at once: a function for each would take seven times as long to compile.
    of, exists, index, own, column, scale = jax.vmap(
        partial(_stack, segments, segment=segment, has_segment=has_segment), in_axes=(1, 1)
    )(segments.rank, segments.scale)
    starts = jnp.concatenate([segments.start_a, segments.start_b], axis=1)
    chunks = [-(-width // row_width) for side in zip(*widths, strict=True) for width in side]
    rows = jax.vmap(partial(_locate, segments, chunks=max(chunks)), in_axes=(1, 0, 0, 1))(
        starts, *(jnp.concatenate([array, array]) for array in (of, index)), jnp.tile(segments.rank, 2)
    )
    # The layers' gathers read these index arrays; without the barrier XLA recomputes them inside every gather.
    arrays = jax.lax.optimization_barrier((rows, exists, index, own, column, scale))
    return ReferenceLoraPlan(*arrays, tuple(chunks), segments.active, tuple(widths), max_rank=segments.max_rank)


def _stack(segments, ranks, scales, *, segment, has_segment):
    """Returns, for one module, which segment each stacked row is of, and the plan's arrays but for ``rows``."""
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
    return (
        of,
        exists,
        index,
        has_segment[:, None] & exists & (of == segment[:, None]),
        token[:, None] * segments.total_rank + column,
        jnp.where(lane < own_rank[:, None], scales[segment][:, None], 0.0),
    )


def _locate(segments, starts, of, index, ranks, *, chunks):
    """Returns plane and row ``[2, R, chunks]`` of the stacked rows' chunks, without meaning where a row is padding."""
    entry = (starts[of] + index)[:, None] + jnp.arange(chunks, dtype=jnp.int32) * ranks[of][:, None]
    num_pages = segments.page_start[of + 1] - segments.page_start[of]
    rows_per_plane = (PAGE_SIZE * jnp.maximum(num_pages, 1))[:, None]
    plane, row = entry // rows_per_plane, entry % rows_per_plane
    page_index = segments.page_start[of][:, None] + row // PAGE_SIZE
    page = segments.pages[jnp.clip(page_index, 0, segments.pages.shape[0] - 1)]
    return jnp.stack([jnp.clip(plane, 0, 1), page * PAGE_SIZE + row % PAGE_SIZE])


def lora_shrink(x, pool, layer, plan: ReferenceLoraPlan, modules):
    """Projects every token to its adapter's rank; ``api.lora_shrink`` has the arguments' meaning."""
    outputs = []
    for m in modules:
        a = _read(pool, layer, plan, m, x.shape[1])
        all_ranks = jax.lax.dot_general(
            x, a, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        picked = take(all_ranks.reshape(-1), plan.column[m])
        # Multiplying by 0 would not do: padding tokens may hold anything.
        outputs.append(jnp.where(plan.scale[m] == 0.0, 0.0, picked * plan.scale[m]))
    return jnp.stack(outputs, axis=1)


def lora_expand(partial_sums, pool, layer, plan: ReferenceLoraPlan, modules, dtype):
    """Computes every token's low-rank update; ``api.lora_expand`` has the arguments' meaning."""
    outputs = []
    for j, m in enumerate(modules):
        b = _read(pool, layer, plan, len(plan.widths) + m, plan.widths[m][1])
        spread = jnp.where(plan.own[m], take(partial_sums[:, j].T, plan.index[m]).T, 0.0)
        outputs.append(jax.lax.dot(spread, b.astype(jnp.float32), precision="highest"))
    return jnp.concatenate(outputs, axis=1).astype(dtype)


def lora_delta(x, pool, layer, plan: ReferenceLoraPlan, modules):
    """Shrinks and expands; ``api.lora_delta`` has the arguments' meaning."""
    return lora_expand(lora_shrink(x, pool, layer, plan, modules), pool, layer, plan, modules, x.dtype)


def _read(pool, layer, plan, side, width):
    """Returns one stacked matrix ``[R, width]``, padding rows 0: free pages may hold anything, NaN included.

    ``side`` is a place in ``plan.rows``.
    """
    plane, row = plan.rows[side, :, :, : plan.chunks[side]]
    exists = plan.exists[side % len(plan.widths)]
    chunks = take(pool.reshape(-1, pool.shape[3]), (2 * layer + plane) * pool.shape[2] + row)
    matrix = chunks.reshape(exists.shape[0], -1)[:, :width]
    return jax.lax.select(jnp.broadcast_to(exists[:, None], matrix.shape), matrix, jnp.zeros_like(matrix))
