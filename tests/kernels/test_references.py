"""The plain-JAX kernels against float64 oracles. Whatever the contract leaves unread holds NaN here."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import (
    PAGE_SIZE,
    LoraSegments,
    lora_delta,
    lora_expand,
    lora_shrink,
    paged_attention,
    plan_attention,
    plan_lora,
    rotary_write_kv,
)
from tests.helpers import oracles

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = np.dtype(np.float16)
BACKENDS = ("reference", pytest.param("triton", marks=pytest.mark.gpu))
TOLERANCE = {np.dtype(np.float32): 2e-6, np.dtype(np.float16): 1e-3, BFLOAT16: 8e-3}


def assert_close(actual, expected):
    """Compares with the rounding error of ``actual``'s dtype, relative to the largest element."""
    tolerance = TOLERANCE[np.dtype(actual.dtype)] * max(1.0, np.max(np.abs(expected)))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


# Paged attention.


@dataclasses.dataclass(frozen=True)
class Attention:
    """Inputs of one call; ``sequences`` are (query tokens, context length)."""

    sequences: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    depth: int
    dtype: np.dtype = np.dtype(np.float32)  # noqa: RUF009
    query_dtype: np.dtype | None = None
    padding: int = 3
    layer: int = 1
    float8: bool = False

    @property
    def tokens_per_row(self) -> int:
        return self.dtype.itemsize if self.float8 else 1

    def expected(self, q, pool, *ragged, scale):
        """The oracle's attention over the arrays that ``build`` gave."""
        page = PAGE_SIZE * self.tokens_per_row
        rows = oracles.rows_of_float8(pool) if self.float8 else pool
        return oracles.attention(q, rows, self.layer, *ragged, num_kv_heads=self.kv_heads, scale=scale, page=page)

    def build(self, seed: int):
        rng = np.random.default_rng(seed)
        width = self.kv_heads * self.depth
        page = PAGE_SIZE * self.tokens_per_row
        num_pages = [-(-context // page) for _, context in self.sequences]
        pool = np.full((3, 2, (sum(num_pages) + 4) * page, width), np.nan, "float64" if self.float8 else self.dtype)
        free = list(rng.permutation(np.arange(1, pool.shape[2] // page)))
        # Entries past a context: nobody's page, and numbers that are no page at all.
        table = np.full((len(self.sequences), max(num_pages) + 2), 10**6, np.int32)
        table[:, -1] = -7
        table[:, -2] = 0
        for s, (num_queries, context) in enumerate(self.sequences):
            pages = [free.pop() for _ in range(num_pages[s])]
            table[s, : len(pages)] = pages
            if num_queries:
                rows = (np.array(pages)[:, None] * page + np.arange(page)).reshape(-1)[:context]
                pool[self.layer, :, rows] = rng.normal(size=(context, 2, width))
        if self.float8:
            pool = oracles.pool_of_float8(pool, self.dtype)
        query_start = np.cumsum([0] + [n for n, _ in self.sequences]).astype(np.int32)
        q = rng.normal(size=(query_start[-1] + self.padding, self.heads, self.depth))
        q[query_start[-1] :] = np.nan
        contexts = np.array([context for _, context in self.sequences], np.int32)
        return q.astype(self.query_dtype or self.dtype), pool, table, query_start, contexts


DECODE = tuple((1, n) for n in (1, 16, 17, 40, 127, 128, 129, 300))
ATTENTION = {
    "decode multi-head": Attention(DECODE, 4, 4, 64),
    "decode with empty sequences": Attention(((0, 20), (1, 5), (0, 0), (0, 33), (1, 33), (0, 9)), 4, 2, 64),
    "decode grouped bf16": Attention(DECODE, 9, 3, 64, BFLOAT16),
    "decode multi-query f16": Attention(DECODE[:5], 5, 1, 80, np.dtype(np.float16), layer=2),
    "one token": Attention(((1, 1),), 2, 1, 64, padding=0),
    "mixture": Attention(((1, 70), (37, 37), (1, 1), (0, 12), (16, 16), (5, 140), (1, 129)), 6, 2, 96),
    "mixture bf16": Attention(((3, 3), (1, 200), (20, 45), (0, 0)), 4, 2, 128, BFLOAT16, layer=0),
    "f32 queries, bf16 pool": Attention(((2, 30), (1, 18)), 4, 2, 64, BFLOAT16, np.dtype(np.float32)),
    "chunks of a prompt": Attention(((32, 170), (33, 33), (17, 160)), 4, 1, 64, layer=2, padding=30),
    "nothing but padding": Attention(((0, 0), (0, 40)), 4, 2, 64, padding=4),
    "decode float8 in bf16": Attention(DECODE, 4, 2, 64, BFLOAT16, float8=True),
    "decode multi-head float8 in f16": Attention(DECODE, 2, 2, 80, HALF, float8=True),
    "mixture float8 in f32": Attention(
        ((1, 70), (37, 37), (1, 1), (0, 12), (16, 16), (5, 140), (1, 129)), 6, 2, 96, float8=True
    ),
    "mixture float8 in bf16": Attention(((3, 3), (1, 200), (20, 45), (0, 0)), 4, 2, 128, BFLOAT16, float8=True),
}


def attend(
    q,
    pool,
    layer,
    page_table,
    query_start,
    context_len,
    *,
    num_kv_heads,
    scale,
    backend,
    max_query_len=None,
    tokens_per_row=1,
):
    sizes = {"num_tokens": q.shape[0], "max_query_len": max_query_len, "tokens_per_row": tokens_per_row}
    plan = plan_attention(page_table, query_start, context_len, num_kv_heads=num_kv_heads, backend=backend, **sizes)
    return paged_attention(q, pool, layer, plan, num_kv_heads=num_kv_heads, scale=scale)


# Most of the time goes into compiling, so it is kept short.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
jitted_attend = jax.jit(
    attend,
    static_argnames=("layer", "num_kv_heads", "scale", "max_query_len", "backend", "tokens_per_row"),
    compiler_options=COMPILER_OPTIONS,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "name"), list(enumerate(ATTENTION)))
def test_paged_attention(seed, name, backend):
    case = ATTENTION[name]
    q, pool, *ragged = case.build(seed)
    expected = case.expected(q, pool, *ragged, scale=0.3)
    assert np.isfinite(expected).all()

    longest = max(n for n, _ in case.sequences)
    for max_query_len in (None, 1) if longest <= 1 and case.dtype == np.float32 else (longest,):
        options = {"num_kv_heads": case.kv_heads, "scale": 0.3, "max_query_len": max_query_len, "backend": backend}
        options["tokens_per_row"] = case.tokens_per_row
        out = jitted_attend(q, pool, case.layer, *ragged, **options)
        assert out.dtype == q.dtype
        assert_close(out, expected)
        assert not np.asarray(out[ragged[1][-1] :]).any(), "padding tokens give exactly 0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, pool, *ragged = ATTENTION["one token"].build(0)
    out = jitted_attend(q * 1e4, pool, 1, *ragged, num_kv_heads=1, scale=0.3, backend=backend)
    assert_close(out, oracles.attention(q * 1e4, pool, 1, *ragged, num_kv_heads=1, scale=0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 64))}, "q must have 3 axes"),
        ({"q": jnp.zeros((2, 3, 64))}, "not a multiple of num_kv_heads=2"),
        ({"q": jnp.zeros((2, 4, 32))}, r"pool must be \[layers, 2, pages \* 16, 64\]"),
        ({"pool": jnp.zeros((2, 2, 40, 128))}, "pool must be"),
        ({"pool": jnp.zeros((2, 1, 32, 128))}, "pool must be"),
        ({"layer": 2}, r"layer must be in \[0, 2\), got 2"),
        ({"layer": -1}, r"layer must be in \[0, 2\), got -1"),
        ({"page_table": jnp.zeros(2, jnp.int32)}, "page_table must have 2 axes"),
        ({"page_table": jnp.zeros((1, 2), jnp.float32)}, "page_table must be int32"),
        ({"query_start": jnp.zeros(1, jnp.int32)}, "query_start must be int32"),
        ({"context_len": jnp.zeros(2, jnp.int32)}, "context_len must be int32"),
        ({"tokens_per_row": 2}, "tokens_per_row must be 1, .* or the 4 bytes of an element of float32"),
    ],
)
def test_paged_attention_refuses(change, message):
    arguments = {
        "q": jnp.zeros((2, 4, 64)),
        "pool": jnp.zeros((2, 2, 32, 128)),
        "page_table": jnp.zeros((1, 2), jnp.int32),
        "query_start": jnp.zeros(2, jnp.int32),
        "context_len": jnp.zeros(1, jnp.int32),
    }
    static = {"layer": 0, "tokens_per_row": 1} | {k: v for k, v in change.items() if isinstance(v, int)}
    arrays = arguments | {name: array for name, array in change.items() if name not in static}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(attend, **static, num_kv_heads=2, scale=1.0, backend="reference"), **arrays)


