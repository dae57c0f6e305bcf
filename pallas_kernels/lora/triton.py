"""Gathered LoRA for NVIDIA GPUs, from Ampere on, as two Triton kernels. See ``api`` for the contract.

Semantics, for token t of segment g, ``m = modules[j]`` and ``r = rank[g, m]``::

    shrink:  out[t, j, i] = scale[g, m] * sum over d of x[t, d] * A[g, m][i, d]    for i < r, else 0
    expand:  ys[j][t, d] += sum over i < r of partial[t, j, i] * B[g, m][d, i]

Shapes: ``x [T, d_in]``, ``partial [T, M, max_rank]`` float32, ``ys[j] [T, d_out_j]``, pool ``[layers, 2, rows, W]``.

The unit of work is a *tile*: at most ``token_tile`` consecutive tokens of one segment. A tile of one token, the rule
when every sequence decodes with an adapter of its own, multiplies and adds in float32 as the rows arrive; a tile of
several reads A and B once and multiplies with the matrix unit. Rank is never padded: a program beyond the real rank
of its segment ends at once, and a block of rank rows that is cut by the rank reads its last row again, which costs no
memory traffic, and drops the result. Tokens without an adapter are tiles of rank 0: their partial is set to 0 and
their ``y`` is not touched.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax_triton as jt
import triton
import triton.language as tl
from flax import struct

from pallas_kernels.pool import PAGE_SIZE, owner
from pallas_kernels.tuning import block_sizes, device_kind

FIELDS = 8
"""Integers of a record: first token, tokens, rank, start_a, start_b, page_start, rows in a plane, scale's bits."""


@partial(struct.dataclass, frozen=True)
class TritonLoraPlan:
    """What every layer of a step needs to know of its adapters.

    Attributes:
      records: ``[tiles, M, FIELDS]`` int32; a tile of no tokens is padding.
      pages: the segments' ``pages``.
      token_tile: most tokens of a tile.
      max_rank: width of the partial.
    """

    records: jax.Array
    pages: jax.Array
    token_tile: int = struct.field(pytree_node=False)
    max_rank: int = struct.field(pytree_node=False)

    @property
    def modules(self) -> range:
        return range(self.records.shape[1])


def plan(segments, *, num_tokens, row_width, widths):
    """Cuts the batch into tiles; see ``api.plan_lora``."""
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
    return TritonLoraPlan(records, segments.pages, token_tile=token_tile, max_rank=segments.max_rank)


