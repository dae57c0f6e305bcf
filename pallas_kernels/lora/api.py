"""Gathered LoRA (the paper's MBGMV and MBGMM): contracts, argument checks, choice of back end.

``scale * (x A^T) B^T`` for a ragged batch. A and B are read from the pool's pages where they lie.

One device calls ``lora_delta``. Several devices call ``lora_send`` ahead of the base model's product and
``lora_receive`` behind it, so that what they send each other is on its way meanwhile.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pallas_kernels.backend import Backend
from pallas_kernels.collectives import Collectives, all_gather, all_reduce
from pallas_kernels.lora import reference, triton
from pallas_kernels.lora.reference import ReferenceLoraPlan
from pallas_kernels.lora.triton import TritonLoraPlan
from pallas_kernels.pool import Layer, check_pool, expect_int32, expect_rank

LoraPlan = ReferenceLoraPlan | TritonLoraPlan
"""Opaque to callers; its type says which back end runs."""


@struct.dataclass
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
      active: static; modules that some adapter may change. The others have rank 0 throughout, and a caller can leave
        them out.
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
    active: tuple[int, ...] = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)
    total_rank: int = struct.field(pytree_node=False)


class _BackEnd(NamedTuple):
    """One back end's functions, which take arguments that this module has checked."""

    plan: Callable[..., LoraPlan]
    lora_shrink: Callable[..., jax.Array]
    lora_expand: Callable[..., jax.Array]
    lora_delta: Callable[..., jax.Array]


_TRITON = _BackEnd(triton.plan, triton.lora_shrink, triton.lora_expand, triton.lora_delta)
_BACK_ENDS: dict[Backend, _BackEnd] = {
    "reference": _BackEnd(reference.plan, reference.lora_shrink, reference.lora_expand, reference.lora_delta),
    "triton": _TRITON,
    "hopper": _TRITON,
}
_OF_PLAN: dict[type[LoraPlan], _BackEnd] = {
    ReferenceLoraPlan: _BACK_ENDS["reference"],
    TritonLoraPlan: _BACK_ENDS["triton"],
}


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
    planner = _BACK_ENDS[backend].plan
    return planner(segments, num_tokens=num_tokens, row_width=row_width, widths=tuple(widths))


def lora_shrink(x: jax.Array, pool: jax.Array, layer: Layer, plan: LoraPlan, modules: Sequence[int]) -> jax.Array:
    """Projects every token to its adapter's rank, for several modules that read the same input.

    Semantics, with the ``segments`` given to ``plan_lora``, for token t of segment g and ``m = modules[j]``::

        out[t, j, i] = scale[g, m] * sum over d of  x[t, d] * A[g, m][i, d]    for i < rank[g, m], else 0

    accumulated in float32. Tokens without a segment get 0.

    Args:
      x: ``[T, d_in]``.
      pool: ``[layers, 2, rows, W]``.
      layer: an int, or an int32 scalar array.
      plan: from ``plan_lora``, for the same T.
      modules: static.

    Returns:
      ``[T, len(modules), max_rank]`` float32.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    _check(x, pool, layer, plan, modules)
    return _OF_PLAN[type(plan)].lora_shrink(x, pool, layer, plan, tuple(modules))


def lora_expand(
    partial_sums: jax.Array,
    pool: jax.Array,
    layer: Layer,
    plan: LoraPlan,
    modules: Sequence[int],
    dtype: jnp.dtype,
) -> jax.Array:
    """Computes every token's low-rank update of the base model's outputs, for several modules side by side.

    Semantics, with the ``segments`` given to ``plan_lora``, for token t of segment g and ``m = modules[j]``::

        out[t, first[j] + d] = sum over i < rank[g, m] of  partial_sums[t, j, i] * B[g, m][d, i]

    where ``first[j]`` is the sum of d_out of the modules before, accumulated in float32. Tokens without a segment and
    modules of rank 0 get 0.

    Args:
      partial_sums: ``[T, len(modules), max_rank]`` float32, as from ``lora_shrink``.
      pool, layer, plan, modules: as in ``lora_shrink``.
      dtype: of the result.

    Returns:
      ``[T, sum of d_out]``.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    _check_modules(pool, layer, plan, modules)
    expected = (partial_sums.shape[0], len(modules), plan.max_rank)
    if partial_sums.shape != expected or partial_sums.dtype != jnp.float32:
        raise ValueError(f"partial_sums must be float32 {expected}, got {partial_sums.dtype} {partial_sums.shape}")
    expand = _OF_PLAN[type(plan)].lora_expand
    return expand(partial_sums, pool, layer, plan, tuple(modules), jnp.dtype(dtype))


def lora_delta(x: jax.Array, pool: jax.Array, layer: Layer, plan: LoraPlan, modules: Sequence[int]) -> jax.Array:
    """Returns ``lora_expand(lora_shrink(x, ...), ..., x.dtype)``, for a caller with nothing to do in between.

    The update is not added to the base's output here, because a matmul takes a term to start from for free:
    ``dot(x, W) + lora_delta(x, ...)`` is one call of the GPU's library, while an update in place would read and write
    the output once more. Arguments and errors are those of ``lora_shrink`` and ``lora_expand``.
    """
    _check(x, pool, layer, plan, modules)
    return _OF_PLAN[type(plan)].lora_delta(x, pool, layer, plan, tuple(modules))


