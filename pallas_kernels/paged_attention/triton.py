"""Ragged paged attention for NVIDIA GPUs, from Ampere on, in Triton: plan and launches. See ``api`` for the contract.

Two kernels of ``triton_kernels`` share a batch, which ``work`` cuts for them: one takes the chunks of the decoding
sequences' contexts, the other the tiles of all other query tokens. A third puts the parts of a context of several
chunks together, in order. All of them write into one output.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import triton
from flax import struct

from pallas_kernels import launch
from pallas_kernels.paged_attention import triton_kernels, work
from pallas_kernels.paged_attention.work import ITEM_LEVELS, Tiles, Work
from pallas_kernels.pool import PAGE_SIZE, Layer, layer_array
from pallas_kernels.tuning import block_sizes, device_kind

MAX_HEAD_DIM = 128
MAX_GROUP = 64

_DECODE_KEYS = ("multi_head", "grouped", "float32", "multi_head_float8", "grouped_float8")
_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"), jnp.dtype("float32"))


@struct.dataclass
class TritonAttentionPlan:
    """What every layer of a step needs to know of its sequences.

    Attributes:
      work: the batch, cut into work; Triton does all of it.
      tokens_per_row: static; see ``pallas_kernels.pool``.
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
) -> TritonAttentionPlan:
    """Cuts the batch for this GPU; ``api.plan_attention`` has the arguments' meaning."""
    sizes = block_sizes("attention_plan", device_kind(), "any")
    cut = work.cut(
        page_table,
        query_start,
        context_len,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        query_tile=sizes["query_tile"],
        min_chunk=sizes["min_chunk"],
        levels=levels_of(num_kv_heads),
    )
    return TritonAttentionPlan(cut, tokens_per_row)


def levels_of(num_kv_heads: int) -> tuple[int, ...]:
    """The levels, of those that contexts can be cut at, that ``attend_decoding`` may take for so many KV heads."""
    wanted = {block_sizes("decode_attention", device_kind(), key)["programs"] for key in _DECODE_KEYS}
    return tuple(sorted({_level(ITEM_LEVELS, num_kv_heads, programs) for programs in wanted}))


def _level(levels: Sequence[int], num_kv_heads: int, programs: int) -> int:
    """The lowest level that gives as many programs, else the highest."""
    return next((level for level in levels if level * num_kv_heads >= programs), levels[-1])


def paged_attention(
    q: jax.Array, pool: jax.Array, layer: Layer, plan: TritonAttentionPlan, *, num_kv_heads: int, scale: float
) -> jax.Array:
    """Attention of every token over its own sequence's pages; ``api.paged_attention`` has the arguments' meaning.

    Raises:
      NotImplementedError: a head size, group or dtype that only the reference has.
    """
    check_supported(q, pool, num_kv_heads=num_kv_heads, scale=scale)
    page_table, tiles = plan.work.page_table, plan.work.tiles
    options: dict[str, Any] = {
        "num_kv_heads": num_kv_heads,
        "scale": scale,
        "tokens_per_row": plan.tokens_per_row,
    }
    out = None
    if tiles is not None:
        out = _attend_tiles(q, pool, layer, page_table, tiles, **options)
    return attend_decoding(q, pool, layer, plan.work, out, **options)


def check_supported(q: jax.Array, pool: jax.Array, *, num_kv_heads: int, scale: float) -> None:
    """Raises NotImplementedError for a head size, a group, a scale or a dtype that only the reference has."""
    head_dim, group = q.shape[2], q.shape[1] // num_kv_heads
    if {q.dtype, pool.dtype} - set(_DTYPES) or head_dim > MAX_HEAD_DIM or group > MAX_GROUP or scale <= 0:
        raise NotImplementedError(
            f"the Triton kernels do head_dim up to {MAX_HEAD_DIM}, up to {MAX_GROUP} query heads a KV head, a positive"
            f" scale and 16- and 32-bit floats; got head_dim {head_dim}, {group} heads, scale {scale}, q {q.dtype}"
            f" and pool {pool.dtype}: use the reference"
        )


