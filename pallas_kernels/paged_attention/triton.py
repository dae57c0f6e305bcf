"""Ragged paged attention for NVIDIA GPUs, from Ampere on, in Triton. See ``api`` for the contract.

Semantics, for query token t of sequence s at position p, head h of KV head ``g = h // (H // num_kv_heads)``::

    w[c]      = softmax over c in [0, p] of  scale * q[t, h] . K[row(s, c), g]
    out[t, h] = sum over c of  w[c] * V[row(s, c), g]

Shapes: ``q [T, H, D]``, pool ``[layers, 2, rows, num_kv_heads * D]``, ``page_table [S, P]``; padding tokens give 0.

Two kernels share a batch. A sequence with one query token *decodes*: bound by the bytes of K and V, so one program
reads a *chunk* of its context once for all query heads of one KV head. Chunks are cut on the device each step so that
few long sequences and many short ones both give about as many programs as the GPU runs at once; a sequence of several
chunks gets its parts put together, in order, by a third kernel. Every other sequence is cut into *tiles* of query
tokens: bound by operations, so one program holds a tile's queries of one head and walks the keys up to the diagonal.
On Hopper GPUs a Mosaic kernel, ``mosaic``, does the tiles instead: 1.3 times as fast on an H200.

K and V rows are never loaded under a mask over keys: a lane past the context reads the last row of the context, which
costs no memory traffic, and its score is masked. Sums are float32 and their order does not depend on timing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax_triton as jt
import triton
import triton.language as tl
from flax import struct

from pallas_kernels.paged_attention import mosaic
from pallas_kernels.pool import PAGE_SIZE, layer_array, owner
from pallas_kernels.tuning import block_sizes, device_kind

MAX_HEAD_DIM = 128
MAX_GROUP = 64
ITEM_FIELDS = 8
"""Integers of a work item: token, sequence, first key, end of keys, whether it is one part of several; unused."""
ROW_FIELDS = 4
"""Integers of a decoding row: token or -1, first item, number of items; unused."""
TILE_FIELDS = 4
"""Integers of a tile: first token, number of tokens, sequence, position of the first token."""
ITEM_LEVELS = tuple(2**i for i in range(5, 12))
"""Numbers of chunks the decoding contexts can be cut into; each layer takes one by its number of KV heads."""

_CHUNK_UNIT = 64
_FEW_ROWS = 16
"""Up to so many decoding rows all run at once, and putting them in order costs more than it saves."""
_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"), jnp.dtype("float32"))


@partial(struct.dataclass, frozen=True)
class DecodeItems:
    """The decoding contexts, cut into chunks.

    Attributes:
      items: ``[N, ITEM_FIELDS]`` int32; an item without keys is padding.
      rows: ``[R, ROW_FIELDS]`` int32, one row a decoding token; no items: the token is padding.
    """

    items: jax.Array
    rows: jax.Array


@partial(struct.dataclass, frozen=True)
class TritonAttentionPlan:
    """What every layer of a step needs to know of its sequences.

    Attributes:
      page_table: ``[S, P]`` int32.
      decode: for each of ``ITEM_LEVELS``, the sequences of one query token. Those not used are never computed in jit.
      tiles: ``[N, TILE_FIELDS]`` int32, the other sequences and the padding tokens; None when no sequence has
        several tokens.
      num_tiles: ``[1]`` int32, how many of these there are; the rest is padding. None like ``tiles``.
      query_tile: most tokens of a tile.
      tiles_in_mosaic: whether ``mosaic.attend_tiles`` does the tiles.
    """

    page_table: jax.Array
    decode: tuple[DecodeItems, ...]
    tiles: jax.Array | None
    num_tiles: jax.Array | None
    query_tile: int = struct.field(pytree_node=False)
    tiles_in_mosaic: bool = struct.field(pytree_node=False)


def plan(
    page_table, query_start, context_len, *, num_tokens, max_query_len=None, tiles_in_mosaic=False
) -> TritonAttentionPlan:
    """See ``api.plan_attention``."""
    sizes = block_sizes("attention_plan", device_kind(), "any")
    # A buffer of its own: XLA hands a kernel a slice of a larger buffer in place, and Triton needs 16-byte alignment.
    page_table = jnp.maximum(page_table, 0)
    num_sequences = page_table.shape[0]
    counts = jnp.diff(query_start)
    if max_query_len == 1:
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        sequence = owner(query_start, token)
        real = sequence < num_sequences
        sequence = jnp.minimum(sequence, num_sequences - 1)
        length = jnp.where(real, context_len[sequence], 0)
        tiles = num_tiles = None
    else:
        sequence = jnp.arange(num_sequences, dtype=jnp.int32)
        single = counts == 1
        token = jnp.where(single, query_start[:-1], -1)
        length = jnp.where(single, context_len, 0)
        tiles, num_tiles = _tiles(query_start, context_len, num_tokens, sizes["query_tile"])
    decode = tuple(_decode_items(token, sequence, length, level, sizes["min_chunk"]) for level in ITEM_LEVELS)
    return TritonAttentionPlan(
        page_table, decode, tiles, num_tiles, query_tile=sizes["query_tile"], tiles_in_mosaic=tiles_in_mosaic
    )


def _decode_items(token, sequence, length, level, min_chunk) -> DecodeItems:
    """Cuts contexts of ``length [R]`` into at most ``level + R`` chunks, those of one context of about one size."""
    num_rows = token.shape[0]
    if num_rows > _FEW_ROWS:
        # The longest first, so that what ends last is short.
        order = jnp.argsort(-length)
        token, sequence, length = token[order], sequence[order], length[order]
    chunk = jnp.maximum(_round_up(triton.cdiv(jnp.sum(length), level), _CHUNK_UNIT), min_chunk)
    parts = -(-length // chunk)
    first = jnp.cumulative_sum(parts, include_initial=True).astype(jnp.int32)
    item = jnp.arange(level + num_rows, dtype=jnp.int32)
    row = owner(first, item)
    real = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    size = _round_up(-(-length // jnp.maximum(parts, 1)), _CHUNK_UNIT)[row]
    begin = (item - first[row]) * size
    end = jnp.where(real, jnp.minimum(begin + size, length[row]), begin)
    zero = jnp.zeros_like(item)
    items = jnp.stack([token[row], sequence[row], begin, end, (parts > 1)[row].astype(jnp.int32), *[zero] * 3], axis=1)
    rows = jnp.stack([token, first[:-1], parts, jnp.zeros_like(token)], axis=1)
    return DecodeItems(items, rows)


def _tiles(query_start, context_len, num_tokens, query_tile):
    """Tiles of the sequences of several tokens, and of the padding tokens, as a last sequence before all keys; and
    their number.
    """
    num_sequences = context_len.shape[0]
    starts = query_start
    ends = jnp.append(query_start[1:], num_tokens).astype(jnp.int32)
    counts = ends - starts
    position = jnp.append(context_len - counts[:-1], -num_tokens).astype(jnp.int32)
    counts = jnp.where((counts == 1) & (jnp.arange(num_sequences + 1) < num_sequences), 0, counts)
    first = jnp.cumulative_sum(-(-counts // query_tile), include_initial=True).astype(jnp.int32)
    tile = jnp.arange(num_tokens // query_tile + num_sequences + 1, dtype=jnp.int32)
    sequence = jnp.minimum(owner(first, tile), num_sequences)
    offset = (tile - first[sequence]) * query_tile
    count = jnp.clip(counts[sequence] - offset, 0, query_tile)
    table_row = jnp.minimum(sequence, num_sequences - 1)
    tiles = jnp.stack([starts[sequence] + offset, count, table_row, position[sequence] + offset], axis=1)
    return tiles, first[-1:]


def _round_up(value, unit):
    return -(-value // unit) * unit


def paged_attention(q, pool, layer, plan: TritonAttentionPlan, *, num_kv_heads, scale):
    """See ``api.paged_attention``.

    Raises:
      NotImplementedError: a head size, group or dtype that only the reference has.
    """
    _, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    _check_supported(q.dtype, pool.dtype, head_dim, group, scale)
    constants = {
        "SCALE": scale * 1.4426950408889634,  # log2(e): the softmax is in powers of two
        "HEADS": num_heads,
        "GROUP": group,
        "D": head_dim,
        "W": pool.shape[3],
        "TABLE_WIDTH": plan.page_table.shape[1],
        "PAGE": PAGE_SIZE,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "FLOAT32": q.dtype == jnp.float32 or q.dtype != pool.dtype,
    }
    arguments = q, pool, plan.page_table, layer_array(layer), pool.shape[2]
    if plan.tiles is None:
        out = None
    elif plan.tiles_in_mosaic:
        tiles = plan.page_table, plan.tiles, plan.num_tiles
        out = mosaic.attend_tiles(q, pool, *tiles, layer, num_kv_heads=num_kv_heads, scale=scale)
    else:
        out = _attend_tiles(arguments, plan, constants)
    return _decode(arguments, plan, out, constants)[: q.shape[0]]


def _check_supported(query_dtype, pool_dtype, head_dim, group, scale):
    if {query_dtype, pool_dtype} - set(_DTYPES) or head_dim > MAX_HEAD_DIM or group > MAX_GROUP or scale <= 0:
        raise NotImplementedError(
            f"the Triton kernels do head_dim up to {MAX_HEAD_DIM}, up to {MAX_GROUP} query heads a KV head, a positive"
            f" scale and 16- and 32-bit floats; got head_dim {head_dim}, {group} heads, scale {scale}, q {query_dtype}"
            f" and pool {pool_dtype}: use the reference"
        )


def _attend_tiles(arguments, plan, constants):
    """Attention of the tiles' tokens; the output's other tokens are not written."""
    q, pool, page_table, layer, num_rows = arguments
    sizes = block_sizes("prefill_attention", device_kind(), "float32" if constants["FLOAT32"] else "half")
    split = plan.query_tile // sizes["block_m"]
    return jt.triton_call(
        q,
        pool,
        page_table,
        plan.tiles,
        plan.num_tiles,
        layer,
        num_rows,
        kernel=_tile_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Most of ``tiles`` is padding when many sequences decode, and a program of this size does not start for free.
        grid=(min(sizes["programs"], q.shape[1] * plan.tiles.shape[0] * split),),
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        FIELDS=TILE_FIELDS,
        SPLIT=split,
        BLOCK_M=sizes["block_m"],
        BLOCK_N=sizes["block_n"],
        **constants,
    )


def _decode(arguments, plan, out, constants):
    """Attention of the decoding tokens, added to ``out`` in place, which holds the others; None when there are none."""
    q, pool, page_table, layer, num_rows = arguments
    group, num_heads = constants["GROUP"], constants["HEADS"]
    key = "multi_head" if group == 1 else "float32" if constants["FLOAT32"] else "grouped"
    sizes = block_sizes("decode_attention", device_kind(), key)
    num_kv_heads = num_heads // group
    level = next((i for i, n in enumerate(ITEM_LEVELS) if n * num_kv_heads >= sizes["programs"]), len(ITEM_LEVELS) - 1)
    decode = plan.decode[level]
    num_items = decode.items.shape[0]
    partial_types = (
        jax.ShapeDtypeStruct((num_items, num_heads, q.shape[2]), jnp.float32),
        jax.ShapeDtypeStruct((num_items, num_heads), jnp.float32),
    )
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    has_out = out is not None
    out_ref = jax.new_ref(out) if has_out else None
    call = partial(
        jt.triton_call,
        *(q, pool, page_table, decode.items, layer, num_rows),
        kernel=_decode_kernel,
        grid=(num_kv_heads, num_items),
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        FIELDS=ITEM_FIELDS,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_N=sizes["block_n"],
        STAGES=sizes["num_stages"],
        DOT=group > 1,
        **constants,
    )
    if has_out:
        parts, lse = call(out_ref, out_type=partial_types)
    else:
        out, parts, lse = call(out_type=(out_type, *partial_types))
        out_ref = jax.new_ref(out)
    # Of many rows most are whole already, and several heads share the look; the parts of few are summed a head each.
    sizes = block_sizes("combine_attention", device_kind(), "many" if decode.rows.shape[0] > 64 else "few")
    block_h = min(sizes["block_h"], num_heads)
    jt.triton_call(
        parts,
        lse,
        decode.rows,
        out_ref,
        kernel=_combine_kernel,
        out_type=(),
        grid=(triton.cdiv(num_heads, block_h), decode.rows.shape[0]),
        num_warps=sizes["num_warps"],
        num_stages=1,
        BLOCK_H=block_h,
        FIELDS=ROW_FIELDS,
        HEADS=num_heads,
        D=constants["D"],
        BLOCK_D=constants["BLOCK_D"],
        BLOCK_N=sizes["block_n"],
    )
    return jax.freeze(out_ref)


@triton.jit
def _planes(pool, layer, num_rows, W: tl.constexpr):
    """Where the layer's K and V begin."""
    plane_size = tl.cast(num_rows, tl.int64) * W
    k_base = pool + 2 * tl.load(layer).to(tl.int64) * plane_size
    return k_base, k_base + plane_size


