"""Gathered LoRA for NVIDIA GPUs, from Ampere on, as two Triton kernels. See ``api`` for the contract.

Semantics, for token t of segment g, ``m = modules[j]`` and ``r = rank[g, m]``::

    shrink:  out[t, j, i] = scale[g, m] * sum over d of x[t, d] * A[g, m][i, d]    for i < r
    expand:  delta[t, first_column[j] + d] = sum over i < r of out[t, j, i] * B[g, m][d, i]

Shapes: ``x [T, d_in]``, partial sums ``[splits, T, M, max_rank]`` float32, ``delta [T, sum of d_out]``, pool
``[layers, 2, rows, W]``.

The unit of work is a *tile*: at most ``token_tile`` consecutive tokens of one segment. A tile of one token, the rule
when every sequence decodes with an adapter of its own, multiplies and adds in float32 as the rows arrive; a tile of
more reads A and B once and multiplies with the matrix unit. To shrink, the modules' rank rows are *stacked*, one after
the other, so that small ranks share a block of rows and one pass over x. What a program takes on next is an *item*: a
block of stacked rows of a tile, and for tiles of more tokens one of a few ranges of d_in, so that a batch that
shares one adapter still fills the GPU. The items of a step are counted by the real ranks and shared out in a row to a
fixed number of programs: rank is never padded, neither in bytes nor in programs. A block that is cut by the rank reads
its last row again, which costs no memory traffic, and drops the result.

Padding: tokens without an adapter are tiles of rank 0: no item of shrink is theirs, and expand writes zeros. Sums over
splits are taken in order: results do not depend on timing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax_triton as jt
import triton
import triton.language as tl
from flax import struct

from pallas_kernels.pool import PAGE_SIZE, layer_array, owner
from pallas_kernels.tuning import block_sizes, device_kind

FIELDS = 8
"""Integers of a record: first token, tokens, rank, start_a, start_b, page_start, rows in a plane, scale's bits."""

_MIN_BLOCK_TILES = 1024
"""Tiles that a kernel has room for at least. Nothing else of a step's size is compiled in: few kernels serve all."""


@partial(struct.dataclass, frozen=True)
class TritonLoraPlan:
    """What every layer of a step needs to know of its adapters.

    Attributes:
      records: ``[tiles, M, FIELDS]`` int32; a tile of no tokens is padding.
      pages: the segments' ``pages``.
      active: the segments' ``active``.
      widths: ``(d_in, d_out)`` of each module.
      token_tile: most tokens of a tile.
      max_rank: width of the partial sums.
    """

    records: jax.Array
    pages: jax.Array
    active: tuple[int, ...] = struct.field(pytree_node=False)
    widths: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    token_tile: int = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)


