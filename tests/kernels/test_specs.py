"""The named shapes: what they say they move and compute, and that the arguments drawn from them mean what they say."""

from functools import partial

import jax
import numpy as np
import pytest

from pallas_kernels import PAGE_SIZE, grouped_matmul, lora_delta, paged_attention, plan_attention, plan_lora
from pallas_kernels.specs import ATTENTION, LORA, MATMUL, AttentionSpec, LoraSpec, MatmulSpec
from tests.helpers import oracles


def test_bytes_and_operations():
    spec = AttentionSpec(3, 2, 5, heads=4, kv_heads=2, head_dim=8)
    assert spec.bytes == 2 * (2 * 3 * 5 * 2 * 8 + 2 * 3 * 2 * 4 * 8)
    assert spec.flops == 3 * (4 + 5) * 4 * (2 * 8 + 2 * 8)
    float8 = AttentionSpec(3, 2, 5, heads=4, kv_heads=2, head_dim=8, float8=True)
    assert float8.bytes == 2 * 3 * 5 * 2 * 8 + 2 * 2 * 3 * 2 * 4 * 8
    spread = AttentionSpec(3, 2, 7, heads=4, kv_heads=2, head_dim=8, shortest=3)
    assert spread.contexts.tolist() == [3, 5, 7] and spread.bytes == spec.bytes and spread.flops == spec.flops
    lora = LoraSpec((4, 2), (1, 5), 4, widths=((16, 32), (16, 8)), row_width=16)
    assert lora.bytes == 2 * ((4 + 2) * (16 + 32 + 16 + 8) + 6 * (16 + 32 + 8))
    matmul = MatmulSpec(3, 256, 40, has_zeros=True)
    assert matmul.bytes == 128 * 40 + 2 * 40 * (4 + 1) + 2 * 3 * (256 + 40)
    assert matmul.flops == 2 * 3 * 256 * 40


@pytest.mark.parametrize(
    "name",
    [
        "attention-decode-gqa-4x32768",
        "attention-prefill-gqa-8192",
        "attention-decode-gqa-128x2048-float8",
        "attention-decode-gqa-480x900-float8",
    ],
)
def test_attention_specs(name):
    spec = ATTENTION[name].scaled(256)
    inputs = spec.build(3)
    assert len(np.unique(inputs.page_table)) == inputs.page_table.size and inputs.page_table.min() > 0
    assert inputs.page_table.max() < inputs.pool.shape[2] // PAGE_SIZE
    sizes = {"num_tokens": spec.num_tokens, "max_query_len": spec.queries, "tokens_per_row": spec.tokens_per_row}
    plan = plan_attention(*inputs[2:], **sizes, num_kv_heads=spec.kv_heads, backend="reference")
    out = jax.jit(partial(paged_attention, num_kv_heads=spec.kv_heads, scale=0.1), static_argnums=2)(
        inputs.qs[1].astype("float32"), inputs.pool, 1, plan
    )
    rows = oracles.rows_of_float8(np.asarray(inputs.pool)) if spec.float8 else inputs.pool
    page = PAGE_SIZE * spec.tokens_per_row
    expected = oracles.attention(inputs.qs[1], rows, 1, *inputs[2:], num_kv_heads=spec.kv_heads, scale=0.1, page=page)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["lora-decode-mixed", "lora-decode-r64-one", "lora-decode-8b-down", "lora-prefill-r16"]
)
def test_lora_specs(name):
    spec = LORA[name].scaled(32)
    (_, x, *_), pool, segments = spec.build(3)
    pages = np.asarray(segments.pages)
    assert sorted(pages) == list(range(1, pool.shape[2] // PAGE_SIZE)), "every page belongs to one adapter"
    modules = tuple(range(len(spec.widths)))
    plan = plan_lora(
        segments, num_tokens=spec.num_tokens, row_width=spec.row_width, widths=spec.widths, backend="reference"
    )
    out = jax.jit(lora_delta, static_argnums=(2, 4))(x.astype("float32"), pool.astype("float32"), 1, plan, modules)
    sums = oracles.shrink(x, pool, 1, segments, modules)
    expected = oracles.expand(sums, spec.widths, pool, 1, segments, modules)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["matmul-7b-o-16", "matmul-8b-down-zeros-1", "matmul-8b-down-groups-of-32-128", "matmul-8b-down-int8-1"]
)
def test_matmul_specs(name):
    spec = MATMUL[name].scaled(16)
    inputs = spec.build(3)
    assert all(len(of_all) == spec.layers for of_all in inputs)
    x, weights, scale, zero = (of_all[1] for of_all in inputs)
    out = grouped_matmul(x, weights, scale, zero, dtype=x.dtype, backend="reference")
    assert out.shape == (spec.rows, spec.d_out) and (zero is not None) == spec.has_zeros
    zero = 0 if zero is None else np.repeat(zero, spec.group, axis=0).astype(int)
    plain = (oracles.stored_integers(np.asarray(weights), spec.bits) - zero) * np.repeat(scale, spec.group, axis=0)
    expected = np.asarray(x, np.float64) @ plain
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=0.03 * np.abs(expected).max())
    assert 0.1 < np.std(expected) < 4