# Rotary embedding and the KV write.


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Inputs of one call; token 3 is padding, and so are the last two, all in one row of the trash page."""

    heads: int
    kv_heads: int
    depth: int
    dtype: np.dtype = np.dtype(np.float32)  # noqa: RUF009
    pool_dtype: np.dtype | None = None
    tokens: int = 12
    float8: bool = False

    @property
    def tokens_per_row(self) -> int:
        return (self.pool_dtype or self.dtype).itemsize if self.float8 else 1

    def build(self, seed: int):
        """Returns ``qkv``, cosine, sine, the pool and the rows; NaN in the layers that must be left alone."""
        rng = np.random.default_rng(seed)
        page = PAGE_SIZE * self.tokens_per_row
        pool = rng.normal(size=(3, 2, 5 * page, self.kv_heads * self.depth))
        pool[[0, 2]] = np.nan
        dtype = self.pool_dtype or self.dtype
        pool = oracles.pool_of_float8(pool, dtype) if self.float8 else pool.astype(dtype)
        qkv = rng.normal(size=(self.tokens, (self.heads + 2 * self.kv_heads) * self.depth)).astype(self.dtype)
        angle = rng.uniform(0, 6, (self.tokens, self.depth // 2))
        rows = rng.permutation(np.arange(page, 5 * page))[: self.tokens].astype(np.int32)
        rows[[3, -2, -1]] = 5
        qkv[3] = np.nan
        if self.float8:
            qkv[4] *= 1000  # beyond the largest number
            qkv[5] /= 100  # where numbers are no longer normal
        return qkv, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), pool, rows

    def check(self, actual, qkv, cos, sin, pool, rows):
        """Compares a call's ``(q, pool)`` for layer 1 with the oracle."""
        if self.float8:
            self._check_float8(actual, qkv, cos, sin, pool, rows)
            return
        q, written = actual
        expected_q, expected = oracles.rotary_write(
            qkv, cos, sin, pool, 1, rows, num_kv_heads=self.kv_heads, head_dim=self.depth
        )
        real = rows != 5
        assert q.dtype == qkv.dtype and q.shape == expected_q.shape and written.dtype == pool.dtype
        assert_close(q[real], expected_q[real])
        written = np.asarray(written)
        assert_close(written[1][:, np.arange(pool.shape[2]) != 5], np.delete(expected[1], 5, axis=1))
        untouched = np.setdiff1d(np.arange(pool.shape[2]), rows)
        assert written[1][:, untouched].tobytes() == pool[1][:, untouched].tobytes()
        assert written[[0, 2]].tobytes() == pool[[0, 2]].tobytes()
        # V is copied, not computed with.
        v = qkv[:, -self.kv_heads * self.depth :].astype(pool.dtype)
        assert written[1, 1][rows[real]].tobytes() == v[real].tobytes()

    def _check_float8(self, actual, qkv, cos, sin, pool, rows):
        q, written = actual
        before, real = oracles.rows_of_float8(pool), rows != 5
        expected_q, expected = oracles.rotary_write(
            qkv, cos, sin, before, 1, rows, num_kv_heads=self.kv_heads, head_dim=self.depth
        )
        assert q.dtype == qkv.dtype and written.dtype == pool.dtype and written.shape == pool.shape
        tolerance = TOLERANCE[qkv.dtype] * np.abs(expected_q[real]).max()
        np.testing.assert_allclose(np.asarray(q, np.float64)[real], expected_q[real], rtol=0, atol=tolerance)
        after, exact = oracles.rows_of_float8(np.asarray(written)), np.clip(expected, -448, 448)
        at = rows[real]
        # Half of what lies between two neighbours, and what K is off by before it is rounded.
        apart = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(exact[1][:, at]), 1e-9))), -6) - 3)
        assert (np.abs(after[1][:, at] - exact[1][:, at]) <= apart / 2 + 2e-6 * np.abs(exact[1][:, at])).all()
        # Every other token's bytes are as they were, those of the same row of the pool, too.
        bytes_before, bytes_after = (_bytes_of_tokens(p, self.tokens_per_row) for p in (pool, np.asarray(written)))
        others = np.setdiff1d(np.arange(before.shape[2]), rows)
        assert bytes_after[1][:, others].tobytes() == bytes_before[1][:, others].tobytes()
        assert bytes_after[[0, 2]].tobytes() == bytes_before[[0, 2]].tobytes()


