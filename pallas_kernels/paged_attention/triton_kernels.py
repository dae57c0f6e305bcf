"""The Triton kernels of ragged paged attention; ``triton`` launches them, ``work`` says what they work on.

Semantics, for query token t of sequence s at position p, head h of KV head ``g = h // (H // num_kv_heads)``::

    w[c]      = softmax over c in [0, p] of  scale * q[t, h] . K[row(s, c), g]
    out[t, h] = sum over c of  w[c] * V[row(s, c), g]

Shapes: ``q [T, H, D]``, pool ``[layers, 2, rows, num_kv_heads * D]``, ``page_table [S, P]``; padding tokens give 0.
Rows and pages are those of tokens: with float8 the pool's memory is that of such an array of float8.

K and V rows are never loaded under a mask over keys: a lane past the context reads the last row of the context, which
costs no memory traffic, and its score is masked. Sums are float32 and their order does not depend on timing.
"""

import triton
import triton.language as tl


@triton.jit
def _planes(pool, layer, num_rows, W: tl.constexpr, FLOAT8: tl.constexpr):
    """Returns where the layer's K and V begin, of float8 where the pool's memory holds that."""
    if FLOAT8:
        pool = pool.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    plane_size = tl.cast(num_rows, tl.int64) * W
    k_base = pool + 2 * tl.load(layer).to(tl.int64) * plane_size
    return k_base, k_base + plane_size


@triton.jit
def _pages(table, position, end, PAGE: tl.constexpr):
    """Returns the pages of these positions of a sequence; from ``end`` on, the page of the position before it."""
    return tl.load(table + tl.minimum(position, end - 1).to(tl.uint32) // PAGE)


@triton.jit
def _rows(pages, position, end, PAGE: tl.constexpr):
    """Returns the pool rows of these positions, given their ``_pages``."""
    return pages.to(tl.int64) * PAGE + tl.minimum(position, end - 1).to(tl.uint32) % PAGE


@triton.jit
def _load_rows(base, rows, d, D: tl.constexpr, W: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr):
    """Loads these rows of one plane and head: ``[rows, BLOCK_D]`` of a type, 0 past D."""
    pointers = base + rows[:, None] * W + d[None, :]
    if D == BLOCK_D:  # noqa: SIM108  (decided when compiled: a ternary would compile both)
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    block = block.to(TYPE)
    return block


@triton.jit
def _as_factor(query, FLOAT32: tl.constexpr, FLOAT8: tl.constexpr):
    """Returns the queries in the type in which they are multiplied with keys."""
    if FLOAT32:
        query = query.to(tl.float32)
    elif FLOAT8:
        # Hopper makes float16 of two float8 numbers in one instruction. On to bfloat16 it takes three more, two of them
        # on a unit with an eighth of the speed. What float16 cannot hold is held at its largest number.
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    return query


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
    FLOAT8: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT32: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program does one work item: a chunk of a decoding token's context, for the query heads of one KV head."""
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
        k_base, v_base = _planes(pool, layer, num_rows, W, FLOAT8)
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
    """One query head. It multiplies and adds in float32, since 15 of the 16 rows of a matrix unit would idle."""
    n = tl.arange(0, BLOCK_N)
    query = tl.load(q + (token * HEADS + head) * D + d, mask=d < D, other=0.0).to(tl.float32) * SCALE
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    pages = _pages(table, begin + n, end, PAGE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = _rows(pages, start + n, end, PAGE)
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, tl.float32)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, tl.float32)
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
    """The query heads of one KV head, which are the rows, padded, of one matmul."""
    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + g
    inside = (g[:, None] < GROUP) & (d[None, :] < D)
    query = tl.load(q + (token * HEADS + heads[:, None]) * D + d[None, :], mask=inside, other=0.0)
    query = _as_factor(query, FLOAT32, k_base.dtype.element_ty == tl.float8e4nv)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    pages = _pages(table, begin + n, end, PAGE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = _rows(pages, start + n, end, PAGE)
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, query.dtype)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, query.dtype)
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
    """One program puts the parts of a row together, for ``BLOCK_H`` heads."""
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
    FLOAT8: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT32: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program does every so many-th part of ``BLOCK_M`` queries of one head."""
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
            query = _as_factor(query, FLOAT32, FLOAT8)
            k_base, v_base = _planes(pool, layer, num_rows, W, FLOAT8)
            k_base += head // GROUP * D
            v_base += head // GROUP * D
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            acc, total, top = _walk_keys(
                query, acc, total, top, k_base, v_base, table, position + m, 0, whole, end, d,
                SCALE, D, W, PAGE, BLOCK_D, BLOCK_N, False,
            )  # fmt: skip
            acc, total, top = _walk_keys(
                query, acc, total, top, k_base, v_base, table, position + m, whole, end, end, d,
                SCALE, D, W, PAGE, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
            # Padding tokens see no key.
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + base + offsets, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _walk_keys(
    query, acc, total, top, k_base, v_base, table, position, begin, stop, end, d,
    SCALE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys of ``[begin, stop)`` to a running softmax, where the last query sees those before ``end``."""
    n = tl.arange(0, BLOCK_N)
    pages = _pages(table, begin + n, tl.maximum(end, 1), PAGE)
    for start in tl.range(begin, stop, BLOCK_N):
        if MASKED or BLOCK_N % PAGE != 0:  # decided when compiled
            rows = _rows(pages, start + n, end, PAGE)
        else:
            # The same, where the block holds whole pages: nothing but the pages changes from block to block.
            rows = pages.to(tl.int64) * PAGE + n % PAGE
        k = _load_rows(k_base, rows, d, D, W, BLOCK_D, query.dtype)
        v = _load_rows(v_base, rows, d, D, W, BLOCK_D, query.dtype)
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