@struct.dataclass
class SentSums:
    """Partial sums of all devices, on their way to ``lora_receive``.

    Attributes:
      sums: ``[T, len(modules), rank]`` float32 that have arrived; None where they are in the devices' memory.
      mail: what stands for them there, of the back end's; else None.
      by_rank: static; how they were sent.
      max_rank: static; width of what each device sent.
    """

    sums: jax.Array | None
    mail: tuple[jax.Array, ...] | None
    by_rank: bool = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)


def lora_send(
    x: jax.Array,
    pool: jax.Array,
    layer: Layer,
    plan: LoraPlan,
    modules: Sequence[int],
    group: Collectives,
    *,
    by_rank: bool,
) -> SentSums:
    """Projects every token to its adapter's rank on several devices, each with its share of A (the paper's section 6).

    ``lora_receive`` must follow, then a collective of the group's, and only then may there be another ``lora_send`` of
    the same ``by_rank``: the devices keep room for one at a time.

    Args:
      x, pool, layer, plan, modules: as in ``lora_shrink``, of this device's share.
      group: the devices.
      by_rank: each device has all of x, and of A the ranks i, i + N, i + 2N and so on, where i is its place. Else each
        has all ranks, for its own part of the input. Static.

    Returns:
      What ``lora_receive`` takes.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    _check(x, pool, layer, plan, modules)
    num_tokens, modules = x.shape[0], tuple(modules)
    if isinstance(plan, TritonLoraPlan) and triton.can_mail(num_tokens, modules, plan.max_rank, group):
        mail = triton.lora_send(x, pool, layer, plan, modules, group, by_rank)
        return SentSums(None, mail, by_rank, plan.max_rank)
    # Modules that no adapter changes are not sent.
    changed = [m for m in modules if m in plan.active]
    partial_sums = lora_shrink(x, pool, layer, plan, changed)
    sums = gathered_ranks(partial_sums, group) if by_rank else all_reduce(partial_sums, group)
    if len(changed) < len(modules):
        places = np.array([modules.index(m) for m in changed])
        sums = jnp.zeros((num_tokens, len(modules), sums.shape[2]), jnp.float32).at[:, places].set(sums)
    return SentSums(sums, None, by_rank, plan.max_rank)


def lora_receive(
    y: jax.Array,
    sent: SentSums,
    pool: jax.Array,
    layer: Layer,
    plan: LoraPlan,
    modules: Sequence[int],
    group: Collectives,
) -> jax.Array:
    """Adds every token's low-rank update to the base model's outputs on several devices.

    Args:
      y: what the base model's product gave. Of what was sent ``by_rank`` ``[T, sum of d_out]``: this device's columns.
        Else ``[T, N * d_out]``: this device's term of a sum over devices, of which it updates the columns
        ``[i * d_out, (i + 1) * d_out)``, where i is its place.
      sent: from ``lora_send`` of the same modules.
      pool, layer, modules: as in ``lora_expand``.
      plan: as in ``lora_expand``, with whole ranks and this device's share of B.
      group: the devices.

    Returns:
      As y, updated.

    Raises:
      ValueError: a shape or dtype that does not fit the above.
    """
    _check_modules(pool, layer, plan, modules)
    width = sum(plan.widths[m][1] for m in modules) * (1 if sent.by_rank else group.size)
    if y.ndim != 2 or y.shape[1] != width:
        raise ValueError(f"y must be [T, {width}], got {y.shape}")
    if sent.sums is None:
        assert isinstance(plan, TritonLoraPlan), "both plans are of one back end"
        return triton.lora_receive(y, sent.mail, pool, layer, plan, tuple(modules), sent.max_rank, group, sent.by_rank)
    delta = lora_expand(sent.sums, pool, layer, plan, modules, y.dtype)
    # Nothing between the product and the sum: cuBLAS then does both in one kernel.
    return y + delta if sent.by_rank else add_to_own_columns(y, delta, group)


def gathered_ranks(partial_sums: jax.Array, group: Collectives) -> jax.Array:
    """All devices' ``[T, M, r]`` as ``[T, M, N * r]``, in the order of ranks: device i has the ranks i, i + N, ..."""
    gathered = all_gather(partial_sums, partial_sums.ndim, group)
    return gathered.reshape(*partial_sums.shape[:2], -1)


def add_to_own_columns(y: jax.Array, delta: jax.Array, group: Collectives) -> jax.Array:
    """Adds one device's columns of a low-rank update ``[T, h / N]`` to its term ``[T, h]`` of the base's all-reduce.

    That collective then brings everyone's columns to everyone: the update needs none of its own.
    """
    first = jax.lax.axis_index(group.axis_name) * delta.shape[1]
    own = jax.lax.dynamic_slice_in_dim(y, first, delta.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(y, own + delta, first, axis=1)


def _check(x, pool, layer, plan: LoraPlan, modules: Sequence[int]) -> None:
    _, d_in = expect_rank("x", x, 2)
    _check_modules(pool, layer, plan, modules)
    wrong = {m: plan.widths[m][0] for m in modules if plan.widths[m][0] != d_in}
    if wrong:
        raise ValueError(f"x has {d_in} columns, but the modules' d_in are {wrong}")


def _check_modules(pool, layer, plan: LoraPlan, modules: Sequence[int]) -> None:
    check_pool(pool, layer)
    if not all(0 <= m < len(plan.widths) for m in modules):
        raise ValueError(f"modules must be in [0, {len(plan.widths)}), got {tuple(modules)}")