def lora_shrink(x, pool, layer, plan: TritonLoraPlan, modules):
    """See ``api.lora_shrink``."""
    num_tokens, d_in = x.shape
    num_rows, width = pool.shape[2:]
    block = block_sizes("lora_shrink", device_kind(), _kind(num_tokens))
    wide = 2 if max(x.dtype.itemsize, pool.dtype.itemsize) > 2 else 1
    columns, tile_columns = _columns(block["columns"] // wide, width), _columns(block["tile_columns"] // wide, width)
    bound = triton.next_power_of_2(plan.max_rank)
    ranks, tile_ranks = min(block["ranks"], bound), min(block["tile_ranks"], max(16, bound))
    parts = min(block["parts"], triton.cdiv(plan.max_rank, ranks))
    tokens = min(block["tile_tokens"], plan.token_tile)
    product_dtype = _product_dtype(x, pool)
    if product_dtype == tl.float32:
        block = {**block, "group": False}
        tokens, tile_ranks, tile_columns = min(tokens, 32), min(tile_ranks, 32), min(tile_columns, 32)
    group = len(modules) if block["group"] and len(modules) <= 3 else 1
    return jt.triton_call(
        x,
        pool,
        plan.records,
        plan.pages,
        2 * layer,
        num_rows,
        kernel=_shrink_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, len(modules), plan.max_rank), jnp.float32),
        grid=(plan.records.shape[0] * (plan.token_tile // tokens) * (len(modules) // group) * parts,),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.modules),
        FIELDS=FIELDS,
        PAGE=PAGE_SIZE,
        D_IN=d_in,
        W=width,
        MAX_RANK=plan.max_rank,
        FEW=block["few"],
        TOKENS=tokens,
        TILE_PARTS=plan.token_tile // tokens,
        GROUP=group,
        PARTS=parts,
        RANKS=ranks,
        COLUMNS=columns,
        UNROLL=triton.cdiv(d_in, columns) <= block["unroll"],
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        DTYPE=product_dtype,
    )


def lora_expand(partial_sums, ys, pool, layer, plan: TritonLoraPlan, modules):
    """See ``api.lora_expand``. Where a ``y`` has no other use, it is updated in place."""
    if len({y.dtype for y in ys}) > 1:
        raise NotImplementedError(f"ys of several dtypes: use the reference; got {[y.dtype for y in ys]}")
    num_tokens = partial_sums.shape[0]
    num_rows, width = pool.shape[2:]
    widths = tuple(y.shape[1] for y in ys)
    block = block_sizes("lora_expand", device_kind(), _kind(num_tokens))
    columns = _columns(block["columns"], width)
    tile_columns = min(block["tile_columns"], columns)
    tokens = min(block["tile_tokens"], plan.token_tile)
    bound = triton.next_power_of_2(plan.max_rank)
    tile_ranks = min(block["tile_ranks"], max(16, bound))
    product_dtype = _product_dtype(ys[0], pool)
    if product_dtype == tl.float32:
        tokens, tile_ranks, tile_columns = min(tokens, 32), min(tile_ranks, 32), min(tile_columns, 64)
    first_blocks = [0]
    for d_out in widths:
        full, rest = divmod(d_out, width)
        first_blocks.append(first_blocks[-1] + full * triton.cdiv(width, columns) + triton.cdiv(rest, columns))
    refs = tuple(jax.new_ref(y) for y in ys)
    jt.triton_call(
        partial_sums,
        refs,
        pool,
        plan.records,
        plan.pages,
        2 * layer,
        num_rows,
        kernel=_expand_kernel,
        out_type=(),
        grid=(plan.records.shape[0] * (plan.token_tile // tokens) * first_blocks[-1],),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.modules),
        FIELDS=FIELDS,
        PAGE=PAGE_SIZE,
        WIDTHS=widths,
        FIRST_BLOCKS=tuple(first_blocks),
        W=width,
        MAX_RANK=plan.max_rank,
        FEW=block["few"],
        TOKENS=tokens,
        TILE_PARTS=plan.token_tile // tokens,
        RANKS=min(block["ranks"], bound),
        COLUMNS=columns,
        STAGES=block["stages"],
        TILE_RANKS=tile_ranks,
        TILE_COLUMNS=tile_columns,
        MASKED=width % columns > 0 or any(d_out % columns for d_out in widths),
        DTYPE=product_dtype,
    )
    return tuple(jax.freeze(ref) for ref in refs)


def lora_update(x, ys, pool, layer, plan: TritonLoraPlan, modules):
    """``lora_expand(lora_shrink(x, ...), ys, ...)``, for a caller with nothing to do in between.

    Where every vector fits a pool row and ranks are small, one launch does both: a program takes one module of one
    tile from x to y, which saves a launch and its tail. Above that rank too few programs would share the work.
    """
    num_tokens, d_in = x.shape
    num_rows, width = pool.shape[2:]
    widths = tuple(y.shape[1] for y in ys)
    block = block_sizes("lora_update", device_kind(), _kind(num_tokens))
    if plan.max_rank > block["max_rank"] or max(d_in, *widths) > width or len({y.dtype for y in ys}) > 1:
        return lora_expand(lora_shrink(x, pool, layer, plan, modules), ys, pool, layer, plan, modules)
    columns = triton.next_power_of_2(width)
    product_dtype = _product_dtype(x, pool)
    tile_columns = _columns(32 if product_dtype == tl.float32 else block["tile_columns"], width)
    refs = tuple(jax.new_ref(y) for y in ys)
    jt.triton_call(
        x,
        refs,
        pool,
        plan.records,
        plan.pages,
        2 * layer,
        num_rows,
        kernel=_update_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, len(modules), plan.max_rank), jnp.float32),
        grid=(plan.records.shape[0] * len(modules),),
        num_warps=block["num_warps"],
        num_stages=block["num_stages"],
        MODULES=tuple(modules),
        ALL_MODULES=len(plan.modules),
        FIELDS=FIELDS,
        PAGE=PAGE_SIZE,
        D_IN=d_in,
        WIDTHS=widths,
        W=width,
        MAX_RANK=plan.max_rank,
        FEW=block["few"],
        TOKENS=plan.token_tile,
        RANKS=max(1, block["elements"] * 2 // pool.dtype.itemsize // columns),
        COLUMNS=columns,
        TILE_RANKS=min(block["tile_ranks"], max(16, triton.next_power_of_2(plan.max_rank))),
        TILE_COLUMNS=tile_columns,
        MASKED=any(n != columns for n in (width, *widths)),
        DTYPE=product_dtype,
    )
    return tuple(jax.freeze(ref) for ref in refs)


def _kind(num_tokens):
    """Key of the block sizes: a step that mostly decodes, or one with prompts in it."""
    return "decode" if num_tokens <= 512 else "prefill"


def _columns(wanted, width):
    """Columns of a pool row to take at a time: a power of two, one that divides the row if that is not too small."""
    divisor = width & -width
    if divisor >= min(wanted, 128):
        return min(wanted, divisor)
    return max(16, min(wanted, triton.next_power_of_2(width)))


def _product_dtype(array, pool):
    """The dtype in which the matrix unit multiplies: float32 unless both are of the same 16-bit type."""
    if array.dtype == pool.dtype and pool.dtype in (jnp.bfloat16, jnp.float16):
        return tl.bfloat16 if pool.dtype == jnp.bfloat16 else tl.float16
    return tl.float32


@triton.jit
def _tile(records, tile, part, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr, TOKENS: tl.constexpr):
    """First token, tokens, first page and rows in a plane of the tile's part of that many ``TOKENS``."""
    at = records + tile * ALL_MODULES * FIELDS
    first = tl.load(at) + part * TOKENS
    tokens = tl.minimum(tl.load(at + 1) - part * TOKENS, TOKENS)
    return first.to(tl.int64), tokens, tl.load(at + 5), tl.load(at + 6)


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
def _shrink_kernel(
    x,  # [T, D_IN]
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    plane,  # 2 * layer
    num_rows,
    out,  # [T, M, MAX_RANK]
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
    PAGE: tl.constexpr,
    D_IN: tl.constexpr,
    W: tl.constexpr,
    MAX_RANK: tl.constexpr,
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: ``TOKENS`` of a tile, ``GROUP`` modules, and every PARTS-th block of their rank rows."""
    M: tl.constexpr = len(MODULES)
    program = tl.program_id(0)
    part = program % PARTS
    group = program // PARTS % (M // GROUP)
    tile = program // (PARTS * (M // GROUP))
    first, tokens, page_start, plane_rows = _tile(
        records, tile // TILE_PARTS, tile % TILE_PARTS, ALL_MODULES, FIELDS, TOKENS
    )
    tile = tile // TILE_PARTS
    x += first * D_IN
    out += (first * M + group * GROUP) * MAX_RANK
    pages += page_start
    if tokens <= FEW:
        for k in tl.static_range(GROUP):
            module = _pick(MODULES, group * GROUP + k)
            rank, start, scale = _module(records, tile, module, 0, ALL_MODULES, FIELDS)
            for t in range(tokens):
                for r in range(part * RANKS, rank, PARTS * RANKS):
                    _shrink_token(
                        x + t * D_IN, pool, pages, plane, num_rows, out + (t * M + k) * MAX_RANK, r, rank, start,
                        plane_rows, scale, PAGE, D_IN, W, RANKS, COLUMNS, UNROLL,
                    )  # fmt: skip
    else:
        module0 = _pick(MODULES, group * GROUP)
        rank0, start0, scale0 = _module(records, tile, module0, 0, ALL_MODULES, FIELDS)
        rank1, start1, scale1 = _module(records, tile, MODULES[GROUP // 2], 0, ALL_MODULES, FIELDS)
        rank2, start2, scale2 = _module(records, tile, MODULES[GROUP - 1], 0, ALL_MODULES, FIELDS)
        rank = rank0
        if GROUP > 1:
            rank = tl.maximum(rank, rank1)
        if GROUP > 2:
            rank = tl.maximum(rank, rank2)
        for r in range(part * TILE_RANKS, rank, PARTS * TILE_RANKS):
            _shrink_tile(
                x, pool, pages, plane, num_rows, out, r, tokens, plane_rows,
                rank0, start0, scale0, rank1, start1, scale1, rank2, start2, scale2,
                PAGE, D_IN, W, M, MAX_RANK, TOKENS, GROUP, TILE_RANKS, TILE_COLUMNS, DTYPE,
            )  # fmt: skip
    if part == PARTS - 1:  # the part with the least to do
        token = tl.arange(0, TOKENS)[:, None]
        for k in tl.static_range(GROUP):
            rank, _, _ = _module(records, tile, _pick(MODULES, group * GROUP + k), 0, ALL_MODULES, FIELDS)
            for r in range(rank, MAX_RANK, 16):
                lane = r + tl.arange(0, 16)[None, :]
                mask = (token < tokens) & (lane < MAX_RANK)
                tl.store(out + (token * M + k) * MAX_RANK + lane, 0.0, mask=mask)


@triton.jit
def _shrink_token(
    x, pool, pages, plane, num_rows, out, r, rank, start, plane_rows, scale,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """``RANKS`` rank rows from ``r`` on of one token."""
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    STEPS: tl.constexpr = D_IN // W * BLOCKS + (D_IN % W + COLUMNS - 1) // COLUMNS
    lane = r + tl.arange(0, RANKS)
    entry = start + tl.minimum(lane, rank - 1)
    if UNROLL:
        products = tl.zeros([RANKS, COLUMNS], tl.float32)
        for step in tl.static_range(STEPS):
            products += _shrink_products(
                x, pool, pages, plane, num_rows, entry, step, rank, plane_rows, PAGE, D_IN, W, COLUMNS
            )
        total = tl.sum(products, 1)
    else:
        total = tl.zeros([RANKS], tl.float32)
        for step in range(STEPS):
            products = _shrink_products(
                x, pool, pages, plane, num_rows, entry, step, rank, plane_rows, PAGE, D_IN, W, COLUMNS
            )
            total += tl.sum(products, 1)
    tl.store(out + lane, total * scale, mask=lane < rank)


@triton.jit
def _shrink_products(
    x, pool, pages, plane, num_rows, entry, step, rank, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    chunk = step // BLOCKS
    column = step % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    rows = _pool_rows(entry + chunk * rank, pages, plane_rows, plane, num_rows, PAGE)
    at = pool + (rows * W)[:, None] + column[None, :]
    d = chunk * W + column
    if W % COLUMNS:
        a = tl.load(at, mask=(column < W)[None, :], other=0.0)
        values = tl.load(x + d, mask=(column < W) & (d < D_IN), other=0.0)
    elif D_IN % COLUMNS:
        a = tl.load(at)  # A is zero past D_IN
        values = tl.load(x + d, mask=d < D_IN, other=0.0)
    else:
        a = tl.load(at)
        values = tl.load(x + d)
    return a.to(tl.float32) * values.to(tl.float32)[None, :]


@triton.jit
def _shrink_tile(
    x, pool, pages, plane, num_rows, out, r, tokens, plane_rows,
    rank0, start0, scale0, rank1, start1, scale1, rank2, start2, scale2,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``RANKS`` rank rows from ``r`` on of up to three modules, for several tokens; x is read once for all of them."""
    lane = r + tl.arange(0, RANKS)
    token = tl.arange(0, TOKENS)
    x_at = x + (tl.minimum(token, tokens - 1) * D_IN)[:, None]
    entry0 = _entries(start0, lane, rank0)
    entry1 = _entries(start1, lane, rank1)
    entry2 = _entries(start2, lane, rank2)
    total0 = tl.zeros([TOKENS, RANKS], tl.float32)
    total1 = tl.zeros([TOKENS, RANKS], tl.float32)
    total2 = tl.zeros([TOKENS, RANKS], tl.float32)
    for chunk in range((D_IN + W - 1) // W):
        at0 = pool + (_pool_rows(entry0 + chunk * rank0, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        at1 = pool
        at2 = pool
        if GROUP > 1:
            at1 = pool + (_pool_rows(entry1 + chunk * rank1, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        if GROUP > 2:
            at2 = pool + (_pool_rows(entry2 + chunk * rank2, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        for begin in range(0, tl.minimum(W, D_IN - chunk * W), COLUMNS):
            column = begin + tl.arange(0, COLUMNS)[None, :]
            d = chunk * W + column
            if W % COLUMNS:
                values = tl.load(x_at + d, mask=(column < W) & (d < D_IN), other=0.0).to(DTYPE)
            elif D_IN % COLUMNS:
                values = tl.load(x_at + d, mask=d < D_IN, other=0.0).to(DTYPE)
            else:
                values = tl.load(x_at + d).to(DTYPE)
            a0 = _load_columns(at0, column, W, COLUMNS).to(DTYPE)
            total0 = tl.dot(values, tl.trans(a0), total0, input_precision="ieee")
            if GROUP > 1:
                a1 = _load_columns(at1, column, W, COLUMNS).to(DTYPE)
                total1 = tl.dot(values, tl.trans(a1), total1, input_precision="ieee")
            if GROUP > 2:
                a2 = _load_columns(at2, column, W, COLUMNS).to(DTYPE)
                total2 = tl.dot(values, tl.trans(a2), total2, input_precision="ieee")
    out_at = out + token[:, None] * M * MAX_RANK + lane[None, :]
    exists = (token < tokens)[:, None]
    tl.store(out_at, total0 * scale0, mask=exists & (lane < rank0)[None, :])
    if GROUP > 1:
        tl.store(out_at + MAX_RANK, total1 * scale1, mask=exists & (lane < rank1)[None, :])
    if GROUP > 2:
        tl.store(out_at + 2 * MAX_RANK, total2 * scale2, mask=exists & (lane < rank2)[None, :])


@triton.jit
def _entries(start, lane, rank):
    """List entries of the rank rows; past the rank its last row's, for rank 0 those of some row of the adapter."""
    return tl.where(rank > 0, start + tl.minimum(lane, rank - 1), 0)


@triton.jit
def _load_columns(at, column, W: tl.constexpr, COLUMNS: tl.constexpr):
    if W % COLUMNS:
        return tl.load(at + column, mask=column < W, other=0.0)
    else:
        return tl.load(at + column)


@triton.jit
def _expand_kernel(
    partial_sums,  # [T, M, MAX_RANK]
    ys,  # M times [T, WIDTHS[j]], read and written
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    plane,  # 2 * layer
    num_rows,
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    W: tl.constexpr,
    MAX_RANK: tl.constexpr,
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: ``TOKENS`` of a tile and ``COLUMNS`` output columns of one module, all its rank rows."""
    M: tl.constexpr = len(MODULES)
    program = tl.program_id(0)
    tile = program // FIRST_BLOCKS[M]
    block = program % FIRST_BLOCKS[M]
    for j in tl.static_range(M):
        if (block >= FIRST_BLOCKS[j]) & (block < FIRST_BLOCKS[j + 1]):
            _expand_module(
                partial_sums, ys[j], pool, records, pages, plane, num_rows, tile, block - FIRST_BLOCKS[j],
                j, MODULES[j], WIDTHS[j], ALL_MODULES, FIELDS, PAGE, W, M, MAX_RANK, FEW, TOKENS, TILE_PARTS, RANKS,
                COLUMNS, STAGES, TILE_RANKS, TILE_COLUMNS, MASKED, DTYPE,
            )  # fmt: skip


@triton.jit
def _expand_module(
    partial_sums, y, pool, records, pages, plane, num_rows, tile, block,
    j: tl.constexpr, MODULE: tl.constexpr, WIDTH: tl.constexpr, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr,
    PAGE: tl.constexpr, W: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr, FEW: tl.constexpr,
    TOKENS: tl.constexpr, TILE_PARTS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    TILE_RANKS: tl.constexpr, TILE_COLUMNS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    first, tokens, page_start, plane_rows = _tile(
        records, tile // TILE_PARTS, tile % TILE_PARTS, ALL_MODULES, FIELDS, TOKENS
    )
    rank, start, _ = _module(records, tile // TILE_PARTS, MODULE, 1, ALL_MODULES, FIELDS)
    chunk = block // BLOCKS
    begin = block % BLOCKS * COLUMNS
    start += chunk * rank
    y += first * WIDTH + chunk * W
    partial_sums += (first * M + j) * MAX_RANK
    pages += page_start
    left = WIDTH - chunk * W  # columns of this chunk that exist in y
    if rank > 0:
        if tokens <= FEW:
            for t in range(tokens):
                _expand_token(
                    partial_sums + t * M * MAX_RANK, y + t * WIDTH, pool, pages, plane, num_rows, begin, left, rank,
                    start, plane_rows, PAGE, W, RANKS, COLUMNS, STAGES, MASKED,
                )  # fmt: skip
        else:
            _expand_tile(
                partial_sums, y, pool, pages, plane, num_rows, begin, left, tokens, rank, start, plane_rows,
                PAGE, W, WIDTH, M, MAX_RANK, TOKENS, COLUMNS, TILE_RANKS, TILE_COLUMNS, MASKED, DTYPE,
            )  # fmt: skip


@triton.jit
def _expand_token(
    partial_sums, y, pool, pages, plane, num_rows, begin, left, rank, start, plane_rows,
    PAGE: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    column = begin + tl.arange(0, COLUMNS)
    exists = (column < left) & (column < W)
    base = tl.load(y + column, mask=exists, other=0.0) if MASKED else tl.load(y + column)
    total = base.to(tl.float32)
    for r in tl.range(0, rank, RANKS, num_stages=STAGES):
        lane = r + tl.arange(0, RANKS)
        scaled = tl.load(partial_sums + lane, mask=lane < rank, other=0.0)
        rows = _pool_rows(start + tl.minimum(lane, rank - 1), pages, plane_rows, plane, num_rows, PAGE)
        b_at = pool + (rows * W)[:, None]
        b = _load_columns(b_at, column[None, :], W, COLUMNS)
        total += tl.sum(b.to(tl.float32) * scaled[:, None], 0)
    total = total.to(y.dtype.element_ty)
    if MASKED:
        tl.store(y + column, total, mask=exists)
    else:
        tl.store(y + column, total)


@triton.jit
def _expand_tile(
    partial_sums, y, pool, pages, plane, num_rows, begin, left, tokens, rank, start, plane_rows,
    PAGE: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr, ALL_COLUMNS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    p_at = partial_sums + tl.minimum(token, tokens - 1)[:, None] * M * MAX_RANK
    y_at = y + token[:, None] * WIDTH
    exists = (token < tokens)[:, None]
    entry = start + tl.minimum(tl.arange(0, RANKS), rank - 1)
    # Almost always all there is: read once for all columns.
    p = _partial_block(p_at, 0, rank, MAX_RANK, RANKS).to(DTYPE)
    b_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
    for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = exists
        if MASKED:
            mask = exists & (column < left) & (column < W)
        base = tl.load(y_at + column, mask=mask, other=0.0)
        b = _load_columns(b_at, column, W, COLUMNS).to(DTYPE)
        total = tl.dot(p, b, input_precision="ieee")
        if MAX_RANK > RANKS:
            for r in range(RANKS, rank, RANKS):
                more = _partial_block(p_at, r, rank, MAX_RANK, RANKS).to(DTYPE)
                entry = start + tl.minimum(r + tl.arange(0, RANKS), rank - 1)
                more_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
                b = _load_columns(more_at, column, W, COLUMNS).to(DTYPE)
                total = tl.dot(more, b, total, input_precision="ieee")
        tl.store(y_at + column, (base.to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _partial_block(p_at, r, rank, MAX_RANK: tl.constexpr, RANKS: tl.constexpr):
    """``RANKS`` lanes from ``r`` on, 0 past the rank; no load is masked by it, as that would cut them into pieces."""
    lane = r + tl.arange(0, RANKS)[None, :]
    values = tl.load(p_at + lane, mask=lane < MAX_RANK, other=0.0) if MAX_RANK % RANKS else tl.load(p_at + lane)
    return tl.where(lane < rank, values, 0.0)


@triton.jit
def _update_kernel(
    x,  # [T, D_IN]
    ys,  # M times [T, WIDTHS[j]], read and written
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    plane,  # 2 * layer
    num_rows,
    partial_sums,  # [T, M, MAX_RANK], scratch of the tiles of several tokens
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
    PAGE: tl.constexpr,
    D_IN: tl.constexpr,
    WIDTHS: tl.constexpr,
    W: tl.constexpr,
    MAX_RANK: tl.constexpr,
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: one module of a tile, from x to y."""
    M: tl.constexpr = len(MODULES)
    tile = tl.program_id(0) // M
    module = tl.program_id(0) % M
    first, tokens, page_start, plane_rows = _tile(records, tile, 0, ALL_MODULES, FIELDS, TOKENS)
    pages += page_start
    x += first * D_IN
    for j in tl.static_range(M):
        if module == j:
            rank, start_a, scale = _module(records, tile, MODULES[j], 0, ALL_MODULES, FIELDS)
            _, start_b, _scale = _module(records, tile, MODULES[j], 1, ALL_MODULES, FIELDS)
            y = ys[j] + first * WIDTHS[j]
            if rank > 0:
                if tokens <= FEW:
                    for t in range(tokens):
                        _update_token(
                            x + t * D_IN, y + t * WIDTHS[j], pool, pages, plane, num_rows, plane_rows,
                            rank, start_a, start_b, scale, PAGE, D_IN, WIDTHS[j], W, RANKS, COLUMNS, MASKED,
                        )  # fmt: skip
                else:
                    sums = partial_sums + (first * M + j) * MAX_RANK
                    for r in range(0, rank, TILE_RANKS):
                        _shrink_tile(
                            x, pool, pages, plane, num_rows, sums, r, tokens, plane_rows,
                            rank, start_a, scale, rank, start_a, scale, rank, start_a, scale,
                            PAGE, D_IN, W, M, MAX_RANK, TOKENS, 1, TILE_RANKS, TILE_COLUMNS, DTYPE,
                        )  # fmt: skip
                    tl.debug_barrier()  # this program's sums, in memory, are read by its other threads
                    _expand_tile(
                        sums, y, pool, pages, plane, num_rows, 0, WIDTHS[j], tokens, rank, start_b, plane_rows,
                        PAGE, W, WIDTHS[j], M, MAX_RANK, TOKENS, COLUMNS, TILE_RANKS, TILE_COLUMNS, MASKED, DTYPE,
                    )  # fmt: skip


@triton.jit
def _update_token(
    x, y, pool, pages, plane, num_rows, plane_rows, rank, start_a, start_b, scale,
    PAGE: tl.constexpr, D_IN: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    values = tl.load(x + column) if D_IN == COLUMNS else tl.load(x + column, mask=column < D_IN, other=0.0)
    base = tl.load(y + column, mask=column < WIDTH, other=0.0) if MASKED else tl.load(y + column)
    values = values.to(tl.float32)
    total = base.to(tl.float32)
    for r in range(0, rank, RANKS):
        lane = r + tl.arange(0, RANKS)
        row = tl.minimum(lane, rank - 1)
        a_at = pool + (_pool_rows(start_a + row, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        b_at = pool + (_pool_rows(start_b + row, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        # Both before the sum over A is needed: twice the bytes on their way.
        a = _load_columns(a_at, column[None, :], W, COLUMNS)
        b = _load_columns(b_at, column[None, :], W, COLUMNS)
        scaled = tl.sum(a.to(tl.float32) * values[None, :], 1) * scale
        scaled = tl.where(lane < rank, scaled, 0.0)
        total += tl.sum(b.to(tl.float32) * scaled[:, None], 0)
    total = total.to(y.dtype.element_ty)
    if MASKED:
        tl.store(y + column, total, mask=column < WIDTH)
    else:
        tl.store(y + column, total)
