"""The Triton attention kernels without a GPU: interpreted, and compiled for every supported generation."""

import dataclasses
import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.paged_attention import rotary_triton, work
from pallas_kernels.paged_attention import triton as attention
from pallas_kernels.pool import PAGE_SIZE
from tests.helpers.triton_on_cpu import assert_interpreted, compiled, interpreted
from tests.kernels.test_references import ATTENTION, BFLOAT16, COMPILER_OPTIONS, ROTARY, Attention, assert_close

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = np.dtype(np.float16)

INTERPRETED = {
    **ATTENTION,
    "several tiles, several chunks": Attention(
        ((1, 700), (150, 400), (1, 513), (130, 130), (2, 2)), 4, 2, 64, HALF, padding=140
    ),
    "chunks, grouped": Attention(((1, 700), (1, 3), (1, 513), (0, 4)), 4, 2, 80),
    "chunks, multi-head": Attention(((1, 700), (1, 3), (1, 513)), 2, 2, 96),
    "float8, several tiles, several chunks": Attention(
        ((1, 700), (150, 400), (1, 513), (130, 130), (2, 2)), 4, 2, 64, BFLOAT16, padding=140, float8=True
    ),
    "float8, chunks, multi-head": Attention(((1, 700), (1, 3), (1, 513)), 2, 2, 96, BFLOAT16, float8=True),
}


@pytest.mark.skipif(INTERPRET, reason="is the outer process")
def test_interpreted():
    assert_interpreted(__file__, "by_interpreter", len(INTERPRETED) + len(ROTARY))


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(INTERPRETED)))
def test_attention_by_interpreter(seed, name, monkeypatch):
    case = INTERPRETED[name]

    def few_programs(op, *key):
        sizes = tuning.block_sizes(op, *key)
        return sizes | {"programs": 7} if "programs" in sizes else sizes  # interpreted one by one

    monkeypatch.setattr(attention, "block_sizes", few_programs)
    monkeypatch.setattr(attention, "ITEM_LEVELS", (4, 8))
    # With float8 the factors are float16.
    if case.dtype == BFLOAT16 and case.query_dtype is None and not case.float8:
        case = dataclasses.replace(case, dtype=HALF)
    q, pool, *ragged = case.build(seed)
    expected = case.expected(q, pool, *ragged, scale=0.3)
    longest = max(n for n, _ in case.sequences)
    for max_query_len in (None, 1) if longest <= 1 else (None,):
        with interpreted(attention):
            sizes = {"num_tokens": q.shape[0], "max_query_len": max_query_len, "tokens_per_row": case.tokens_per_row}
            plan = attention.plan(*map(jnp.asarray, ragged), num_kv_heads=case.kv_heads, **sizes)
            out = attention.paged_attention(
                jnp.asarray(q), jnp.asarray(pool), case.layer, plan, num_kv_heads=case.kv_heads, scale=0.3
            )
        assert_close(out, expected)
        assert not np.asarray(out[ragged[1][-1] :]).any(), "padding tokens give exactly 0"


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(ROTARY)))
def test_rotary_write_by_interpreter(seed, name):
    case = ROTARY[name]
    qkv, cos, sin, pool, rows = case.build(seed)
    arguments = map(jnp.asarray, (pool, 1, rows))
    with interpreted(rotary_triton):
        q, written = rotary_triton.rotary_write_kv(
            jnp.asarray(qkv),
            (jnp.asarray(cos), jnp.asarray(sin)),
            *arguments,
            num_kv_heads=case.kv_heads,
            head_dim=case.depth,
            tokens_per_row=case.tokens_per_row,
        )
    case.check((q, written), qkv, cos, sin, pool, rows)


jitted_cut = jax.jit(
    partial(work.cut, query_tile=64, min_chunk=64, levels=work.ITEM_LEVELS),
    static_argnames=("num_tokens", "max_query_len"),
    compiler_options=COMPILER_OPTIONS,
)


@pytest.mark.parametrize("max_query_len", [None, 1])
@pytest.mark.parametrize("seed", range(4))
def test_every_key_of_a_decoding_token_is_in_one_item(seed, max_query_len):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 2 if max_query_len else 4, 12)
    lengths = (counts + rng.integers(0, 40000 if seed % 2 else 900, 12)).astype(np.int32)
    query_start = np.cumsum([0, *counts]).astype(np.int32)
    num_tokens = 3 * 12 + 2  # the same for all, which is compiled once
    cut = jitted_cut(
        jnp.zeros((12, 3), jnp.int32),
        jnp.asarray(query_start),
        jnp.asarray(lengths),
        num_tokens=num_tokens,
        max_query_len=max_query_len,
    )
    decoding = {int(query_start[s]): s for s in range(12) if counts[s] == 1}
    for decode in cut.decode:
        keys = {token: [] for token in decoding}
        items, rows = np.asarray(decode.items), np.asarray(decode.rows)
        for token, sequence, begin, end, is_part, *_ in items:
            if begin < end:
                assert decoding[token] == sequence and is_part == (end - begin < lengths[sequence])
                keys[token].append((begin, end))
        for token, first, count, _ in rows:
            if token in decoding:
                mine = keys[token]
                assert len(mine) == count and [b for b, _ in mine] == [0] + [e for _, e in mine[:-1]]
                assert mine[-1][1] == lengths[decoding[token]]
                assert (items[first : first + count, 0] == token).all()
            else:
                assert count == 0
        written = {t for t in rows[:, 0] if t >= 0}
        for token, count, *_ in () if cut.tiles is None else np.asarray(cut.tiles.records):
            assert not written & set(range(token, token + count))
            written |= set(range(token, token + count))
        assert written == set(range(num_tokens))