def plan(segments, *, num_tokens, row_width, widths):
    """Cuts the batch into tiles; see ``api.plan_lora``."""
    del row_width
    token_tile = block_sizes("lora_plan", device_kind(), _kind(num_tokens))["token_tile"]
    # The tokens before the first and after the last segment are two more intervals, without an adapter.
    ends = jnp.clip(segments.token_start, 0, num_tokens)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    ends = jnp.concatenate([ends, jnp.full(1, num_tokens, jnp.int32)])
    tiles_before = jnp.cumulative_sum(-(-(ends - starts) // token_tile), include_initial=True).astype(jnp.int32)
    num_tiles = min(num_tokens, num_tokens // token_tile + starts.shape[0])
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    interval = jnp.minimum(owner(tiles_before, tile), starts.shape[0] - 1)
    first = starts[interval] + (tile - tiles_before[interval]) * token_tile
    tokens = jnp.clip(ends[interval] - first, 0, token_tile)
    last = segments.rank.shape[0] - 1
    segment = jnp.clip(interval - 1, 0, last)
    has_segment = (interval >= 1) & (interval - 1 <= last)

    def of_module(values):
        return jnp.broadcast_to(values[:, None], (num_tiles, len(widths)))

    num_pages = segments.page_start[segment + 1] - segments.page_start[segment]
    records = jnp.stack(
        [
            of_module(first),
            of_module(tokens),
            jnp.where(has_segment[:, None], segments.rank[segment], 0),
            segments.start_a[segment],
            segments.start_b[segment],
            of_module(segments.page_start[segment]),
            of_module(num_pages * PAGE_SIZE),
            jax.lax.bitcast_convert_type(segments.scale[segment].astype(jnp.float32), jnp.int32),
        ],
        axis=-1,
    )
    return TritonLoraPlan(
        records,
        segments.pages,
        active=segments.active,
        widths=tuple(widths),
        token_tile=token_tile,
        max_rank=segments.max_rank,
    )


def lora_shrink(x, pool, layer, plan: TritonLoraPlan, modules):
    """See ``api.lora_shrink``."""
    out = jnp.zeros((1, x.shape[0], len(modules), plan.max_rank), jnp.float32)
    return _shrink(x, pool, layer, plan, modules, max_splits=1, out=out)[0][0]


def lora_expand(partial_sums, pool, layer, plan: TritonLoraPlan, modules, dtype):
    """See ``api.lora_expand``."""
    return _expand(partial_sums[None], jnp.ones(1, jnp.int32), pool, layer, plan, modules, dtype)


def lora_delta(x, pool, layer, plan: TritonLoraPlan, modules):
    """See ``api.lora_delta``. With no collective between the two, the sum over splits is left to expand."""
    max_splits = block_sizes("lora_shrink", device_kind(), _kind(x.shape[0]))["max_splits"]
    partial_sums, splits = _shrink(x, pool, layer, plan, modules, max_splits=max_splits)
    return _expand(partial_sums, splits, pool, layer, plan, modules, x.dtype)


def _shrink(x, pool, layer, plan, modules, *, max_splits, out=None):
    """Partial sums ``[max_splits, T, M, max_rank]`` and the number of splits ``[1]`` int32 that were made.

    There are as many splits as it takes to give every program an item. A tile of one token writes the first split
    only, the others all that were made. Nothing is written past a tile's rank: there ``out`` shows through, or whatever
    memory held.
    """
    num_tokens, d_in = x.shape
    num_rows, width = pool.shape[2:]
    block = block_sizes("lora_shrink", device_kind(), _kind(num_tokens))
    columns = _columns(block["columns"] // _wide(x, pool), width)
    tile_columns = _columns(block["tile_columns"] // _wide(x, pool), width)
    ranks, tile_ranks = block["ranks"], block["tile_ranks"]
    product_dtype = _product_dtype(x, pool)
    if product_dtype == tl.float32:
        tile_ranks, tile_columns = min(tile_ranks, 32), min(tile_columns, 32)
    rank = jnp.sum(plan.records[:, jnp.array(modules), 2], axis=1)
    tokens = plan.records[:, 0, 1]
    of_one = tokens == 1
    blocks = jnp.where(tokens > 0, jnp.where(of_one, triton.cdiv(rank, ranks), triton.cdiv(rank, tile_ranks)), 0)
    splits = jnp.clip(block["programs"] // jnp.maximum(jnp.sum(blocks), 1), 1, max_splits).astype(jnp.int32)
    # Of an item of a tile of more tokens, in items of a tile of one: about as the bytes of A that they read.
    tile_cost = jnp.maximum(tile_ranks // (ranks * splits), 1)
    ends = jnp.cumulative_sum(blocks * jnp.where(of_one, 1, splits * tile_cost)).astype(jnp.int32)
    splits, tile_cost = splits.reshape(1), tile_cost.reshape(1)
    ref = None if out is None else jax.new_ref(out)
    out_type = jax.ShapeDtypeStruct((max_splits, num_tokens, len(modules), plan.max_rank), jnp.float32)
    num_tiles = ends.shape[0]
    arguments = (
        x,
        pool,
        plan.records,
        plan.pages,
        ends,
        splits,
        tile_cost,
        layer_array(layer),
        num_rows,
        num_tiles,
        num_tokens,
    )
    result = jt.triton_call(
        *(arguments if ref is None else (*arguments, ref)),
        kernel=_shrink_kernel,
        out_type=out_type if ref is None else (),
        grid=(block["programs"],),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.widths),
        FIELDS=FIELDS,
        BLOCK_TILES=max(_MIN_BLOCK_TILES, triton.next_power_of_2(num_tiles)),
        PROGRAMS=block["programs"],
        PAGE=PAGE_SIZE,
        D_IN=d_in,
        W=width,
        MAX_RANK=plan.max_rank,
        TOKENS=plan.token_tile,
        RANKS=ranks,
        COLUMNS=columns,
        # Ranges of d_in begin where a block of columns does.
        SPLIT_UNIT=width if width % tile_columns else tile_columns,
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        DTYPE=product_dtype,
    )
    return (result if ref is None else jax.freeze(ref)), splits


def _expand(partial_sums, splits, pool, layer, plan, modules, dtype):
    """Sums over the splits and multiplies with B."""
    num_tokens = partial_sums.shape[1]
    num_rows, width = pool.shape[2:]
    widths = tuple(plan.widths[m][1] for m in modules)
    block = block_sizes("lora_expand", device_kind(), _kind(num_tokens))
    columns = _columns(block["columns"], width)
    tile_columns = min(block["tile_columns"], columns)
    bound = triton.next_power_of_2(plan.max_rank)
    tile_ranks = min(block["tile_ranks"], max(16, bound))
    product_dtype = _product_dtype(jax.ShapeDtypeStruct((), dtype), pool)
    if product_dtype == tl.float32:
        tile_ranks, tile_columns = min(tile_ranks, 32), min(tile_columns, 64)
    first_block, first_column = [0], [0]
    for d_out in widths:
        full, rest = divmod(d_out, width)
        first_block.append(first_block[-1] + full * triton.cdiv(width, columns) + triton.cdiv(rest, columns))
        first_column.append(first_column[-1] + d_out)
    return jt.triton_call(
        partial_sums,
        pool,
        plan.records,
        plan.pages,
        splits,
        layer_array(layer),
        num_rows,
        num_tokens,
        kernel=_expand_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, first_column[-1]), dtype),
        grid=(first_block[-1], plan.records.shape[0]),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.widths),
        FIELDS=FIELDS,
        PAGE=PAGE_SIZE,
        WIDTHS=widths,
        FIRST_BLOCK=tuple(first_block),
        FIRST_COLUMN=tuple(first_column),
        W=width,
        MAX_RANK=plan.max_rank,
        TOKENS=plan.token_tile,
        RANKS=min(block["ranks"], bound),
        COLUMNS=columns,
        STAGES=block["stages"],
        SMALL_RANK=16,
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        MASKED=width % columns > 0 or any(d_out % columns for d_out in widths),
        DTYPE=product_dtype,
    )


def _kind(num_tokens):
    """Key of the block sizes: a step that mostly decodes, or one with prompts in it."""
    return "decode" if num_tokens <= 1024 else "prefill"


def _columns(wanted, width):
    """Columns of a pool row to take at a time: a power of two, one that divides the row if that is not too small."""
    divisor = width & -width
    if divisor >= min(wanted, 128):
        return min(wanted, divisor)
    return max(16, min(wanted, triton.next_power_of_2(width)))


def _wide(x, pool):
    return 2 if max(x.dtype.itemsize, pool.dtype.itemsize) > 2 else 1


def _product_dtype(array, pool):
    """The dtype in which the matrix unit multiplies: float32 unless both are of the same 16-bit type."""
    if array.dtype == pool.dtype and pool.dtype in (jnp.bfloat16, jnp.float16):
        return tl.bfloat16 if pool.dtype == jnp.bfloat16 else tl.float16
    return tl.float32


@triton.jit
def _tile(records, tile, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr):
    """First token, tokens, first page and rows in a plane."""
    at = records + tile * ALL_MODULES * FIELDS
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def _module(records, tile, module, SIDE: tl.constexpr, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr):
    """Rank, first list entry of A (side 0) or B (side 1), and scale."""
    at = records + (tile * ALL_MODULES + module) * FIELDS
    return tl.load(at + 2), tl.load(at + 3 + SIDE), tl.load(at + 7).to(tl.float32, bitcast=True)


@triton.jit
def _pick(MODULES: tl.constexpr, j):
    """``MODULES[j]``"""
    module = tl.full([], MODULES[0], tl.int32)
    for other in tl.static_range(1, len(MODULES)):
        module = tl.where(j == other, MODULES[other], module)
    return module


@triton.jit
def _pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE: tl.constexpr):
    """Rows of the pool seen as ``[layers * 2 * rows, W]`` that hold these entries of an adapter's chunk list."""
    second = entry >= plane_rows
    j = tl.where(second, entry - plane_rows, entry)
    row = tl.load(pages + j // PAGE) * PAGE + j % PAGE
    return (plane + second.to(tl.int32)).to(tl.int64) * num_rows + row


@triton.jit
def _load_columns(at, column, W: tl.constexpr, COLUMNS: tl.constexpr):
    if W % COLUMNS:
        return tl.load(at + column, mask=column < W, other=0.0)
    else:
        return tl.load(at + column)


@triton.jit
def _shrink_kernel(
    x,  # [num_tokens, D_IN]
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    ends,  # [tiles]: cost of all items up to and with this tile's
    splits_at,  # [1]
    tile_cost_at,  # [1]
    layer,  # [1]
    num_rows,
    num_tiles,
    num_tokens,
    out,  # [max_splits, num_tokens, M, MAX_RANK]
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PAGE: tl.constexpr,
    D_IN: tl.constexpr,
    W: tl.constexpr,
    MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT_UNIT: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: its share of the items, one after the other, so that it seldom comes to another tile."""
    M: tl.constexpr = len(MODULES)
    plane = 2 * tl.load(layer)
    splits = tl.load(splits_at)
    split_width = tl.cdiv(tl.cdiv(D_IN, splits), SPLIT_UNIT) * SPLIT_UNIT
    tile_cost = tl.load(tile_cost_at)
    total = tl.load(ends + num_tiles - 1).to(tl.int64)
    share_begin = (total * tl.program_id(0) // PROGRAMS).to(tl.int32)
    share_end = (total * (tl.program_id(0) + 1) // PROGRAMS).to(tl.int32)
    index = tl.arange(0, BLOCK_TILES)
    tile_ends = tl.load(ends + index, mask=index < num_tiles, other=2147483647)
    before = tile_ends <= share_begin
    tile = tl.sum(before.to(tl.int32), 0)
    begin = tl.max(tl.where(before, tile_ends, 0), 0)
    while begin < share_end:
        end = tl.load(ends + tile)
        first, tokens, page_start, plane_rows = _tile(records, tile, ALL_MODULES, FIELDS)
        x_at = x + first * D_IN
        out_at = out + first * M * MAX_RANK
        if tokens == 1:
            for block in range(tl.maximum(share_begin - begin, 0), tl.minimum(share_end, end) - begin):
                its_rows = _stacked_rows(
                    records, tile, block * RANKS + tl.arange(0, RANKS), MODULES, ALL_MODULES, FIELDS, MAX_RANK
                )
                _shrink_token(
                    x_at, pool, pages + page_start, plane, num_rows, out_at, its_rows, plane_rows,
                    PAGE, D_IN, W, RANKS, COLUMNS,
                )  # fmt: skip
        else:
            # An item belongs to the share in which it begins.
            first_item = tl.cdiv(tl.maximum(share_begin - begin, 0), tile_cost)
            for item in range(first_item, tl.cdiv(tl.minimum(share_end, end) - begin, tile_cost)):
                block = item // splits
                split = item - block * splits
                split_at = out_at + tl.cast(num_tokens, tl.int64) * (split * M * MAX_RANK)
                many_rows = _stacked_rows(
                    records, tile, block * TILE_RANKS + tl.arange(0, TILE_RANKS), MODULES, ALL_MODULES, FIELDS, MAX_RANK
                )
                _shrink_tile(
                    x_at, pool, pages + page_start, plane, num_rows, split_at, many_rows, split * split_width,
                    split_width, tokens, plane_rows,
                    PAGE, D_IN, W, M, MAX_RANK, TOKENS, TILE_RANKS, TILE_COLUMNS, DTYPE,
                )  # fmt: skip
        begin = end
        tile += 1


@triton.jit
def _stacked_rows(
    records, tile, lane, MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr, MAX_RANK: tl.constexpr
):
    """Of these lanes of the stacked rank rows: list entry of the first chunk, how far it is to the next, scale, place
    in a token's partial sums, and whether there is such a row. Lanes behind the last row are that row again.
    """
    rows = tl.full([], 0, tl.int32)
    for j in tl.static_range(len(MODULES)):
        rows += _module(records, tile, MODULES[j], 0, ALL_MODULES, FIELDS)[0]
    exists = lane < rows
    lane = tl.minimum(lane, rows - 1)
    entry = tl.zeros_like(lane)
    stride = tl.zeros_like(lane)
    place = tl.zeros_like(lane)
    scale = tl.zeros_like(lane).to(tl.float32)
    base = tl.full([], 0, tl.int32)
    for j in tl.static_range(len(MODULES)):
        rank, start, its_scale = _module(records, tile, MODULES[j], 0, ALL_MODULES, FIELDS)
        here = (lane >= base) & (rank > 0)
        entry = tl.where(here, start + lane - base, entry)
        stride = tl.where(here, rank, stride)
        place = tl.where(here, j * MAX_RANK + lane - base, place)
        scale = tl.where(here, its_scale, scale)
        base += rank
    return entry, stride, scale, place, exists


@triton.jit
def _shrink_token(
    x, pool, pages, plane, num_rows, out, stacked, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some stacked rank rows of one token."""
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    STEPS: tl.constexpr = D_IN // W * BLOCKS + (D_IN % W + COLUMNS - 1) // COLUMNS
    entry, stride, scale, place, exists = stacked
    products = tl.zeros([RANKS, COLUMNS], tl.float32)
    if STEPS <= 4:
        # All loads are on their way before the first is needed.
        for step in tl.static_range(STEPS):
            products += _shrink_products(
                x, pool, pages, plane, num_rows, entry, stride, step, plane_rows, PAGE, D_IN, W, COLUMNS, BLOCKS
            )
    else:
        for step in range(STEPS):
            products += _shrink_products(
                x, pool, pages, plane, num_rows, entry, stride, step, plane_rows, PAGE, D_IN, W, COLUMNS, BLOCKS
            )
    # Once, at the end: a sum over the program's threads makes them wait for each other.
    tl.store(out + place, tl.sum(products, 1) * scale, mask=exists)


@triton.jit
def _shrink_products(
    x, pool, pages, plane, num_rows, entry, stride, step, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    chunk = step // BLOCKS
    column = step % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    rows = _pool_rows(entry + chunk * stride, pages, plane_rows, plane, num_rows, PAGE)
    a = _load_columns(pool + (rows * W)[:, None], column[None, :], W, COLUMNS)
    d = chunk * W + column
    if W % COLUMNS:
        values = tl.load(x + d, mask=(column < W) & (d < D_IN), other=0.0)
    elif D_IN % COLUMNS:
        values = tl.load(x + d, mask=d < D_IN, other=0.0)  # A is zero past D_IN
    else:
        values = tl.load(x + d)
    return a.to(tl.float32) * values.to(tl.float32)[None, :]


@triton.jit
def _shrink_tile(
    x, pool, pages, plane, num_rows, out, stacked, d_first, split_width, tokens, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Some stacked rank rows of several tokens, over ``split_width`` of d_in from ``d_first`` on."""
    entry, stride, scale, place, row_exists = stacked
    token = tl.arange(0, TOKENS)
    x_at = x + (tl.minimum(token, tokens - 1) * D_IN)[:, None]
    total = tl.zeros([TOKENS, RANKS], tl.float32)
    d_last = tl.minimum(d_first + split_width, D_IN)
    for chunk in range(d_first // W, (d_last + W - 1) // W):
        rows = _pool_rows(entry + chunk * stride, pages, plane_rows, plane, num_rows, PAGE)
        a_at = pool + (rows * W)[:, None]
        offset = chunk * W
        for begin in range(tl.maximum(d_first - offset, 0), tl.minimum(d_last - offset, W), COLUMNS):
            column = begin + tl.arange(0, COLUMNS)[None, :]
            d = offset + column
            if W % COLUMNS:
                values = tl.load(x_at + d, mask=(column < W) & (d < D_IN), other=0.0)
            elif D_IN % COLUMNS:
                values = tl.load(x_at + d, mask=d < D_IN, other=0.0)
            else:
                values = tl.load(x_at + d)
            a = _load_columns(a_at, column, W, COLUMNS)
            total = tl.dot(values.to(DTYPE), tl.trans(a.to(DTYPE)), total, input_precision="ieee")
    exists = (token < tokens)[:, None] & row_exists[None, :]
    tl.store(out + token[:, None] * M * MAX_RANK + place[None, :], total * scale[None, :], mask=exists)


@triton.jit
def _expand_kernel(
    partial_sums,  # [max_splits, num_tokens, M, MAX_RANK]
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    splits_at,  # [1]
    layer,  # [1]
    num_rows,
    num_tokens,
    delta,  # [num_tokens, FIRST_COLUMN[M]]
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    W: tl.constexpr,
    MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SMALL_RANK: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: a tile's tokens and ``COLUMNS`` output columns of one module, all its rank rows."""
    M: tl.constexpr = len(MODULES)
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    program = tl.program_id(0)
    tile = tl.program_id(1)
    # Which module, from compile-time tables.
    j = tl.full([], 0, tl.int32)
    block = program
    width = tl.full([], WIDTHS[0], tl.int32)
    first_column = tl.full([], 0, tl.int32)
    for other in tl.static_range(1, M):
        inside = program >= FIRST_BLOCK[other]
        j = tl.where(inside, other, j)
        block = tl.where(inside, program - FIRST_BLOCK[other], block)
        width = tl.where(inside, WIDTHS[other], width)
        first_column = tl.where(inside, FIRST_COLUMN[other], first_column)
    first, tokens, page_start, plane_rows = _tile(records, tile, ALL_MODULES, FIELDS)
    if tokens > 0:
        rank, start, _ = _module(records, tile, _pick(MODULES, j), 1, ALL_MODULES, FIELDS)
        plane = 2 * tl.load(layer)
        splits = tl.load(splits_at)
        chunk = block // BLOCKS
        begin = block % BLOCKS * COLUMNS
        start += chunk * rank
        left = tl.minimum(width - chunk * W, W)  # columns of this chunk that exist in the output
        delta += first * FIRST_COLUMN[M] + first_column + chunk * W
        partial_sums += (first * M + j) * MAX_RANK
        pages += page_start
        if (tokens == 1) & (rank > 0):
            _expand_token(
                partial_sums, delta, pool, pages, plane, num_rows, begin, left, rank, start, plane_rows,
                PAGE, W, RANKS, COLUMNS, STAGES, MASKED,
            )  # fmt: skip
        elif rank <= SMALL_RANK:
            _expand_tile(
                partial_sums, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens, rank, start,
                plane_rows, PAGE, W, FIRST_COLUMN[M], M, MAX_RANK, TOKENS, COLUMNS, SMALL_RANK,
                TILE_COLUMNS, MASKED, DTYPE,
            )  # fmt: skip
        else:
            _expand_tile(
                partial_sums, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens, rank, start,
                plane_rows, PAGE, W, FIRST_COLUMN[M], M, MAX_RANK, TOKENS, COLUMNS, TILE_RANKS,
                TILE_COLUMNS, MASKED, DTYPE,
            )  # fmt: skip


@triton.jit
def _expand_token(
    partial_sums, delta, pool, pages, plane, num_rows, begin, left, rank, start, plane_rows,
    PAGE: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    column = begin + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for r in tl.range(0, rank, RANKS, num_stages=STAGES):
        lane = r + tl.arange(0, RANKS)
        scaled = tl.load(partial_sums + lane, mask=lane < rank, other=0.0)
        rows = _pool_rows(start + tl.minimum(lane, rank - 1), pages, plane_rows, plane, num_rows, PAGE)
        b = _load_columns(pool + (rows * W)[:, None], column[None, :], W, COLUMNS)
        total += tl.sum(b.to(tl.float32) * scaled[:, None], 0)
    total = total.to(delta.dtype.element_ty)
    if MASKED:
        tl.store(delta + column, total, mask=column < left)
    else:
        tl.store(delta + column, total)


@triton.jit
def _expand_tile(
    partial_sums, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens, rank, start, plane_rows,
    PAGE: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr, ALL_COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    p_at = partial_sums + tl.minimum(token, tokens - 1)[:, None] * M * MAX_RANK
    delta_at = delta + token[:, None] * ROW
    exists = (token < tokens)[:, None]
    if (rank > 0) & (rank <= RANKS):
        # Read once for all columns.
        p = _partial_block(p_at, splits, 0, rank, num_tokens, M, MAX_RANK, TOKENS, RANKS).to(DTYPE)
        entry = start + tl.minimum(tl.arange(0, RANKS), rank - 1)
        b_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            b = _load_columns(b_at, column, W, COLUMNS).to(DTYPE)
            total = tl.dot(p, b, input_precision="ieee").to(delta.dtype.element_ty)
            mask = exists & (column < left) if MASKED else exists
            tl.store(delta_at + column, total, mask=mask)
    elif rank > 0:
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            total = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for r in range(0, rank, RANKS):
                p = _partial_block(p_at, splits, r, rank, num_tokens, M, MAX_RANK, TOKENS, RANKS).to(DTYPE)
                entry = start + tl.minimum(r + tl.arange(0, RANKS), rank - 1)
                b_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
                b = _load_columns(b_at, column, W, COLUMNS).to(DTYPE)
                total = tl.dot(p, b, total, input_precision="ieee")
            mask = exists & (column < left) if MASKED else exists
            tl.store(delta_at + column, total.to(delta.dtype.element_ty), mask=mask)
    else:
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            mask = exists & (column < left) if MASKED else exists
            tl.store(delta_at + column, tl.zeros([TOKENS, COLUMNS], delta.dtype.element_ty), mask=mask)


@triton.jit
def _partial_block(
    p_at, splits, r, rank, num_tokens,
    M: tl.constexpr, MAX_RANK: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """``RANKS`` lanes from ``r`` on, summed over the splits, 0 past the rank, where memory may hold anything."""
    lane = r + tl.arange(0, RANKS)[None, :]
    stride = tl.cast(num_tokens, tl.int64) * (M * MAX_RANK)
    total = tl.zeros([TOKENS, RANKS], tl.float32)
    for split in range(splits):
        at = p_at + lane + split * stride
        total += tl.load(at, mask=lane < MAX_RANK, other=0.0) if MAX_RANK % RANKS else tl.load(at)
    return tl.where(lane < rank, total, 0.0)
