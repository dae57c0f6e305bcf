"""The vectorised oracles against loops over single tokens, keys and chunks, which read like the contracts."""

import cmath

import numpy as np

from tests.helpers import oracles
from tests.kernels.test_references import Adapters, Attention, Rotary


def test_attention():
    case = Attention(((1, 20), (5, 17), (0, 3), (3, 3)), 4, 2, 8)
    q, pool, table, query_start, context_len = case.build(0)
    expected = np.zeros(q.shape)
    for s, (count, length) in enumerate(case.sequences):
        for t in range(count):
            rows = [table[s][c // 16] * 16 + c % 16 for c in range(length - count + t + 1)]
            for h in range(4):
                query, g = q[query_start[s] + t, h].astype(np.float64), slice(h // 2 * 8, h // 2 * 8 + 8)
                weights = [np.exp(0.2 * np.dot(query, pool[1, 0, row, g])) for row in rows]
                mean = sum(weight * pool[1, 1, row, g] for weight, row in zip(weights, rows, strict=True))
                expected[query_start[s] + t, h] = mean / sum(weights)
    actual = oracles.attention(q, pool, 1, table, query_start, context_len, num_kv_heads=2, scale=0.2)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_rotary_write():
    case = Rotary(3, 1, 6)
    qkv, cos, sin, pool, rows = case.build(0)
    q, written = oracles.rotary_write(qkv, cos, sin, pool, 1, rows, num_kv_heads=1, head_dim=6)
    for t in np.flatnonzero(rows != 5):
        for n, rotated in enumerate([*q[t], written[1, 0, rows[t]]]):
            head = qkv[t, 6 * n : 6 * n + 6].astype(float)
            for i in range(3):
                turned = complex(head[i], head[i + 3]) * cmath.rect(1, cmath.phase(complex(cos[t, i], sin[t, i])))
                np.testing.assert_allclose([rotated[i], rotated[i + 3]], [turned.real, turned.imag], atol=1e-6)
        np.testing.assert_array_equal(written[1, 1, rows[t]], qkv[t, 24:])


def test_lora():
    case = Adapters(((9, 3), (0, 40)), (2, 3), ((20, 50), (20, 7)), row_width=16, before=1)
    segments, pool, _ = case.build(0)
    x = np.random.default_rng(0).normal(size=(6, 20))
    sums = oracles.shrink(x, pool, 1, segments, (1, 0))
    out = oracles.expand(sums, case.widths, pool, 1, segments, (1, 0))

    def vector(g, start, rank, i, length):
        pages = segments.pages[segments.page_start[g] : segments.page_start[g + 1]]
        values = []
        for c in range(-(-length // 16)):
            plane, row = divmod(start + c * rank + i, 16 * len(pages))
            values += list(pool[1, plane, 16 * pages[row // 16] + row % 16])
        return np.array(values[:length], float)

    assert not sums[0].any() and not out[0].any()
    for g, tokens in ((0, (1, 2)), (1, (3, 4, 5))):
        for t in tokens:
            for j, m in enumerate((1, 0)):
                rank, expected = segments.rank[g, m], 0.0
                assert not sums[t, j, rank:].any()
                for i in range(rank):
                    a = vector(g, segments.start_a[g, m], rank, i, 20)
                    np.testing.assert_allclose(sums[t, j, i], segments.scale[g, m] * np.dot(a, x[t]), atol=1e-12)
                    expected = expected + sums[t, j, i] * vector(g, segments.start_b[g, m], rank, i, case.widths[m][1])
                mine = out[t, :7] if m == 1 else out[t, 7:]
                np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-12)