COMPILED = {  # tokens, query heads, KV heads, head size, dtype of q, dtype of the pool, tokens a row
    "7B": (300, 32, 32, 128, jnp.bfloat16, jnp.bfloat16, 1),
    "8B": (300, 32, 8, 128, jnp.bfloat16, jnp.bfloat16, 1),
    "16 heads a KV head of 80": (300, 16, 1, 80, jnp.float16, jnp.float16, 1),
    "f32 queries": (300, 9, 3, 64, jnp.float32, jnp.bfloat16, 1),
    "7B, float8": (300, 32, 32, 128, jnp.bfloat16, jnp.bfloat16, 2),
    "8B, float8": (300, 32, 8, 128, jnp.bfloat16, jnp.bfloat16, 2),
    "float8 in f32": (300, 9, 3, 64, jnp.float32, jnp.float32, 4),
}
FLOAT8 = [name for name, (*_, tokens_per_row) in COMPILED.items() if tokens_per_row > 1]


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *itertools.product([name for name in COMPILED if name not in FLOAT8], (80, 90)),
        ("8B", 86),
        *itertools.product(FLOAT8, (89, 90)),
    ],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_attention_compiles(name, capability, monkeypatch):
    num_tokens, num_heads, num_kv_heads, head_dim, dtype, pool_dtype, tokens_per_row = COMPILED[name]
    kind = {80: "NVIDIA A100-SXM4-40GB", 86: "NVIDIA A10G", 89: "NVIDIA L40S", 90: "NVIDIA H200"}[capability]
    monkeypatch.setattr(attention, "device_kind", lambda: kind)
    monkeypatch.setattr(rotary_triton, "device_kind", lambda: kind)

    def step(qkv, rope, pool, layer, rows, page_table, query_start, context_len):
        per_row = {"tokens_per_row": tokens_per_row}
        plan = attention.plan(
            page_table, query_start, context_len, num_tokens=num_tokens, num_kv_heads=num_kv_heads, **per_row
        )
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim} | per_row
        q, pool = rotary_triton.rotary_write_kv(qkv, rope, pool, layer, rows, **sizes)
        return pool, attention.paged_attention(q, pool, layer, plan, num_kv_heads=num_kv_heads, scale=0.1)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    width = num_kv_heads * head_dim
    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype)
    qkv = jax.ShapeDtypeStruct((num_tokens, q.shape[1] * head_dim + 2 * width), dtype)
    rope = (jax.ShapeDtypeStruct((num_tokens, head_dim // 2), jnp.float32),) * 2
    pool = jax.ShapeDtypeStruct((2, 2, 64 * PAGE_SIZE, width), pool_dtype)
    ragged = integers(num_tokens), integers(8, 5), integers(9), integers(8)
    with compiled(attention, capability) as kernels, compiled(rotary_triton, capability) as rotary_kernels:
        outs = jax.eval_shape(step, qkv, rope, pool, integers(), *ragged)
    kernels = rotary_kernels + kernels

    assert outs == (pool, q)
    assert [name for name, _ in kernels] == [
        "_rotary_write_kernel",
        "_tile_kernel",
        "_decode_kernel",
        "_combine_kernel",
    ]
    shared_memory = {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    assert all(code.metadata.shared <= shared_memory for _, code in kernels)


@pytest.mark.parametrize(
    "change",
    [{"head_dim": 256}, {"group": 80}, {"dtype": jnp.float8_e4m3fn}, {"pool_dtype": jnp.int8}, {"scale": -1.0}],
)
def test_what_only_the_reference_does(change):
    sizes = {"head_dim": 64, "group": 2, "dtype": jnp.float32, "pool_dtype": jnp.float32, "scale": 1.0} | change
    q = jnp.zeros((2, sizes["group"], sizes["head_dim"]), sizes["dtype"])
    pool = jnp.zeros((1, 2, 16, sizes["head_dim"]), sizes["pool_dtype"])

    def attend(q, pool):
        plan = attention.plan(
            jnp.zeros((1, 1), jnp.int32), jnp.array([0, 2]), jnp.array([2]), num_tokens=2, num_kv_heads=1
        )
        return attention.paged_attention(q, pool, 0, plan, num_kv_heads=1, scale=sizes["scale"])

    with pytest.raises(NotImplementedError, match="use the reference"):
        jax.eval_shape(attend, q, pool)


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("tokens_per_row", [1, 2])
def test_float8_is_seen_in_the_memory_of_the_pool(tokens_per_row):
    """As XLA gets it: there is no array of float8, only pointers to it inside of kernels."""

    def step(qkv, rope, pool, rows, *ragged):
        plan = attention.plan(*ragged, num_tokens=20, num_kv_heads=2, tokens_per_row=tokens_per_row)
        sizes = {"num_kv_heads": 2, "head_dim": 64, "tokens_per_row": tokens_per_row}
        q, pool = rotary_triton.rotary_write_kv(qkv, rope, pool, 1, rows, **sizes)
        return attention.paged_attention(q, pool, 1, plan, num_kv_heads=2, scale=0.1), pool

    struct = jax.ShapeDtypeStruct
    arguments = (
        struct((20, 8 * 64), jnp.bfloat16),
        (struct((20, 32), jnp.float32),) * 2,
        struct((2, 2, 64 * PAGE_SIZE, 128), jnp.bfloat16),
        *(struct(shape, jnp.int32) for shape in ((20,), (3, 5), (4,), (3,))),
    )
    text = jax.jit(step, donate_argnums=2).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    assert len(calls) == 4
    # Those that write and read K and V; the last puts parts of outputs together.
    assert ["f8E4M3FN" in call for call in calls] == [tokens_per_row > 1] * 3 + [False]
    assert "f8E4M3FN" not in "".join(line for line in text.splitlines() if line not in calls)
    assert "bitcast_convert" not in text
