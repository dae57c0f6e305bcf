"""The kernels' contracts as float64 loops over single tokens, heads and rank rows. Shares no code with the kernels."""

import numpy as np

ROWS_IN_PAGE = 16


def attention(q, pool, layer, page_table, query_start, context_len, *, num_kv_heads, scale):
    """Causal attention of every query token over its sequence's pages; 0 for tokens of no sequence."""
    q, pool = np.asarray(q, np.float64), np.asarray(pool)
    num_heads, depth = q.shape[1:]
    out = np.zeros(q.shape)
    for s in range(len(page_table)):
        for t in range(query_start[s], query_start[s + 1]):
            position = context_len[s] - query_start[s + 1] + t
            rows = [page_table[s][c // ROWS_IN_PAGE] * ROWS_IN_PAGE + c % ROWS_IN_PAGE for c in range(position + 1)]
            keys = pool[layer, 0][rows].astype(np.float64).reshape(-1, num_kv_heads, depth)
            values = pool[layer, 1][rows].astype(np.float64).reshape(-1, num_kv_heads, depth)
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                scores = np.array([scale * np.dot(q[t, h], key) for key in keys[:, g]])
                weights = np.exp(scores - max(scores))
                for weight, value in zip(weights / weights.sum(), values[:, g], strict=True):
                    out[t, h] += weight * value
    return out


def rotary_write(qkv, cos, sin, pool, layer, rows, *, num_kv_heads, head_dim):
    """Rotated q ``[T, H, D]`` in float64; the pool in float64 with each token's rotated K, and V, in its row."""
    qkv, pool = np.asarray(qkv, np.float64), np.array(pool, np.float64)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = np.zeros((len(qkv), num_heads, head_dim))
    for t, row in enumerate(rows):
        for n in range(num_heads + 2 * num_kv_heads):
            head = qkv[t, n * head_dim : (n + 1) * head_dim]
            if n < num_heads + num_kv_heads:
                pairs = [
                    complex(head[i], head[i + head_dim // 2]) * complex(cos[t, i], sin[t, i])
                    for i in range(head_dim // 2)
                ]
                head = [pair.real for pair in pairs] + [pair.imag for pair in pairs]
            if n < num_heads:
                q[t, n] = head
            else:
                plane, g = divmod(n - num_heads, num_kv_heads)
                pool[layer, plane, row, g * head_dim : (g + 1) * head_dim] = head
    return q, pool


def list_entry(pool, layer, pages, entry):
    """Entry ``entry`` of the chunk list of an adapter that owns ``pages``."""
    rows = ROWS_IN_PAGE * len(pages)
    plane, j = divmod(entry, rows)
    return np.asarray(pool[layer, plane, pages[j // ROWS_IN_PAGE] * ROWS_IN_PAGE + j % ROWS_IN_PAGE], np.float64)


def rank_vector(pool, layer, pages, start, rank, i, length):
    """Vector i of a matrix of ``rank`` vectors whose chunks start at list entry ``start``, cut to ``length``."""
    vector = []
    c = 0
    while len(vector) < length:
        vector.extend(list_entry(pool, layer, pages, start + c * rank + i))
        c += 1
    return np.array(vector[:length])


def shrink(x, pool, layer, segments, modules):
    x, pool = np.asarray(x, np.float64), np.asarray(pool)
    out = np.zeros((len(x), len(modules), segments.max_rank))
    for g, pages, tokens in _adapters(segments):
        for j, m in enumerate(modules):
            rank = int(segments.rank[g, m])
            for i in range(rank):
                a = rank_vector(pool, layer, pages, int(segments.start_a[g, m]), rank, i, x.shape[1])
                for t in tokens:
                    out[t, j, i] = float(segments.scale[g, m]) * np.dot(x[t], a)
    return out


def expand(partial_sums, widths, pool, layer, segments, modules):
    """The modules' updates side by side; ``widths`` are (d_in, d_out) of all modules."""
    partial_sums, pool = np.asarray(partial_sums, np.float64), np.asarray(pool)
    outs = [np.zeros((len(partial_sums), widths[m][1])) for m in modules]
    for g, pages, tokens in _adapters(segments):
        for j, m in enumerate(modules):
            rank = int(segments.rank[g, m])
            for i in range(rank):
                b = rank_vector(pool, layer, pages, int(segments.start_b[g, m]), rank, i, widths[m][1])
                for t in tokens:
                    outs[j][t] += partial_sums[t, j, i] * b
    return np.concatenate(outs, axis=1)


def _adapters(segments):
    """(segment, its pages, its tokens) of every segment that has tokens."""
    token_start, page_start = np.asarray(segments.token_start), np.asarray(segments.page_start)
    for g in range(len(token_start) - 1):
        tokens = range(token_start[g], token_start[g + 1])
        if tokens:
            yield g, np.asarray(segments.pages)[page_start[g] : page_start[g + 1]], tokens
