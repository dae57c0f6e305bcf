"""Ragged paged attention for Hopper GPUs: plan and launches. See ``api`` for the contract.

A Mosaic kernel, ``mosaic_kernel``, does the tiles that ``work`` cuts: 1.3 times as fast as the Triton one on an H200.
The Triton back end's kernels then do the decoding sequences, and write them into the same output.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import MOSAIC_DTYPES, MOSAIC_HEAD_DIMS
from pallas_kernels.mosaic_launch import mosaic_call
from pallas_kernels.paged_attention import mosaic_kernel, triton, work
from pallas_kernels.paged_attention.mosaic_kernel import QUERY_TILE, Sizes
from pallas_kernels.paged_attention.work import Tiles, Work
from pallas_kernels.pool import Layer, layer_array
from pallas_kernels.tuning import block_sizes, device_kind


@struct.dataclass
class HopperAttentionPlan:
    """What every layer of a step needs to know of its sequences.

    Attributes:
      work: the batch, cut into work; Mosaic does the tiles and Triton the rest.
      tokens_per_row: static; always 1.
    """

    work: Work
    tokens_per_row: int = struct.field(pytree_node=False, default=1)


def plan(
    page_table: jax.Array,
    query_start: jax.Array,
    context_len: jax.Array,
    *,
    num_tokens: int,
    num_kv_heads: int,
    max_query_len: int | None = None,
    tokens_per_row: int = 1,
) -> HopperAttentionPlan:
    """Cuts the batch for this GPU; ``api.plan_attention`` has the arguments' meaning.

    Raises:
      NotImplementedError: K and V in float8, which the tensor cores would need converted in shared memory.
    """
    if tokens_per_row != 1:
        raise NotImplementedError("the Mosaic kernel takes K and V in the pool's dtype, not in float8: use triton")
    cut = work.cut(
        page_table,
        query_start,
        context_len,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        query_tile=QUERY_TILE,
        min_chunk=block_sizes("attention_plan", device_kind(), "any")["min_chunk"],
        levels=triton.levels_of(num_kv_heads),
    )
    return HopperAttentionPlan(cut)


def paged_attention(
    q: jax.Array, pool: jax.Array, layer: Layer, plan: HopperAttentionPlan, *, num_kv_heads: int, scale: float
) -> jax.Array:
    """Attention of every token over its own sequence's pages; ``api.paged_attention`` has the arguments' meaning.

    Raises:
      NotImplementedError: a head size, group, scale or dtype that only other back ends have.
    """
    triton.check_supported(q, pool, num_kv_heads=num_kv_heads, scale=scale)
    page_table, tiles = plan.work.page_table, plan.work.tiles
    out = None
    if tiles is not None:
        out = attend_tiles(q, pool, layer, page_table, tiles, num_kv_heads=num_kv_heads, scale=scale)
    return triton.attend_decoding(q, pool, layer, plan.work, out, num_kv_heads=num_kv_heads, scale=scale)


def attend_tiles(
    q: jax.Array,
    pool: jax.Array,
    layer: Layer,
    page_table: jax.Array,
    tiles: Tiles,
    *,
    num_kv_heads: int,
    scale: float,
    sizes: Sizes | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Attention of the tiles' tokens; the output's other tokens are not written.

    Args:
      q: ``[T, H, D]``, D 64 or 128.
      pool: ``[layers, 2, rows, num_kv_heads * D]`` of q's dtype.
      layer: an int, or an int32 scalar array.
      page_table: ``[S, P]`` int32.
      tiles: of at most ``QUERY_TILE`` tokens each.
      num_kv_heads, scale: static.
      sizes: how the work is cut; None takes the sizes measured for this GPU.
      interpret: parameters of the interpreter; None compiles for a GPU.

    Returns:
      ``[max(T, QUERY_TILE), H, D]`` of q's dtype. Not cut to T here: XLA hands a slice to the next kernel as a view of
      this buffer, and loses what a kernel writes into it in place.

    Raises:
      NotImplementedError: a head size, scale or dtype that only other back ends have.
    """
    num_tokens, _, head_dim = q.shape
    if q.dtype != pool.dtype or q.dtype not in MOSAIC_DTYPES or head_dim not in MOSAIC_HEAD_DIMS or scale <= 0:
        raise NotImplementedError(
            "the Mosaic kernel does head_dim 64 and 128, a positive scale, and q and pool both bfloat16 or float16; got"
            f" head_dim {head_dim}, scale {scale}, q {q.dtype} and pool {pool.dtype}: use triton"
        )
    sizes = sizes or Sizes(**block_sizes("mosaic_attention", device_kind(), "half"))
    if num_tokens < QUERY_TILE:
        q = jnp.pad(q, ((0, QUERY_TILE - num_tokens), (0, 0), (0, 0)))
    operands = (
        q,
        pool.reshape(-1, pool.shape[3]),
        page_table,
        tiles.records,
        tiles.count,
        layer_array(layer),
        jnp.full(1, q.shape[0], jnp.int32),
    )
    options: dict[str, Any] = {"num_rows": pool.shape[2], "num_kv_heads": num_kv_heads, "scale": scale, "sizes": sizes}
    if interpret is not None:
        return launch(*operands, **options, interpret=interpret)
    # Steps differ in the numbers of tokens, sequences and tiles.
    return mosaic_call(launch, *operands, any_length=(0, 2, 3), length=q.shape[0], **options)


def launch(
    q: jax.Array,
    *operands: jax.Array,
    sizes: Sizes,
    interpret: plgpu.InterpretGPUParams | None = None,
    **options: Any,
) -> jax.Array:
    """Launches ``mosaic_kernel.attend``, which says what the operands and options are; returns its output."""
    return plgpu.kernel(
        partial(mosaic_kernel.attend, **options, sizes=sizes, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={"buffers": mosaic_kernel.buffers(sizes, q.shape[2], q.dtype)},
        # Not fewer for fewer tiles: programs of all sizes share one kernel. What finds no tile ends at once.
        grid=(sizes.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, *operands)