def attend_decoding(
    q: jax.Array,
    pool: jax.Array,
    layer: Layer,
    work: Work,
    out: jax.Array | None,
    *,
    num_kv_heads: int,
    scale: float,
    tokens_per_row: int = 1,
) -> jax.Array:
    """Attention of the decoding tokens, written in place beside what ``out`` holds for the others.

    Args:
      q: ``[T, H, D]``, of a kind that ``check_supported`` lets pass.
      pool: ``[layers, 2, rows, num_kv_heads * D]``.
      layer: an int, or an int32 scalar array.
      work: the batch, cut into work.
      out: ``[T or more, H, D]`` of q's dtype, with the attention of the tiles' tokens; None when there are no tiles.
      num_kv_heads, scale, tokens_per_row: static.

    Returns:
      ``[T, H, D]`` of q's dtype.
    """
    options = {"num_kv_heads": num_kv_heads, "scale": scale, "tokens_per_row": tokens_per_row}
    constants = _constants(q, pool, work.page_table, **options)
    group, num_heads = constants["GROUP"], constants["HEADS"]
    key = "multi_head" if group == 1 else "float32" if constants["FLOAT32"] else "grouped"
    if tokens_per_row > 1 and key != "float32":
        key += "_float8"
    sizes = block_sizes("decode_attention", device_kind(), key)
    cuts = {decode.level: decode for decode in work.decode}
    decode = cuts[_level(tuple(cuts), num_kv_heads, sizes["programs"])]
    num_items = decode.items.shape[0]
    partial_types = (
        jax.ShapeDtypeStruct((num_items, num_heads, q.shape[2]), jnp.float32),
        jax.ShapeDtypeStruct((num_items, num_heads), jnp.float32),
    )
    call = partial(
        launch.triton_call,
        *(q, pool, work.page_table, decode.items, layer_array(layer), pool.shape[2] * tokens_per_row),
        kernel=triton_kernels._decode_kernel,
        grid=(num_kv_heads, num_items),
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        FIELDS=decode.items.shape[1],
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_N=sizes["block_n"],
        STAGES=sizes["num_stages"],
        DOT=group > 1,
        **constants,
    )
    if out is None:
        out, parts, lse = call(out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), *partial_types))
        out_ref = jax.new_ref(out)
    else:
        out_ref = jax.new_ref(out)
        parts, lse = call(out_ref, out_type=partial_types)
    # Of many rows most are whole already, and several heads share the look; the parts of few are summed a head each.
    sizes = block_sizes("combine_attention", device_kind(), "many" if decode.rows.shape[0] > 64 else "few")
    block_h = min(sizes["block_h"], num_heads)
    launch.triton_call(
        parts,
        lse,
        decode.rows,
        out_ref,
        kernel=triton_kernels._combine_kernel,
        out_type=(),
        grid=(triton.cdiv(num_heads, block_h), decode.rows.shape[0]),
        num_warps=sizes["num_warps"],
        num_stages=1,
        BLOCK_H=block_h,
        FIELDS=decode.rows.shape[1],
        HEADS=num_heads,
        D=constants["D"],
        BLOCK_D=constants["BLOCK_D"],
        BLOCK_N=sizes["block_n"],
    )
    return jax.freeze(out_ref)[: q.shape[0]]


def _attend_tiles(q, pool, layer, page_table, tiles: Tiles, *, num_kv_heads, scale, tokens_per_row):
    """Attention ``[T, H, D]`` of the tiles' tokens; the output's other tokens are not written."""
    options = {"num_kv_heads": num_kv_heads, "scale": scale, "tokens_per_row": tokens_per_row}
    constants = _constants(q, pool, page_table, **options)
    key = "float32" if constants["FLOAT32"] else "float8" if tokens_per_row > 1 else "half"
    sizes = block_sizes("prefill_attention", device_kind(), key)
    split = tiles.size // sizes["block_m"]
    num_tiles, fields = tiles.records.shape
    return launch.triton_call(
        q,
        pool,
        page_table,
        tiles.records,
        tiles.count,
        layer_array(layer),
        pool.shape[2] * tokens_per_row,
        kernel=triton_kernels._tile_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Most of ``tiles`` is padding when many sequences decode, and a program of this size does not start for free.
        grid=(min(sizes["programs"], q.shape[1] * num_tiles * split),),
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        FIELDS=fields,
        SPLIT=split,
        BLOCK_M=sizes["block_m"],
        BLOCK_N=sizes["block_n"],
        **constants,
    )


def _constants(q, pool, page_table, *, num_kv_heads, scale, tokens_per_row):
    """What both kernels that read K and V are compiled for."""
    _, num_heads, head_dim = q.shape
    return {
        "SCALE": scale * 1.4426950408889634,  # log2(e): the softmax is in powers of two
        "HEADS": num_heads,
        "GROUP": num_heads // num_kv_heads,
        "D": head_dim,
        "W": pool.shape[3],
        "TABLE_WIDTH": page_table.shape[1],
        "PAGE": PAGE_SIZE * tokens_per_row,
        "FLOAT8": tokens_per_row > 1,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "FLOAT32": q.dtype == jnp.float32 or q.dtype != pool.dtype,
    }
