"""What the paper measures gathered LoRA against, and without what.

The adapters of a batch padded to one rank and multiplied densely are plain JAX, as the paper's "S-LoRA-bmm" is plain
PyTorch: A and B of each adapter are copied out of the pool into ``[G, R, d]``, R one rank for all, and each token
multiplies its own.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import PAGE_SIZE, LoraSegments, SentSums, lora_shrink
from pallas_kernels.pool import owner, take
from slora_jax.model.llama import GATHERED, LoraOps


def _send_nothing(x, pool, layer, plan, modules, group, *, by_rank: bool) -> SentSums:
    own = lora_shrink(x, pool, layer, plan, modules)
    return SentSums(jnp.tile(own, (1, 1, group.size)) if by_rank else own, None, by_rank, plan.max_rank)


SILENT = GATHERED._replace(send=_send_nothing)
"""Adapters on several devices without what they add to the messages: wrong results, in the time that right ones would
take if sending took none. The paper's figure 8 has the same."""


class _Module(NamedTuple):
    """``rows_a [G, R, chunks of d_in]`` and ``rows_b``: plane * rows + row of each chunk; ``scale [G, R]``, 0 beyond
    the rank."""

    planes_a: jax.Array
    rows_a: jax.Array
    planes_b: jax.Array
    rows_b: jax.Array
    scale: jax.Array


@partial(struct.dataclass, frozen=True)
class PaddedPlan:
    """What every layer of a step needs: by module, and the segment ``[T]`` of each token (G: none)."""

    modules: tuple[_Module, ...]
    segment: jax.Array
    widths: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    active: tuple[int, ...] = struct.field(pytree_node=False)


@lru_cache
def padded_lora(rank: int) -> LoraOps:
    """Padded products for adapters of at most this rank: an engine refuses to run others on them.

    Equal for equal ranks, so that compiled steps are found.
    """
    return LoraOps(partial(_plan, rank), _delta, rank)


def _plan(padded_rank: int, segments: LoraSegments, *, num_tokens, row_width, widths, backend) -> PaddedPlan:
    num_segments = segments.rank.shape[0]
    segment = owner(segments.token_start, jnp.arange(num_tokens, dtype=jnp.int32))
    segment = jnp.where((segment >= 0) & (segment < num_segments), segment, num_segments)
    lane = jnp.arange(padded_rank, dtype=jnp.int32)

    def locate(starts, ranks, width):
        chunk = jnp.arange(-(-width // row_width), dtype=jnp.int32)
        entry = starts[:, None, None] + lane[:, None] + chunk * ranks[:, None, None]
        num_pages = jnp.diff(segments.page_start)[:, None, None]
        rows_per_plane = PAGE_SIZE * jnp.maximum(num_pages, 1)
        plane, row = jnp.clip(entry // rows_per_plane, 0, 1), entry % rows_per_plane
        page = segments.page_start[:-1, None, None] + row // PAGE_SIZE
        pages = segments.pages[jnp.minimum(page, segments.pages.shape[0] - 1)]
        return plane, pages * PAGE_SIZE + row % PAGE_SIZE

    modules = []
    for m, (d_in, d_out) in enumerate(widths):
        ranks = segments.rank[:, m]
        scale = jnp.where(lane < ranks[:, None], segments.scale[:, m, None], 0.0)
        a, b = locate(segments.start_a[:, m], ranks, d_in), locate(segments.start_b[:, m], ranks, d_out)
        modules.append(_Module(*a, *b, scale))
    return PaddedPlan(jax.lax.optimization_barrier(tuple(modules)), segment, tuple(widths), segments.active)


def _delta(x, pool, layer, plan: PaddedPlan, modules) -> jax.Array:
    num_segments = plan.modules[0].scale.shape[0]
    own = jnp.minimum(plan.segment, num_segments - 1)
    has_adapter = (plan.segment < num_segments)[:, None]
    outputs = []
    for m in modules:
        of = plan.modules[m]
        exists = (of.scale != 0.0)[:, :, None]
        # Free pages may hold anything, NaN included.
        a = jnp.where(exists, _read(pool, layer, of.planes_a, of.rows_a, plan.widths[m][0]), 0)
        b = jnp.where(exists, _read(pool, layer, of.planes_b, of.rows_b, plan.widths[m][1]), 0)
        einsum = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
        low = einsum("td,trd->tr", x, a[own]) * of.scale[own]
        out = einsum("tr,tro->to", low.astype(x.dtype), b[own])
        outputs.append(jnp.where(has_adapter, out, 0.0))
    return jnp.concatenate(outputs, axis=1).astype(x.dtype)


def _read(pool, layer, planes, rows, width) -> jax.Array:
    """``[G, R, width]``."""
    flat = pool.reshape(-1, pool.shape[3])
    chunks = take(flat, (2 * layer + planes) * pool.shape[2] + rows)
    return chunks.reshape(*rows.shape[:2], -1)[:, :, :width]
