"""The kernels' contracts in float64, as plainly as NumPy allows. Shares no code with the kernels."""

import numpy as np

ROWS_IN_PAGE = 16


def _float8(byte):
    """What a byte means in float8_e4m3fn (arXiv 2209.05433): a sign, 4 bits of exponent, 3 of mantissa, two NaN."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return np.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


FLOAT8 = np.array([_float8(byte) for byte in range(256)])
"""By byte."""
_BYTES_IN_ORDER = np.array(sorted(set(range(256)) - {127, 128, 255}, key=lambda byte: FLOAT8[byte]), np.uint8)


def nearest_float8(values):
    """Bytes of the float8 numbers nearest to these values, the largest for what is beyond, NaN for NaN."""
    ordered = FLOAT8[_BYTES_IN_ORDER]
    above = np.clip(np.searchsorted(ordered, values), 1, len(ordered) - 1)
    nearer_below = np.abs(values - ordered[above - 1]) < np.abs(ordered[above] - values)
    found = _BYTES_IN_ORDER[np.where(nearer_below, above - 1, above)]
    return np.where(np.isnan(values), np.uint8(127), found)


def rows_of_float8(pool):
    """The memory of a pool as float8 numbers, in float64: ``[layers, 2, rows * bytes of an element, W]``."""
    layers, planes, rows, width = pool.shape
    return FLOAT8[np.ascontiguousarray(pool).view(np.uint8)].reshape(layers, planes, rows * pool.itemsize, width)


def pool_of_float8(values, dtype):
    """A pool of ``dtype`` whose memory holds these values ``[layers, 2, rows * bytes of an element, W]`` as float8."""
    layers, planes, rows, width = values.shape
    return nearest_float8(values).view(dtype).reshape(layers, planes, rows // np.dtype(dtype).itemsize, width)


def attention(q, pool, layer, page_table, query_start, context_len, *, num_kv_heads, scale, page=ROWS_IN_PAGE):
    """Causal attention of every query token over its sequence's pages; 0 for tokens of no sequence.

    ``page`` is the number of the pool's rows, one for each token, in a page.
    """
    q, pool = np.asarray(q, np.float64), np.asarray(pool)
    num_heads, depth = q.shape[1:]
    out = np.zeros(q.shape)
    for s in range(len(page_table)):
        tokens = np.arange(query_start[s], query_start[s + 1])
        if not len(tokens):
            continue
        at = np.arange(context_len[s])
        rows = page_table[s][at // page] * page + at % page
        keys = pool[layer, 0][rows].astype(np.float64).reshape(-1, num_kv_heads, depth)
        values = pool[layer, 1][rows].astype(np.float64).reshape(-1, num_kv_heads, depth)
        position = context_len[s] - query_start[s + 1] + tokens
        is_seen = at <= position[:, None]
        for h in range(num_heads):
            g = h // (num_heads // num_kv_heads)
            scores = np.where(is_seen, scale * q[tokens, h] @ keys[:, g].T, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[tokens, h] = weights / weights.sum(axis=1, keepdims=True) @ values[:, g]
    return out


def rotary_write(qkv, cos, sin, pool, layer, rows, *, num_kv_heads, head_dim):
    """Rotated q ``[T, H, D]`` in float64; the pool in float64 with each token's rotated K, and V, in its row."""
    qkv, pool = np.asarray(qkv, np.float64), np.array(pool, np.float64)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = np.zeros((len(qkv), num_heads, head_dim))
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    for n in range(num_heads + 2 * num_kv_heads):
        head = qkv[:, n * head_dim : (n + 1) * head_dim]
        if n < num_heads + num_kv_heads:
            pairs = (head[:, : head_dim // 2] + 1j * head[:, head_dim // 2 :]) * turn
            head = np.concatenate([pairs.real, pairs.imag], axis=1)
        if n < num_heads:
            q[:, n] = head
        else:
            plane, g = divmod(n - num_heads, num_kv_heads)
            pool[layer, plane, rows, g * head_dim : (g + 1) * head_dim] = head
    return q, pool


def rank_vectors(pool, layer, pages, start, rank, length):
    """A matrix ``[rank, length]`` whose chunks start at entry ``start`` of the chunk list of ``pages``' adapter.

    Chunk c of vector i is entry ``start + c * rank + i``. The list fills the pages' keys, then their values.
    """
    num_chunks = -(-length // pool.shape[3])
    entries = start + np.arange(num_chunks) * rank + np.arange(rank)[:, None]
    plane, j = np.divmod(entries, ROWS_IN_PAGE * len(pages))
    chunks = pool[layer, plane, pages[j // ROWS_IN_PAGE] * ROWS_IN_PAGE + j % ROWS_IN_PAGE]
    return chunks.reshape(rank, -1)[:, :length].astype(np.float64)


def shrink(x, pool, layer, segments, modules):
    x, pool = np.asarray(x, np.float64), np.asarray(pool)
    out = np.zeros((len(x), len(modules), segments.max_rank))
    for g, pages, tokens in _adapters(segments):
        for j, m in enumerate(modules):
            if rank := int(segments.rank[g, m]):
                a = rank_vectors(pool, layer, pages, int(segments.start_a[g, m]), rank, x.shape[1])
                out[tokens, j, :rank] = float(segments.scale[g, m]) * x[tokens] @ a.T
    return out


def expand(partial_sums, widths, pool, layer, segments, modules):
    """The modules' updates side by side; ``widths`` are (d_in, d_out) of all modules."""
    partial_sums, pool = np.asarray(partial_sums, np.float64), np.asarray(pool)
    outs = [np.zeros((len(partial_sums), widths[m][1])) for m in modules]
    for g, pages, tokens in _adapters(segments):
        for j, m in enumerate(modules):
            if rank := int(segments.rank[g, m]):
                b = rank_vectors(pool, layer, pages, int(segments.start_b[g, m]), rank, widths[m][1])
                outs[j][tokens] = partial_sums[tokens, j, :rank] @ b
    return np.concatenate(outs, axis=1)


def _adapters(segments):
    """(segment, its pages, its tokens) of every segment that has tokens."""
    token_start, page_start = np.asarray(segments.token_start), np.asarray(segments.page_start)
    for g in range(len(token_start) - 1):
        tokens = slice(token_start[g], token_start[g + 1])
        if tokens.start < tokens.stop:
            yield g, np.asarray(segments.pages)[page_start[g] : page_start[g + 1]], tokens


def stored_integers(packed: np.ndarray, bits: int = 4) -> np.ndarray:
    """The integers ``[in, out]`` of packed words, by what the layout says of every bit."""
    blocks, d_out, _ = packed.shape
    block = 256 // bits
    values = np.empty((blocks * block, d_out), np.int64)
    for k in range(block):
        j, rest = divmod(k, 16)
        i, h = divmod(rest, 2)
        field = packed[:, :, i].astype(np.int64) >> (bits * j + 16 * h)
        values[k::block] = field % 2**bits - 2 ** (bits - 1)
    return values