@triton.jit
def _pages(table, position, end, PAGE: tl.constexpr):
    """Pages of these positions of a sequence; beyond ``end`` that of the last one."""
    return tl.load(table + tl.minimum(position, end - 1).to(tl.uint32) // PAGE)


@triton.jit
def _rows(pages, position, end, PAGE: tl.constexpr):
    """Pool rows of these positions, given ``_pages`` of them."""
    return pages.to(tl.int64) * PAGE + tl.minimum(position, end - 1).to(tl.uint32) % PAGE


@triton.jit
def _load_rows(base, rows, d, D: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT32: tl.constexpr):
    """``[rows, BLOCK_D]`` of one plane and head, 0 past D."""
    pointers = base + rows[:, None] * W + d[None, :]
    if D == BLOCK_D:  # noqa: SIM108  (decided when compiled: a ternary would compile both)
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    if FLOAT32:
        block = block.to(tl.float32)
    return block


@triton.jit
def _decode_kernel(
    q,  # [T, HEADS, D]
    pool,  # [planes, num_rows, W]
    page_table,  # [S, TABLE_WIDTH]
    items,  # [N, FIELDS]
    layer,  # [1]
    num_rows,
    out,  # [T, HEADS, D]: written for items that are a whole context
    parts,  # [N, HEADS, D] float32: written for the others
    lse,  # [N, HEADS] float32: base-2 logarithm of their sum of weights
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT32: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    record = items + item * FIELDS
    token = tl.load(record).to(tl.int64)
    table = page_table + tl.load(record + 1).to(tl.int64) * TABLE_WIDTH
    begin = tl.load(record + 2)
    end = tl.load(record + 3)
    is_part = tl.load(record + 4)
    if begin < end:
        d = tl.arange(0, BLOCK_D)
        k_base, v_base = _planes(pool, layer, num_rows, W)
        k_base += kv_head * D
        v_base += kv_head * D
        if DOT:
            _decode_grouped(
                q, k_base, v_base, table, out, parts, lse, token, item, kv_head, begin, end, is_part, d,
                SCALE, HEADS, GROUP, D, W, PAGE, BLOCK_D, FLOAT32, BLOCK_G, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            _decode_single(
                q, k_base, v_base, table, out, parts, lse, token, item, kv_head, begin, end, is_part, d,
                SCALE, HEADS, D, W, PAGE, BLOCK_D, BLOCK_N, STAGES,
            )  # fmt: skip


@triton.jit
def _decode_single(
    q, k_base, v_base, table, out, parts, lse, token, item, head, begin, end, is_part, d,
    SCALE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query head: products as multiply and add, in float32, since a matrix unit would idle 15 of 16 rows."""
    n = tl.arange(0, BLOCK_N)
    query = tl.load(q + (token * HEADS + head) * D + d, mask=d < D, other=0.0).to(tl.float32) * SCALE
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    pages = _pages(table, begin + n, end, PAGE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = _rows(pages, start + n, end, PAGE)
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, True)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, True)
        # The next block's pages, so that its rows can be asked for without waiting.
        pages = _pages(table, start + BLOCK_N + n, end, PAGE)
        scores = tl.where(start + n < end, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_top)
        decay = tl.exp2(top - new_top)
        acc = acc * decay + tl.sum(weights[:, None] * v, axis=0)
        total = total * decay + tl.sum(weights, axis=0)
        top = new_top
    acc = acc / total
    if is_part == 1:
        tl.store(parts + (item * HEADS + head) * D + d, acc, mask=d < D)
        tl.store(lse + item * HEADS + head, top + tl.log2(total))
    else:
        tl.store(out + (token * HEADS + head) * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _decode_grouped(
    q, k_base, v_base, table, out, parts, lse, token, item, kv_head, begin, end, is_part, d,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT32: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head as the rows, padded, of one matrix product."""
    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + g
    inside = (g[:, None] < GROUP) & (d[None, :] < D)
    query = tl.load(q + (token * HEADS + heads[:, None]) * D + d[None, :], mask=inside, other=0.0)
    if FLOAT32:
        query = query.to(tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    pages = _pages(table, begin + n, end, PAGE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = _rows(pages, start + n, end, PAGE)
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, FLOAT32)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, FLOAT32)
        pages = _pages(table, start + BLOCK_N + n, end, PAGE)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where((start + n < end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, axis=1)
        top = new_top
    acc = acc / total[:, None]
    if is_part == 1:
        tl.store(parts + (item * HEADS + heads[:, None]) * D + d[None, :], acc, mask=inside)
        tl.store(lse + item * HEADS + heads, top + tl.log2(total), mask=g < GROUP)
    else:
        pointers = out + (token * HEADS + heads[:, None]) * D + d[None, :]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(
    parts,  # [N, HEADS, D] float32
    lse,  # [N, HEADS] float32
    rows,  # [R, FIELDS]
    out,  # [T, HEADS, D]: written for rows of several items, and set to 0 for rows of none
    BLOCK_H: tl.constexpr,
    FIELDS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: ``BLOCK_H`` heads of a row."""
    record = rows + tl.program_id(1) * FIELDS
    token = tl.load(record).to(tl.int64)
    first = tl.load(record + 1).to(tl.int64)
    count = tl.load(record + 2)
    if (token >= 0) & (count != 1):
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        begin = tl.program_id(0) * BLOCK_H
        for head in range(begin, tl.minimum(begin + BLOCK_H, HEADS)):
            top = tl.full((), float("-inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            acc = tl.zeros((BLOCK_D,), tl.float32)
            for start in range(0, count, BLOCK_N):
                index = (first + start + n) * HEADS + head
                exists = start + n < count
                logs = tl.load(lse + index, mask=exists, other=float("-inf"))
                inside = exists[:, None] & (d[None, :] < D)
                part = tl.load(parts + index[:, None] * D + d[None, :], mask=inside, other=0.0)
                new_top = tl.maximum(top, tl.max(logs, axis=0))
                weights = tl.exp2(logs - new_top)
                decay = tl.exp2(top - new_top)
                acc = acc * decay + tl.sum(weights[:, None] * part, axis=0)
                total = total * decay + tl.sum(weights, axis=0)
                top = new_top
            acc = acc / tl.where(count == 0, 1.0, total)
            tl.store(out + (token * HEADS + head) * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _tile_kernel(
    q,  # [T, HEADS, D]
    pool,  # [planes, num_rows, W]
    page_table,  # [S, TABLE_WIDTH]
    tiles,  # [N, FIELDS]
    num_tiles,  # [1]
    layer,  # [1]
    num_rows,
    out,  # [T, HEADS, D]
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT32: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: every so many-th part of ``BLOCK_M`` queries of one head."""
    num_parts = tl.load(num_tiles) * SPLIT
    for item in range(tl.program_id(0), num_parts * HEADS, tl.num_programs(0)):
        head = item % HEADS
        # The last tiles of a sequence see the most keys: they come first.
        part = num_parts - 1 - item // HEADS
        record = tiles + (part // SPLIT) * FIELDS
        first = part % SPLIT * BLOCK_M
        token = tl.load(record).to(tl.int64) + first
        count = tl.load(record + 1) - first
        if count > 0:
            table = page_table + tl.load(record + 2).to(tl.int64) * TABLE_WIDTH
            position = tl.load(record + 3) + first
            end = tl.maximum(position + tl.minimum(count, BLOCK_M), 0)
            # Keys before ``whole`` are seen by every query.
            whole = tl.maximum(position + 1, 0) // BLOCK_N * BLOCK_N
            d = tl.arange(0, BLOCK_D)
            m = tl.arange(0, BLOCK_M)
            base = (token * HEADS + head) * D
            offsets = m[:, None] * (HEADS * D) + d[None, :]
            inside = (m[:, None] < count) & (d[None, :] < D)
            query = tl.load(q + base + offsets, mask=inside, other=0.0)
            if FLOAT32:
                query = query.to(tl.float32)
            k_base, v_base = _planes(pool, layer, num_rows, W)
            k_base += head // GROUP * D
            v_base += head // GROUP * D
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            acc, total, top = _walk_keys(
                query, acc, total, top, k_base, v_base, table, position + m, 0, whole, end, d,
                SCALE, D, W, PAGE, BLOCK_D, FLOAT32, BLOCK_N, False,
            )  # fmt: skip
            acc, total, top = _walk_keys(
                query, acc, total, top, k_base, v_base, table, position + m, whole, end, end, d,
                SCALE, D, W, PAGE, BLOCK_D, FLOAT32, BLOCK_N, True,
            )  # fmt: skip
            # Padding tokens see no key.
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + base + offsets, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _walk_keys(
    query, acc, total, top, k_base, v_base, table, position, begin, stop, end, d,
    SCALE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOAT32: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys of ``[begin, stop)`` to a running softmax, where the last query sees those before ``end``."""
    n = tl.arange(0, BLOCK_N)
    pages = _pages(table, begin + n, tl.maximum(end, 1), PAGE)
    for start in tl.range(begin, stop, BLOCK_N):
        if MASKED:  # noqa: SIM108  (decided when compiled: a ternary would compile both)
            rows = _rows(pages, start + n, end, PAGE)
        else:
            # The same, where the block holds whole pages: nothing but the pages changes from block to block.
            rows = pages.to(tl.int64) * PAGE + n % PAGE
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, FLOAT32)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, FLOAT32)
        pages = _pages(table, start + BLOCK_N + n, end, PAGE)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(position[:, None] >= start + n[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * SCALE)
        weights = tl.exp2(scores * SCALE - new_top[:, None])
        decay = tl.exp2(top - new_top)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, axis=1)
        top = new_top
    return acc, total, top
