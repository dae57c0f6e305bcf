"""The Triton kernels of gathered LoRA; ``triton`` launches them and says what a tile, an item and a split are.

Semantics, for token t of segment g, ``m = modules[j]`` and ``r = rank[g, m]``::

    shrink:  out[t, j, i] = scale[g, m] * sum over d of x[t, d] * A[g, m][i, d]    for i < r
    expand:  delta[t, first_column[j] + d] = sum over i < r of out[t, j, i] * B[g, m][d, i]

Shapes: ``x [T, d_in]``, partial sums ``[splits, T, M, max_rank]`` float32, ``delta [T, sum of d_out]``, pool
``[layers, 2, rows, W]``.

Among N devices shrink writes its partial sums into every device's memory, as mail, and expand awaits those of all (see
``collectives.triton_kernels``), and adds what it computes to the base's output. Where the devices share A out by rank
(``BY_RANK``), device i has the ranks i, i + N, i + 2N and so on; where by input, each has a term of every sum.
"""

import triton
import triton.language as tl

from pallas_kernels.collectives.triton_kernels import await_mail, mail_bytes, mail_slot, mail_tag, place, post_mail


@triton.jit
def _tile(records, tile, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr):
    """Returns a tile's first token, number of tokens, first page, and its adapter's rows in a plane."""
    at = records + tile * ALL_MODULES * FIELDS
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def _module(records, tile, module, SIDE: tl.constexpr, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr):
    """Returns a module's rank, its first list entry of A (side 0) or B (side 1), and its scale."""
    at = records + (tile * ALL_MODULES + module) * FIELDS
    return tl.load(at + 2), tl.load(at + 3 + SIDE), tl.load(at + 7).to(tl.float32, bitcast=True)


@triton.jit
def _pick(MODULES: tl.constexpr, j):
    """Returns ``MODULES[j]``, for a j known only when the kernel runs."""
    module = tl.full([], MODULES[0], tl.int32)
    for other in tl.static_range(1, len(MODULES)):
        module = tl.where(j == other, MODULES[other], module)
    return module


