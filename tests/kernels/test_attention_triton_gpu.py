"""The Triton attention kernels on a GPU against float64 oracles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import rotary_triton
from pallas_kernels.paged_attention import triton as attention
from pallas_kernels.pool import PAGE_SIZE
from tests.helpers import oracles
from tests.kernels.test_references import BFLOAT16, ROTARY, Attention, Rotary, assert_close

pytestmark = pytest.mark.gpu

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
MIXTURE = ((1, 700), (150, 400), (1, 513), (0, 7), (130, 130), (1, 1), (16, 300))
DECODE = ((1, 1500), (1, 3), (0, 9), (1, 16), (1, 257))
CASES = {
    "64, 1 head, bf16": Attention(MIXTURE, 2, 2, 64, BFLOAT16),
    "64, 16 heads, f16": Attention(MIXTURE, 16, 1, 64, HALF),
    "80, 3 heads, f32": Attention(MIXTURE, 6, 2, 80, SINGLE),
    "80, 5 heads, bf16": Attention(MIXTURE, 5, 1, 80, BFLOAT16),
    "96, 1 head, f16": Attention(MIXTURE, 2, 2, 96, HALF),
    "96, 2 heads, bf16": Attention(MIXTURE, 2, 1, 96, BFLOAT16),
    "128, 4 heads, bf16": Attention(MIXTURE, 8, 2, 128, BFLOAT16, padding=200),
    "128, 1 head, f32": Attention(MIXTURE, 1, 1, 128, SINGLE),
    "128, f32 queries": Attention(MIXTURE, 2, 1, 128, BFLOAT16, SINGLE),
    "decode, 128, 1 head, bf16": Attention(DECODE, 32, 32, 128, BFLOAT16),
    "decode, 128, 4 heads, f16": Attention(DECODE, 8, 2, 128, HALF),
    "decode, 80, 16 heads, f32": Attention(DECODE, 16, 1, 80, SINGLE),
    "decode, 96, 7 heads, bf16": Attention(DECODE, 14, 2, 96, BFLOAT16),
    "float8, 64, 3 heads, bf16": Attention(MIXTURE, 9, 3, 64, BFLOAT16, float8=True),
    "float8, 80, 5 heads, f16": Attention(MIXTURE, 5, 1, 80, HALF, float8=True),
    "float8, 128, 4 heads, bf16": Attention(MIXTURE, 8, 2, 128, BFLOAT16, padding=200, float8=True),
    "float8, 128, 1 head, bf16": Attention(MIXTURE, 4, 4, 128, BFLOAT16, float8=True),
    "float8, 96, 2 heads, f32": Attention(MIXTURE, 2, 1, 96, SINGLE, float8=True),
    "decode, float8, 128, 1 head, bf16": Attention(DECODE, 32, 32, 128, BFLOAT16, float8=True),
    "decode, float8, 128, 4 heads, bf16": Attention(DECODE, 8, 2, 128, BFLOAT16, float8=True),
}


@partial(jax.jit, static_argnames=("layer", "num_kv_heads", "scale", "max_query_len", "tokens_per_row"))
def attend(
    q, pool, layer, page_table, query_start, context_len, *, num_kv_heads, scale, max_query_len=None, tokens_per_row=1
):
    sizes = {"num_tokens": q.shape[0], "max_query_len": max_query_len, "tokens_per_row": tokens_per_row}
    plan = attention.plan(page_table, query_start, context_len, num_kv_heads=num_kv_heads, **sizes)
    return attention.paged_attention(q, pool, layer, plan, num_kv_heads=num_kv_heads, scale=scale)


def poison():
    """Leaves NaN in memory that the next outputs are likely to get."""
    for _ in range(4):
        jnp.full(1 << 22, jnp.nan).block_until_ready()


def moved_far(num_pages, pool, table):
    """The first two layers of a case so many pages further on, so that in layer 1 it lies beyond element 2**31."""
    empty = jnp.full((2, 2, num_pages * PAGE_SIZE, pool.shape[3]), jnp.nan, pool.dtype)
    large = jnp.concatenate([empty, jnp.asarray(pool[:2])], axis=2)
    assert large.size > 2**31 and large[0].size > 2**31
    return large, table + num_pages


def check(case, seed, scale=0.2, pool_of=lambda pool, table: (pool, table)):
    q, pool, *ragged = case.build(seed)
    expected = case.expected(q, pool, *ragged, scale=scale)
    assert np.isfinite(expected).all()
    pool, ragged[0] = pool_of(pool, ragged[0])
    q, pool = jnp.asarray(q), jnp.asarray(pool)
    decode = max(n for n, _ in case.sequences) == 1
    options = {"num_kv_heads": case.kv_heads, "scale": scale, "max_query_len": 1 if decode else None}
    options["tokens_per_row"] = case.tokens_per_row
    poison()
    out = attend(q, pool, case.layer, *ragged, **options)
    assert out.dtype == q.dtype
    # Float32 sums of hundreds of terms, in another order than the oracle's.
    tolerance = {SINGLE: 1e-5}.get(np.dtype(q.dtype), 0.0)
    if tolerance:
        np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))
    else:
        assert_close(out, expected)
    assert not np.asarray(out[ragged[1][-1] :]).any(), "padding tokens give exactly 0"
    again = attend(q, pool, case.layer, *ragged, **options)
    assert np.asarray(out).tobytes() == np.asarray(again).tobytes()


@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES)))
def test_attention_on_the_gpu(seed, name):
    check(CASES[name], seed)


def test_a_context_of_131072():
    check(Attention(((1, 131072), (1, 40), (20, 131072)), 4, 1, 128, BFLOAT16), 0, scale=0.5)


def test_a_pool_of_more_than_2_to_31_elements():
    case = Attention(((1, 700), (150, 400), (1, 30)), 8, 8, 64, BFLOAT16)

    check(case, 0, pool_of=partial(moved_far, 140_000))


def test_a_pool_of_more_than_2_to_31_elements_with_float8():
    case = Attention(((1, 700), (150, 400), (1, 30)), 8, 8, 64, BFLOAT16, float8=True)

    check(case, 0, pool_of=partial(moved_far, 140_000))


def test_a_page_table_in_the_middle_of_a_buffer():
    case = CASES["128, 4 heads, bf16"]
    q, pool, *ragged = case.build(0)
    packed = np.concatenate([[0], *(array.reshape(-1) for array in ragged)]).astype(np.int32)

    @jax.jit
    def unpack_and_attend(packed, q, pool):
        arrays, offset = [], 1  # 4 bytes past an aligned address
        for array in ragged:
            arrays.append(packed[offset : offset + array.size].reshape(array.shape))
            offset += array.size
        return attend(q, pool, case.layer, *arrays, num_kv_heads=case.kv_heads, scale=0.2)

    expected = oracles.attention(q, pool, case.layer, *ragged, num_kv_heads=case.kv_heads, scale=0.2)
    assert_close(unpack_and_attend(packed, q, pool), expected)


ROTARY_ON_THE_GPU = {
    **ROTARY,
    "7B": Rotary(32, 32, 128, BFLOAT16, tokens=60),
    "8B": Rotary(32, 8, 128, BFLOAT16, tokens=60),
    "8B, float8": Rotary(32, 8, 128, BFLOAT16, tokens=100, float8=True),
}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(ROTARY_ON_THE_GPU)))
def test_rotary_write_on_the_gpu(seed, name):
    case = ROTARY_ON_THE_GPU[name]
    qkv, cos, sin, pool, rows = case.build(seed)
    sizes = {"num_kv_heads": case.kv_heads, "head_dim": case.depth, "tokens_per_row": case.tokens_per_row}
    write = partial(rotary_triton.rotary_write_kv, **sizes)
    arguments = jnp.asarray(qkv), (jnp.asarray(cos), jnp.asarray(sin)), jnp.asarray(pool), jnp.int32(1)
    compiled = jax.jit(write).lower(*arguments, rows).compile()
    poison()
    case.check(compiled(*arguments, rows), qkv, cos, sin, pool, rows)


def test_layers_write_and_attend_in_place():
    case = Attention(((1, 300), (40, 200), (1, 17), (2, 33)), 8, 4, 128, BFLOAT16)
    q, pool, *ragged = case.build(0)
    num_tokens, layers = q.shape[0], pool.shape[0]
    rows = np.concatenate([
        (table[: -(-length // PAGE_SIZE), None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)[length - count : length]
        for table, (count, length) in zip(ragged[0], case.sequences, strict=True)
    ] + [np.zeros(case.padding)]).astype(np.int32)  # fmt: skip
    angle = np.random.default_rng(2).uniform(0, 6, (num_tokens, 64))
    rope = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def qkv_of(q, numpy):
        q = q.reshape(num_tokens, -1)
        return numpy.concatenate([q, q[:, :512], -q[:, 512:]], axis=1)

    @jax.jit
    def run_layer(q, pool, layer, plan, rows, rope):
        q, pool = rotary_triton.rotary_write_kv(qkv_of(q, jnp), rope, pool, layer, rows, num_kv_heads=4, head_dim=128)
        return attention.paged_attention(q, pool, layer, plan, num_kv_heads=4, scale=0.1), pool

    @partial(jax.jit, donate_argnums=1)
    def step(q, pool, rope, rows, *ragged):
        plan = attention.plan(*ragged, num_tokens=num_tokens, num_kv_heads=4)
        outs = []
        for layer in range(layers):
            q, pool = run_layer(q, pool, np.int32(layer), plan, rows, rope)
            outs.append(q)
        return outs, pool

    pool = np.random.default_rng(1).normal(size=pool.shape).astype(BFLOAT16)
    q = np.nan_to_num(q.astype(np.float32)).astype(BFLOAT16)
    device_pool = jnp.asarray(pool)
    compiled = step.lower(q, device_pool, rope, rows, *ragged).compile()
    shape = f"bf16[{','.join(map(str, pool.shape))}]"
    copies = [line for line in compiled.as_text().splitlines() if shape in line and " copy" in line.partition("(")[0]]
    assert not copies
    address = device_pool.unsafe_buffer_pointer()
    outs, device_pool = compiled(q, device_pool, rope, rows, *ragged)
    assert device_pool.unsafe_buffer_pointer() == address

    real = slice(num_tokens - case.padding)
    own = np.setdiff1d(np.arange(pool.shape[2]), rows[num_tokens - case.padding :])
    for layer, out in enumerate(outs):
        queries, expected = oracles.rotary_write(
            qkv_of(np.asarray(q), np), *rope, pool, layer, rows, num_kv_heads=4, head_dim=128
        )
        actual = np.asarray(device_pool[layer])
        assert_close(actual[:, own], expected[layer][:, own])
        # From here on as the device rounded them.
        pool[layer] = actual
        queries = queries.astype(BFLOAT16)
        assert_close(out[real], oracles.attention(queries, pool, layer, *ragged, num_kv_heads=4, scale=0.1)[real])
        q = np.asarray(out)
