"""Gathered LoRA (the paper's MBGMV and MBGMM): contracts and argument checks.

``y + scale * (x A^T) B^T`` for a ragged batch, as two functions so that a sharded caller can put a collective on the
rank-sized partial between them. A and B are read from the pool's pages where they lie.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.backend import Backend
from pallas_kernels.lora import reference, triton
from pallas_kernels.lora.reference import ReferenceLoraPlan
from pallas_kernels.lora.triton import TritonLoraPlan
from pallas_kernels.pool import check_pool, expect_int32, expect_rank

LoraPlan = ReferenceLoraPlan | TritonLoraPlan
"""Opaque to callers; its type says which back end runs."""


@partial(struct.dataclass, frozen=True)
class LoraSegments:
    """Which tokens take which adapter, and where its rows are.

    Tokens of one adapter are contiguous: a *segment*. Tokens outside ``[token_start[0], token_start[G])`` have none.
    For an adapter of N pages, ``R = PAGE_SIZE * N``, list entry e is row ``e mod R`` of plane ``e div R``, and row j
    is pool row ``pages[page_start + j div PAGE_SIZE] * PAGE_SIZE + j mod PAGE_SIZE``. The chunk
    ``A[i, c*W : (c+1)*W]`` of module m is entry ``start_a[m] + c * rank[m] + i``; ``B[c*W : (c+1)*W, i]`` is entry
    ``start_b[m] + c * rank[m] + i``; W is the pool's row width, and the last chunk is zero-padded.

    Attributes:
      token_start: ``[G + 1]`` int32, non-decreasing; an empty segment is padding.
      page_start: ``[G + 1]`` int32 into ``pages``; segment g has ``page_start[g + 1] - page_start[g]`` pages.
      pages: ``[N]`` int32 page numbers.
      rank: ``[G, M]`` int32, 0 where the adapter leaves a module alone; at most ``max_rank``.
      start_a, start_b: ``[G, M]`` int32.
      scale: ``[G, M]`` float32.
      max_rank: static bound of any rank here: the width of the partial between shrink and expand.
      total_rank: static bound of the sum over segments of the rank of any one module.
    """

    token_start: jax.Array
    page_start: jax.Array
    pages: jax.Array
    rank: jax.Array
    start_a: jax.Array
    start_b: jax.Array
    scale: jax.Array
    max_rank: int = struct.field(pytree_node=False)
    total_rank: int = struct.field(pytree_node=False)


def plan_lora(
    segments: LoraSegments, *, num_tokens: int, row_width: int, widths: Sequence[tuple[int, int]], backend: Backend
) -> LoraPlan:
    """Works out once a step what ``lora_shrink`` and ``lora_expand`` need in every layer.

    Args:
      segments: the batch's adapters.
      num_tokens: T, the step's tokens with padding; static.
      row_width: W, the pool's row width; static.
      widths: ``(d_in, d_out)`` of each of the M modules; static.
      backend: which implementation ``lora_shrink`` and ``lora_expand`` are to run; static.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    num_segments, num_modules = expect_rank("segments.rank", segments.rank, 2)
    for name in ("token_start", "page_start"):
        expect_int32(f"segments.{name}", getattr(segments, name), (num_segments + 1,))
    for name in ("rank", "start_a", "start_b"):
        expect_int32(f"segments.{name}", getattr(segments, name), (num_segments, num_modules))
    if segments.scale.shape != (num_segments, num_modules):
        raise ValueError(f"segments.scale must be [{num_segments}, {num_modules}], got {segments.scale.shape}")
    if len(widths) != num_modules:
        raise ValueError(f"widths must name {num_modules} modules, got {len(widths)}")
    planner = triton.plan if backend == "triton" else reference.plan
    _widths[:] = widths
    return planner(segments, num_tokens=num_tokens, row_width=row_width, widths=tuple(widths))


def lora_shrink(x: jax.Array, pool: jax.Array, layer: int, plan: LoraPlan, modules: Sequence[int]) -> jax.Array:
    """Projects every token to its adapter's rank, for several modules that read the same input.

    Semantics, with the ``segments`` given to ``plan_lora``, for token t of segment g and ``m = modules[j]``::

        out[t, j, i] = scale[g, m] * sum over d of  x[t, d] * A[g, m][i, d]    for i < rank[g, m], else 0

    accumulated in float32. Tokens without a segment get 0.

    Args:
      x: ``[T, d_in]``.
      pool: ``[layers, 2, rows, W]``.
      layer, modules: static.
      plan: from ``plan_lora``, for the same T.

    Returns:
      ``[T, len(modules), max_rank]`` float32.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    expect_rank("x", x, 2)
    _check(pool, layer, plan, modules)
    return _backend(plan).lora_shrink(x, pool, layer, plan, tuple(modules))


def lora_expand(
    partial_sums: jax.Array,
    ys: Sequence[jax.Array],
    pool: jax.Array,
    layer: int,
    plan: LoraPlan,
    modules: Sequence[int],
) -> tuple[jax.Array, ...]:
    """Adds every token's low-rank update to the base model's outputs.

    Semantics, with the ``segments`` given to ``plan_lora``, for token t of segment g and ``m = modules[j]``::

        out[j][t, d] = ys[j][t, d] + sum over i < rank[g, m] of  partial_sums[t, j, i] * B[g, m][d, i]

    accumulated in float32, cast to the dtype of ``ys[j]``. Tokens without a segment keep ``ys``.

    Args:
      partial_sums: ``[T, len(modules), max_rank]`` float32, as from ``lora_shrink``.
      ys: one ``[T, d_out]`` a module; widths may differ.
      pool, layer, plan, modules: as in ``lora_shrink``.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    _check(pool, layer, plan, modules)
    expected = (partial_sums.shape[0], len(modules), plan.max_rank)
    if partial_sums.shape != expected or partial_sums.dtype != jnp.float32:
        raise ValueError(f"partial_sums must be float32 {expected}, got {partial_sums.dtype} {partial_sums.shape}")
    _check_outputs(ys, expected[0], modules)
    return _backend(plan).lora_expand(partial_sums, tuple(ys), pool, layer, plan, tuple(modules))


_widths = []


def lora_delta(x: jax.Array, pool: jax.Array, layer, plan: LoraPlan, modules: Sequence[int]) -> jax.Array:
    """Stand-in."""
    sums = _backend(plan).lora_shrink(x, pool, layer, plan, tuple(modules))
    zeros = tuple(jnp.zeros((x.shape[0], _widths[m][1]), x.dtype) for m in modules)
    return jnp.concatenate(_backend(plan).lora_expand(sums, zeros, pool, layer, plan, tuple(modules)), axis=1)


def _backend(plan: LoraPlan):
    return triton if isinstance(plan, TritonLoraPlan) else reference


def _check(pool: jax.Array, layer: int, plan: LoraPlan, modules: Sequence[int]) -> None:
    check_pool(pool, layer)
    if not all(0 <= m < len(plan.modules) for m in modules):
        raise ValueError(f"modules must be in [0, {len(plan.modules)}), got {tuple(modules)}")


def _check_outputs(ys: Sequence[jax.Array], num_tokens: int, modules: Sequence[int]) -> None:
    if len(ys) != len(modules) or any(y.ndim != 2 or y.shape[0] != num_tokens for y in ys):
        raise ValueError(f"ys must be {len(modules)} arrays [{num_tokens}, d_out], got {[y.shape for y in ys]}")