@triton.jit
def _pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE: tl.constexpr):
    """Returns which rows of the pool, seen as ``[layers * 2 * rows, W]``, hold these entries of a chunk list."""
    second = entry >= plane_rows
    j = tl.where(second, entry - plane_rows, entry)
    row = tl.load(pages + j // PAGE) * PAGE + j % PAGE
    return (plane + second.to(tl.int32)).to(tl.int64) * num_rows + row


@triton.jit
def _load_columns(at, column, W: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads a block of columns of pool rows that begin at ``at``, 0 past the row's width."""
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
    begins,  # [PROGRAMS + 1, 2]: this and the next three are ``triton._Shares``
    ends,  # [tiles]
    splits_at,  # [1]
    tile_cost_at,  # [1]
    layer,  # [1]
    num_rows,
    num_tokens,
    peers,  # None on one device
    out,  # [max_splits, num_tokens, M, MAX_RANK]; on several devices nothing is written here
    MODULES: tl.constexpr,
    ALL_MODULES: tl.constexpr,
    FIELDS: tl.constexpr,
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
    N: tl.constexpr,
    CHANNEL: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    CALLERS: tl.constexpr,
):
    """One program does its share of the items, one after the other, so that it seldom comes to another tile."""
    M: tl.constexpr = len(MODULES)
    plane = 2 * tl.load(layer)
    splits = tl.load(splits_at)
    split_width = tl.cdiv(tl.cdiv(D_IN, splits), SPLIT_UNIT) * SPLIT_UNIT
    tile_cost = tl.load(tile_cost_at)
    share_at = begins + 2 * tl.program_id(0)
    share_begin = tl.load(share_at)
    share_end = tl.load(share_at + 2)
    tile = tl.load(share_at + 1)
    begin = tl.load(ends + tile - 1, mask=tile > 0, other=0)
    while begin < share_end:
        end = tl.load(ends + tile)
        first, tokens, page_start, plane_rows = _tile(records, tile, ALL_MODULES, FIELDS)
        x_at = x + first * D_IN
        sums_at = first * M * MAX_RANK
        if tokens == 1:
            for block in range(tl.maximum(share_begin - begin, 0), tl.minimum(share_end, end) - begin):
                its_rows = _stacked_rows(
                    records, tile, block * RANKS + tl.arange(0, RANKS), MODULES, ALL_MODULES, FIELDS, MAX_RANK
                )
                sums = _shrink_token(
                    x_at, pool, pages + page_start, plane, num_rows, its_rows, plane_rows, PAGE, D_IN, W, RANKS, COLUMNS
                )
                _store_sums(sums_at + its_rows[3], sums, its_rows[4], out, peers, N, CHANNEL, HEAD, SLOT)
        else:
            # An item belongs to the share in which it begins.
            first_item = tl.cdiv(tl.maximum(share_begin - begin, 0), tile_cost)
            for item in range(first_item, tl.cdiv(tl.minimum(share_end, end) - begin, tile_cost)):
                block = item // splits
                split = item - block * splits
                split_at = sums_at + tl.cast(num_tokens, tl.int64) * (split * M * MAX_RANK)
                many_rows = _stacked_rows(
                    records, tile, block * TILE_RANKS + tl.arange(0, TILE_RANKS), MODULES, ALL_MODULES, FIELDS, MAX_RANK
                )
                sums = _shrink_tile(
                    x_at, pool, pages + page_start, plane, num_rows, many_rows, split * split_width, split_width,
                    tokens, plane_rows, PAGE, D_IN, W, TOKENS, TILE_RANKS, TILE_COLUMNS, DTYPE,
                )  # fmt: skip
                token = tl.arange(0, TOKENS)[:, None]
                at = split_at + token * M * MAX_RANK + many_rows[3][None, :]
                exists = (token < tokens) & many_rows[4][None, :]
                _store_sums(at, sums, exists, out, peers, N, CHANNEL, HEAD, SLOT)
        begin = end
        tile += 1
    if N > 1:
        post_mail(peers, mail_tag(peers, N, CALLERS), CHANNEL, HEAD, N, PROGRAMS)


@triton.jit
def _store_sums(
    at, sums, exists, out, peers, N: tl.constexpr, CHANNEL: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr
):
    """Stores partial sums: in ``out``, or as this device's mail to all."""
    if N == 1:
        tl.store(out + at, sums, mask=exists)
    else:
        rank = place(peers, N)
        for device in tl.static_range(N):
            tl.store(mail_slot(peers, device, rank, CHANNEL, HEAD, SLOT, N) + at, sums, mask=exists)


@triton.jit
def _stacked_rows(
    records, tile, lane, MODULES: tl.constexpr, ALL_MODULES: tl.constexpr, FIELDS: tl.constexpr, MAX_RANK: tl.constexpr
):
    """Returns what there is to know of these lanes of the stacked rank rows.

    That is the list entry of a row's first chunk, how far it is to the next one, the scale, the place in a token's
    partial sums, and whether there is such a row. Lanes behind the last row are that row again.
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
    x, pool, pages, plane, num_rows, stacked, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns the partial sums of one token for some stacked rank rows."""
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    STEPS: tl.constexpr = D_IN // W * BLOCKS + (D_IN % W + COLUMNS - 1) // COLUMNS
    entry, stride, scale, _, _ = stacked
    TOGETHER: tl.constexpr = 4
    products = tl.zeros([RANKS, COLUMNS], tl.float32)
    for first in range(0, STEPS // TOGETHER * TOGETHER, TOGETHER):
        # All loads are on their way before the first is needed.
        for i in tl.static_range(TOGETHER):
            products += _shrink_products(
                x, pool, pages, plane, num_rows, entry, stride, first + i, plane_rows, PAGE, D_IN, W, COLUMNS, BLOCKS
            )
    for step in tl.static_range(STEPS // TOGETHER * TOGETHER, STEPS):
        products += _shrink_products(
            x, pool, pages, plane, num_rows, entry, stride, step, plane_rows, PAGE, D_IN, W, COLUMNS, BLOCKS
        )
    # Once, at the end: a sum over the program's threads makes them wait for each other.
    return tl.sum(products, 1) * scale


@triton.jit
def _shrink_products(
    x, pool, pages, plane, num_rows, entry, stride, step, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Multiplies a block of columns of some rows of A with those of x, element by element, in float32."""
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
    x, pool, pages, plane, num_rows, stacked, d_first, split_width, tokens, plane_rows,
    PAGE: tl.constexpr, D_IN: tl.constexpr, W: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Returns partial sums of several tokens for some stacked rank rows, over a range of d_in.

    The range begins at ``d_first`` and is ``split_width`` wide.
    """
    entry, stride, scale, _, _ = stacked
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
    return total * scale[None, :]


@triton.jit
def _expand_kernel(
    partial_sums,  # [max_splits, num_tokens, M, MAX_RANK]; on several devices nothing is read here
    pool,  # [layers, 2, num_rows, W]
    records,  # [tiles, ALL_MODULES, FIELDS]
    pages,
    splits_at,  # [1]
    layer,  # [1]
    num_rows,
    num_tokens,
    peers,  # None on one device
    delta,  # [num_tokens, ROW]; of several devices what the updates are added to
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
    ROW: tl.constexpr,
    BY_RANK: tl.constexpr,
    N: tl.constexpr,
    CHANNEL: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    CALLERS: tl.constexpr,
):
    """One program does a tile's tokens and ``COLUMNS`` output columns of one module, over all its rank rows."""
    M: tl.constexpr = len(MODULES)
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS  # of a whole chunk
    program = tl.program_id(0)
    tile = tl.program_id(1)
    missing = tl.full([], 0.0, tl.float32)
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
        delta += first * ROW + first_column + chunk * W
        if N > 1:
            if not BY_RANK:
                # Every device updates columns of its own, of a term of the base's sum.
                delta += place(peers, N) * FIRST_COLUMN[M]
            sums = mail_slot(peers, place(peers, N), 0, CHANNEL, HEAD, SLOT, N)
            if rank > 0:
                all_came = await_mail(peers, mail_tag(peers, N, CALLERS), CHANNEL, HEAD, N)
                # That a device did not come shows in the logits, which are then no numbers.
                missing = tl.where(all_came, 0.0, float("nan"))
        else:
            sums = partial_sums
        sums += (first * M + j) * MAX_RANK
        pages += page_start
        if (tokens == 1) & (rank > 0):
            _expand_token(
                sums, missing, delta, pool, pages, plane, num_rows, begin, left, rank, start, plane_rows,
                PAGE, W, RANKS, COLUMNS, STAGES, MASKED, N, BY_RANK, SLOT,
            )  # fmt: skip
        elif rank <= SMALL_RANK:
            _expand_tile(
                sums, missing, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens,
                rank, start, plane_rows, PAGE, W, ROW, M, MAX_RANK, TOKENS, COLUMNS, SMALL_RANK,
                TILE_COLUMNS, MASKED, DTYPE, N, BY_RANK, SLOT,
            )  # fmt: skip
        else:
            _expand_tile(
                sums, missing, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens,
                rank, start, plane_rows, PAGE, W, ROW, M, MAX_RANK, TOKENS, COLUMNS, TILE_RANKS,
                TILE_COLUMNS, MASKED, DTYPE, N, BY_RANK, SLOT,
            )  # fmt: skip


@triton.jit
def _expand_token(
    partial_sums, missing, delta, pool, pages, plane, num_rows, begin, left, rank, start, plane_rows,
    PAGE: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, N: tl.constexpr, BY_RANK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Computes and stores some output columns of one token, which multiplies and adds in float32."""
    column = begin + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for r in tl.range(0, rank, RANKS, num_stages=STAGES):
        lane = r + tl.arange(0, RANKS)
        if N == 1:
            scaled = tl.load(partial_sums + lane, mask=lane < rank, other=0.0)
        else:
            scaled = _mailed_sums(partial_sums, missing, lane, lane < rank, N, BY_RANK, SLOT)
        rows = _pool_rows(start + tl.minimum(lane, rank - 1), pages, plane_rows, plane, num_rows, PAGE)
        b = _load_columns(pool + (rows * W)[:, None], column[None, :], W, COLUMNS)
        total += tl.sum(b.to(tl.float32) * scaled[:, None], 0)
    _put(delta + column, total, column < left, MASKED, N)


@triton.jit
def _put(at, total, exists, MASKED: tl.constexpr, N: tl.constexpr):
    """Stores a block of updates; on several devices adds them to what is there."""
    mask = exists if MASKED else None
    if N > 1:
        total += tl.load(at, mask=mask).to(tl.float32)
    tl.store(at, total.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _mailed_sums(at, missing, lane, exists, N: tl.constexpr, BY_RANK: tl.constexpr, SLOT: tl.constexpr):
    """Returns the partial sums of some lanes, from all devices' mail; ``at`` is in that of the first.

    It was written by others: what this device's caches may have is not asked. ``missing`` is added, 0 or no number.
    """
    STRIDE: tl.constexpr = mail_bytes(SLOT) // 4  # of float32
    if BY_RANK:
        own = at + (lane % N).to(tl.int64) * STRIDE + lane // N
        total = tl.load(own, mask=exists, other=0.0, cache_modifier=".cg")
    else:
        total = tl.load(at + lane, mask=exists, other=0.0, cache_modifier=".cg")
        for device in tl.static_range(1, N):
            theirs = at + tl.cast(device, tl.int64) * STRIDE + lane
            total += tl.load(theirs, mask=exists, other=0.0, cache_modifier=".cg")
    return total + missing


@triton.jit
def _expand_tile(
    partial_sums, missing, splits, delta, pool, pages, plane, num_rows, num_tokens, begin, left, tokens, rank, start,
    plane_rows, PAGE: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, M: tl.constexpr, MAX_RANK: tl.constexpr,
    TOKENS: tl.constexpr, ALL_COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr, BY_RANK: tl.constexpr,
    SLOT: tl.constexpr,
):  # fmt: skip
    """Computes and stores some output columns of several tokens with the matrix unit; zeros where the rank is 0."""
    token = tl.arange(0, TOKENS)
    p_at = partial_sums + tl.minimum(token, tokens - 1)[:, None] * M * MAX_RANK
    delta_at = delta + token[:, None] * ROW
    exists = (token < tokens)[:, None]
    if (rank > 0) & (rank <= RANKS):
        # Read once for all columns.
        p = _partial_block(
            p_at, missing, splits, 0, rank, num_tokens, M, MAX_RANK, TOKENS, RANKS, N, BY_RANK, SLOT
        ).to(DTYPE)  # fmt: skip
        entry = start + tl.minimum(tl.arange(0, RANKS), rank - 1)
        b_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            b = _load_columns(b_at, column, W, COLUMNS).to(DTYPE)
            total = tl.dot(p, b, input_precision="ieee")
            mask = exists & (column < left) if MASKED else exists
            _put(delta_at + column, total, mask, True, N)
    elif rank > 0:
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            total = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for r in range(0, rank, RANKS):
                p = _partial_block(
                    p_at, missing, splits, r, rank, num_tokens, M, MAX_RANK, TOKENS, RANKS, N, BY_RANK, SLOT
                ).to(DTYPE)  # fmt: skip
                entry = start + tl.minimum(r + tl.arange(0, RANKS), rank - 1)
                b_at = pool + (_pool_rows(entry, pages, plane_rows, plane, num_rows, PAGE) * W)[:, None]
                b = _load_columns(b_at, column, W, COLUMNS).to(DTYPE)
                total = tl.dot(p, b, total, input_precision="ieee")
            mask = exists & (column < left) if MASKED else exists
            _put(delta_at + column, total, mask, True, N)
    elif N == 1:
        for first in range(begin, begin + ALL_COLUMNS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            mask = exists & (column < left) if MASKED else exists
            tl.store(delta_at + column, tl.zeros([TOKENS, COLUMNS], delta.dtype.element_ty), mask=mask)


@triton.jit
def _partial_block(
    p_at, missing, splits, r, rank, num_tokens,
    M: tl.constexpr, MAX_RANK: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
    N: tl.constexpr, BY_RANK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Returns ``RANKS`` partial sums of each token from lane ``r`` on, summed over the splits or the devices.

    They are 0 past the rank, where memory may hold anything.
    """
    lane = r + tl.arange(0, RANKS)[None, :]
    stride = tl.cast(num_tokens, tl.int64) * (M * MAX_RANK)
    total = tl.zeros([TOKENS, RANKS], tl.float32)
    TOGETHER: tl.constexpr = 2
    for first in range(0, splits, TOGETHER):
        # All loads are on their way before the first is needed.
        for i in tl.static_range(TOGETHER):
            at = p_at + (first + i) * stride
            exists = tl.broadcast_to((lane < rank) & (first + i < splits), [TOKENS, RANKS])
            if N > 1:
                total += _mailed_sums(at, missing, lane, exists, N, BY_RANK, SLOT)
            else:
                total += tl.load(at + lane, mask=exists, other=0.0)
    return tl.where(lane < rank, total, 0.0)