def _bytes_of_tokens(pool, tokens_per_row):
    """``[layers, 2, tokens, W]``."""
    layers, planes, rows, width = pool.shape
    return np.ascontiguousarray(pool).view(np.uint8).reshape(layers, planes, rows * tokens_per_row, width)


ROTARY = {
    "multi-head": Rotary(4, 4, 64),
    "grouped, halves of 40": Rotary(6, 2, 80, HALF),
    "multi-query, halves of 3": Rotary(3, 1, 6),
    "many heads": Rotary(32, 8, 16, HALF),
    "bf16": Rotary(9, 3, 64, BFLOAT16),
    "f32 input, f16 pool": Rotary(2, 1, 24, pool_dtype=HALF, tokens=40),
    "float8 in bf16": Rotary(4, 2, 64, BFLOAT16, tokens=60, float8=True),
    "float8 in f32": Rotary(3, 1, 20, tokens=60, float8=True),
    "float8 in f16": Rotary(2, 2, 80, HALF, tokens=60, float8=True),
}
jitted_rotary = jax.jit(
    rotary_write_kv,
    static_argnames=("num_kv_heads", "head_dim", "backend", "tokens_per_row"),
    compiler_options=COMPILER_OPTIONS,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "name"), list(enumerate(ROTARY)))
def test_rotary_write_kv(seed, name, backend):
    case = ROTARY[name]
    qkv, cos, sin, pool, rows = case.build(seed)
    options = {"num_kv_heads": case.kv_heads, "head_dim": case.depth, "tokens_per_row": case.tokens_per_row}
    options["backend"] = backend
    out = jitted_rotary(qkv, (cos, sin), pool, np.int32(1), rows, **options)
    case.check(out, qkv, cos, sin, pool, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "float8"), [(jnp.float32, False), (jnp.bfloat16, False), (jnp.bfloat16, True)])
def test_layers_that_write_and_attend_never_copy_a_donated_pool(dtype, float8, backend):
    per_row = 2 if float8 else 1
    tokens, heads, kv_heads, depth, layers = 24, 4, 2, 64, 2
    width = kv_heads * depth
    pool = jnp.zeros((layers, 2, 2048 * PAGE_SIZE, width), dtype)
    adapters = Adapters(ranks=((4,), (2,)), tokens=(8, 16), widths=((256, 256),), row_width=width)
    segments, *_ = adapters.build(0)

    def step(pool, x, rope, rows, table, query_start, context_len, segments):
        sizes = {"num_tokens": tokens, "num_kv_heads": kv_heads, "max_query_len": 1, "tokens_per_row": per_row}
        attention = plan_attention(table, query_start, context_len, **sizes, backend=backend)
        lora = plan_lora(segments, num_tokens=tokens, row_width=width, widths=adapters.widths, backend=backend)
        for layer in range(layers):
            q = x + lora_delta(x, pool, layer, lora, (0,))
            qkv = jnp.concatenate([q, x], axis=1)
            sizes = {"num_kv_heads": 2, "head_dim": depth, "tokens_per_row": per_row}
            q, pool = rotary_write_kv(qkv, rope, pool, layer, rows, **sizes, backend=backend)
            out = paged_attention(q, pool, layer, attention, num_kv_heads=kv_heads, scale=0.1)
            x = x + out.reshape(tokens, -1)
        return pool, x

    table = jnp.arange(1, 1 + 2 * tokens, dtype=jnp.int32).reshape(tokens, 2)
    arguments = (
        jnp.ones((tokens, heads * depth)),
        (jnp.ones((tokens, depth // 2)), jnp.zeros((tokens, depth // 2))),
        table[:, 0] * PAGE_SIZE * per_row,
        table,
        jnp.arange(tokens + 1, dtype=jnp.int32),
        jnp.ones(tokens, jnp.int32),
        segments,
    )
    address = pool.unsafe_buffer_pointer()
    compiled = jax.jit(step, donate_argnums=0).lower(pool, *arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes / 4
    pool, _ = compiled(pool, *arguments)
    assert pool.unsafe_buffer_pointer() == address


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": jnp.zeros((4, 2, 64))}, "qkv must have 2 axes"),
        ({"qkv": jnp.zeros((4, 72))}, r"qkv must be \[T, \(H \+ 2 \* 2\) \* 8\] with H a multiple of 2"),
        ({"qkv": jnp.zeros((4, 32))}, "qkv must be"),
        ({"head_dim": 16}, r"pool must be \[layers, 2, pages \* 16, 32\]"),
        ({"rope": (jnp.zeros((4, 8)), jnp.zeros((4, 4)))}, r"cos must be float32 \(4, 4\)"),
        ({"rope": (jnp.zeros((4, 4)), jnp.zeros((4, 4), jnp.bfloat16))}, "sin must be float32"),
        ({"rows": jnp.zeros(3, jnp.int32)}, "rows must be int32"),
        ({"rows": jnp.zeros(4)}, "rows must be int32"),
        ({"layer": 5}, "layer must be in"),
        ({"layer": jnp.zeros(1, jnp.int32)}, r"layer must be int32 \(\)"),
        ({"layer": jnp.zeros(())}, "layer must be int32"),
        ({"tokens_per_row": 3}, "tokens_per_row must be 1"),
        (
            {
                "num_kv_heads": 3,
                "head_dim": 6,
                "pool": jnp.zeros((2, 2, 32, 18)),
                "tokens_per_row": 4,
                "qkv": jnp.zeros((4, 54)),
                "rope": (jnp.zeros((4, 3)),) * 2,
            },
            "divide W; got 4 and W 18",
        ),
    ],
)
def test_rotary_write_kv_refuses(change, message):
    arguments = {
        "qkv": jnp.zeros((4, 64)),
        "rope": (jnp.zeros((4, 4)), jnp.zeros((4, 4))),
        "pool": jnp.zeros((2, 2, 32, 16)),
        "layer": 0,
        "rows": jnp.zeros(4, jnp.int32),
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    with pytest.raises(ValueError, match=message):
        rotary_write_kv(**arguments | change, backend="reference")


# Gathered LoRA.


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Segments and the pool that holds their adapters.

    Attributes:
      ranks: by segment, its modules' ranks.
      tokens: by segment, its number of tokens.
      widths: by module, its input and output width.
      before, after: tokens without an adapter at each end.
      slack: added to the static bounds.
      shared: pairs of segments of which the second has the first's adapter (its ranks must be equal).
      input_dtype: dtype of x and y, if not the pool's.
    """

    ranks: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]
    row_width: int = 32
    dtype: np.dtype = np.dtype(np.float32)  # noqa: RUF009
    before: int = 0
    after: int = 0
    slack: int = 0
    shared: tuple[tuple[int, int], ...] = ()
    layer: int = 1
    input_dtype: np.dtype | None = None

    def build(self, seed: int):
        """Returns the segments, the pool, and every segment's (A, B) by module, in float64."""
        rng = np.random.default_rng(seed)
        num_segments, num_modules = len(self.ranks), len(self.widths)
        starts = np.zeros((2, num_segments, num_modules), np.int32)
        vectors = {}  # (segment, list entry) -> chunk
        matrices = [[None] * num_modules for _ in self.ranks]
        num_pages = []
        shared = {second: first for first, second in self.shared}
        for g, ranks in enumerate(self.ranks):
            entry = int(rng.integers(0, 5))
            for m, rank in enumerate(ranks):
                pair = []
                for side in (0, 1):
                    width = self.widths[m][side]
                    matrix = rng.normal(size=(rank, width)).astype(self.dtype)
                    pair.append(matrix.astype(np.float64))
                    starts[side, g, m] = entry
                    for c in range(0, width, self.row_width):
                        for i in range(rank):
                            chunk = np.zeros(self.row_width, self.dtype)
                            chunk[: len(matrix[i, c : c + self.row_width])] = matrix[i, c : c + self.row_width]
                            vectors[g, entry] = chunk
                            entry += 1
                    entry += int(rng.integers(0, 3))  # lists need not be dense
                matrices[g][m] = (pair[0], pair[1].T)
            num_pages.append(-(-entry // (2 * PAGE_SIZE)) if any(ranks) else 0)
        pool = np.full((2, 2, (sum(num_pages) + 5) * PAGE_SIZE, self.row_width), np.nan, self.dtype)
        free = list(rng.permutation(np.arange(1, pool.shape[2] // PAGE_SIZE)))
        pages = [[free.pop() for _ in range(n)] for n in num_pages]
        for g, first in shared.items():
            pages[g], matrices[g] = pages[first], matrices[first]
            starts[:, g] = starts[:, first]
        for (g, entry), chunk in vectors.items():
            if g not in shared:
                plane, row = divmod(entry, PAGE_SIZE * num_pages[g])
                pool[self.layer, plane, pages[g][row // PAGE_SIZE] * PAGE_SIZE + row % PAGE_SIZE] = chunk
        ranks = np.array(self.ranks, np.int32)
        segments = LoraSegments(
            token_start=np.cumsum([self.before, *self.tokens]).astype(np.int32),
            page_start=np.cumsum([0] + [len(p) for p in pages]).astype(np.int32),
            pages=np.array([page for p in pages for page in p] + [0] * self.slack, np.int32),
            rank=ranks,
            start_a=starts[0],
            start_b=starts[1],
            scale=rng.uniform(0.2, 2.0, ranks.shape).astype(np.float32),
            active=tuple(range(len(self.widths))),
            max_rank=int(ranks.max()) + self.slack,
            total_rank=int(ranks.sum(axis=0).max()) + self.slack,
        )
        return segments, pool, matrices

    @property
    def num_tokens(self) -> int:
        return self.before + sum(self.tokens) + self.after


LORA = {
    "ranks 1 to 64": Adapters(
        ranks=((1, 1), (64, 64), (3, 3), (16, 16), (33, 33)), tokens=(2, 1, 5, 1, 3), widths=((64, 32), (64, 96))
    ),
    "zero ranks": Adapters(
        ranks=((0, 8, 4), (5, 0, 0), (0, 0, 7)), tokens=(2, 2, 3), widths=((40, 70), (40, 20), (40, 40)), slack=3
    ),
    "empty segments": Adapters(
        ranks=((4, 4), (2, 2), (8, 8), (0, 0), (0, 0)), tokens=(3, 0, 2, 0, 0), widths=((32, 64), (32, 31)), slack=9
    ),
    "tokens on both sides": Adapters(
        ranks=((4, 2), (6, 6)), tokens=(3, 2), widths=((48, 50), (48, 33)), before=4, after=5, dtype=BFLOAT16
    ),
    "one adapter twice": Adapters(
        ranks=((8, 8), (2, 2), (8, 8)), tokens=(3, 2, 4), widths=((33, 65), (33, 64)), shared=((0, 2),)
    ),
    "float16": Adapters(ranks=((8,), (2,)), tokens=(3, 2), widths=((100, 31),), dtype=np.dtype(np.float16), layer=0),
    "f32 inputs, bf16 pool": Adapters(
        ranks=((8,), (3,)), tokens=(3, 2), widths=((40, 31),), dtype=BFLOAT16, input_dtype=np.dtype(np.float32)
    ),
    "one token": Adapters(ranks=((2,),), tokens=(1,), widths=((8, 8),)),
    "no adapter at all": Adapters(ranks=((0,),), tokens=(0,), widths=((40, 40),), after=4, slack=1),
}


def update(x, partial_sums, pool, layer, segments, modules, widths, backend):
    """Shrinks ``x``; expands ``partial_sums``; and does both to ``x`` at once."""
    plan = plan_lora(segments, num_tokens=x.shape[0], row_width=pool.shape[3], widths=widths, backend=backend)
    return (
        lora_shrink(x, pool, layer, plan, modules),
        lora_expand(partial_sums, pool, layer, plan, modules, x.dtype),
        lora_delta(x, pool, layer, plan, modules),
    )


jitted_update = jax.jit(update, static_argnames=("modules", "widths", "backend"), compiler_options=COMPILER_OPTIONS)


def check_lora(case, seed, backend, in_pool=lambda pool, segments: (pool, segments), run=jitted_update):
    """Compares with the oracle, where whatever must not matter holds NaN.

    Args:
      in_pool: maps the pool and the segments of the case to those that the kernels get.
    """
    segments, pool, matrices = case.build(seed)
    rng = np.random.default_rng(1000 + seed)
    modules = tuple(reversed(range(len(case.widths))))  # any order will do
    own = slice(case.before, case.num_tokens - case.after)
    x = rng.normal(size=(case.num_tokens, case.widths[0][0])).astype(case.input_dtype or case.dtype)
    sums = oracles.shrink(x, pool, case.layer, segments, modules)
    # What a token without an adapter holds, or partial sums past a token's rank, must not matter.
    partial_sums = np.full(sums.shape, np.nan, np.float32)
    for g in range(len(segments.rank)):
        tokens = slice(segments.token_start[g], segments.token_start[g + 1])
        for j, m in enumerate(modules):
            lanes = slice(0, segments.rank[g, m])
            partial_sums[tokens, j, lanes] = rng.normal(size=partial_sums[tokens, j, lanes].shape)
    expected = oracles.expand(np.nan_to_num(partial_sums), case.widths, pool, case.layer, segments, modules)
    at_once = oracles.expand(sums, case.widths, pool, case.layer, segments, modules)
    clean = np.array(x)
    x[: own.start] = x[own.stop :] = np.nan
    its_pool, its_segments = in_pool(pool, segments)
    layer = jnp.int32(case.layer)
    arguments = (x, partial_sums, its_pool, layer, its_segments, modules, case.widths, backend)

    shrunk, out, delta = run(*arguments)

    assert shrunk.dtype == np.float32
    # The matrix units' float32 sums are less exact than a chain of float32 additions.
    tolerance = (1e-5 if backend == "reference" else 5e-5) * max(1.0, np.abs(sums).max())
    np.testing.assert_allclose(shrunk, sums, rtol=0, atol=tolerance)
    for actual, wanted in ((out, expected), (delta, at_once)):
        assert actual.dtype == x.dtype
        assert_close(actual, wanted)
        assert not np.asarray(actual[: own.start]).any() and not np.asarray(actual[own.stop :]).any()
    for one, other in zip((shrunk, out, delta), run(*arguments), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), "the same input gives the same bits"

    # The oracle reads the same pool. Do the shrunk sums come from the matrices that the pool was made of?
    for g, matrices_of_segment in enumerate(matrices):
        tokens = slice(segments.token_start[g], segments.token_start[g + 1])
        for j, m in enumerate(modules):
            a, _ = matrices_of_segment[m]
            wanted = segments.scale[g, m] * clean[tokens].astype(np.float64) @ a.T
            np.testing.assert_allclose(shrunk[tokens, j, : len(a)], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(LORA)))
def test_lora(seed, name):
    check_lora(LORA[name], seed, "reference")


def test_lora_is_the_dense_update_of_each_adapter():
    case = LORA["one adapter twice"]
    segments, pool, matrices = case.build(7)
    modules = tuple(range(len(case.widths)))
    x = np.random.default_rng(7).normal(size=(case.num_tokens, case.widths[0][0])).astype(np.float32)
    sums = np.zeros((case.num_tokens, len(modules), segments.max_rank), np.float32)
    *_, delta = jitted_update(x, sums, pool, case.layer, segments, modules, case.widths, "reference")
    outs = np.split(np.asarray(delta), np.cumsum([d_out for _, d_out in case.widths])[:-1], axis=1)
    for g, matrices_of_segment in enumerate(matrices):
        tokens = slice(segments.token_start[g], segments.token_start[g + 1])
        for m, (a, b) in enumerate(matrices_of_segment):
            expected = segments.scale[g, m] * x[tokens].astype(np.float64) @ (b @ a).T
            np.testing.assert_allclose(outs[m][tokens], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_start": jnp.zeros(2, jnp.int32)}, "token_start must be int32"),
        ({"page_start": jnp.zeros(3)}, "page_start must be int32"),
        ({"rank": jnp.zeros(2, jnp.int32)}, "rank must have 2 axes"),
        ({"start_a": jnp.zeros((2, 3), jnp.int32)}, "start_a must be int32"),
        ({"start_b": jnp.zeros((2, 2))}, "start_b must be int32"),
        ({"scale": jnp.zeros((1, 2))}, "scale must be"),
    ],
)
def test_plan_lora_refuses(change, message):
    case = LORA["tokens on both sides"]
    segments = dataclasses.replace(case.build(0)[0], **change)
    with pytest.raises(ValueError, match=message):
        plan_lora(segments, num_tokens=14, row_width=case.row_width, widths=case.widths, backend="reference")


def test_lora_refuses():
    case = LORA["tokens on both sides"]
    segments, pool, _ = case.build(0)
    with pytest.raises(ValueError, match="widths must name 2 modules, got 1"):
        plan_lora(segments, num_tokens=14, row_width=case.row_width, widths=case.widths[:1], backend="reference")
    plan = jax.jit(
        partial(plan_lora, num_tokens=14, row_width=case.row_width, widths=case.widths, backend="reference")
    )(segments)
    x, partial_sums = jnp.zeros((14, 48)), jnp.zeros((14, 1, 6))
    with pytest.raises(ValueError, match="x must have 2 axes"):
        lora_shrink(x[0], pool, 1, plan, (0,))
    with pytest.raises(ValueError, match="x has 47 columns"):
        lora_delta(x[:, 1:], pool, 1, plan, (0,))
    with pytest.raises(ValueError, match=r"modules must be in \[0, 2\)"):
        lora_shrink(x, pool, 1, plan, (2,))
    with pytest.raises(ValueError, match="layer must be in"):
        lora_shrink(x, pool, 2, plan, (0,))
    with pytest.raises(ValueError, match="layer must be int32"):
        lora_shrink(x, pool, jnp.zeros(1, jnp.int32), plan, (0,))
    with pytest.raises(ValueError, match="partial_sums must be float32"):
        lora_expand(partial_sums.astype(jnp.bfloat16), pool, 1, plan, (0,), jnp.float32)
    with pytest.raises(ValueError, match="partial_sums must be float32"):
        lora_expand(partial_sums[:, :, :5], pool, 1, plan, (0,), jnp.float32)
