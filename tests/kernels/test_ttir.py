"""XLA reads the intermediate representation that Triton writes: one's version must suit the other's."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Collectives,
    LoraSegments,
    ScaledProduct,
    add_norm_round,
    all_gather,
    all_reduce,
    all_reduce_norm,
    grouped_matmul,
    lora_delta,
    lora_receive,
    lora_send,
    paged_attention,
    plan_attention,
    plan_lora,
    rotary_write_kv,
    round_rows,
    silu_round,
)
from tests.helpers.ttir import kernels_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WIDTHS = ((512, 512),) * 3 + ((512, 512),)
POOL = jax.ShapeDtypeStruct((2, 2, 4096, 512), jnp.bfloat16)
_int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def names_of(function, *arguments) -> set[str]:
    """Of the kernels that a program calls, all of which can be read."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return {name for kernel in kernels_in(text) for name in re.findall(r"tt\.func public @(\w+)", kernel)}


def segments(rank_width: int) -> LoraSegments:
    return LoraSegments(
        _int32((9,)), _int32((9,)), _int32((64,)), *(_int32((8, 4)),) * 3, jax.ShapeDtypeStruct((8, 4), jnp.float32),
        active=(0, 1, 2, 3), max_rank=rank_width, total_rank=8 * rank_width,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [64, 2048])
def test_low_rank_updates_and_collectives(tokens):
    x = jax.ShapeDtypeStruct((tokens, 512), jnp.bfloat16)

    def alone(x, pool, adapters):
        plan = plan_lora(adapters, num_tokens=tokens, row_width=512, widths=WIDTHS, backend="triton")
        return lora_delta(x, pool, 1, plan, (0, 1, 2))

    def among(x, pool, adapters, table):
        group = Collectives(table, "tp", 2, 2**22)
        plan = plan_lora(adapters, num_tokens=tokens, row_width=512, widths=WIDTHS, backend="triton")
        for by_rank in (True, False):
            sent = lora_send(x, pool, 1, plan, (3,), group, by_rank=by_rank)
            y = x if by_rank else jnp.concatenate([x, x], 1)
            x = lora_receive(y, sent, pool, 1, plan, (3,), group)[:, :512]
        of_four = Collectives(table, "tp", 4, 2**22)
        x, _ = all_reduce_norm(x, x, x[0], 1e-5, group)
        return all_gather(all_reduce(x, group), 1, group), all_reduce_norm(
            all_reduce(x, of_four), x, x[0], 1e-5, of_four
        )

    assert names_of(alone, x, POOL, segments(16)) == {"_shrink_kernel", "_expand_kernel"}
    found = names_of(among, x, POOL, segments(16), _int32((1, 10)))
    least = {"_shrink_kernel", "_expand_kernel", "_all_reduce_kernel", "_all_reduce_norm_kernel", "_all_gather_kernel"}
    in_two = {"_all_reduce_in_two_kernel", "_all_reduce_norm_in_two_kernel"}
    # A sum of little goes in one exchange.
    assert found == least | (in_two if tokens == 2048 else set())


@pytest.mark.parametrize("tokens_per_row", [1, 2])
@pytest.mark.parametrize("decode_only", [True, False])
def test_attention_and_the_write(decode_only, tokens_per_row):
    def step(qkv, angles, pool, rows, pages, starts, lengths):
        sizes = {"num_kv_heads": 512 // 128, "head_dim": 128, "tokens_per_row": tokens_per_row}
        q, pool = rotary_write_kv(qkv, (angles, angles), pool, 1, rows, backend="triton", **sizes)
        plan = plan_attention(
            pages, starts, lengths, num_tokens=64, num_kv_heads=4, backend="triton",
            max_query_len=1 if decode_only else None, tokens_per_row=tokens_per_row,
        )  # fmt: skip
        return paged_attention(q, pool, 1, plan, num_kv_heads=4, scale=0.1), pool

    arguments = (
        jax.ShapeDtypeStruct((64, 512 * 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 64), jnp.float32),
        POOL,
        _int32((64,)),
        _int32((64, 32)),
        _int32((65,)),
        _int32((64,)),
    )
    kernels = {"_rotary_write_kernel", "_decode_kernel", "_combine_kernel"}
    assert names_of(step, *arguments) == kernels | (set() if decode_only else {"_tile_kernel"})


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (200, jnp.bfloat16), (8, jnp.float32)])
def test_products_with_packed_weights(rows, dtype, zeros):
    arguments = (
        jax.ShapeDtypeStruct((rows, 512), dtype),
        _int32((8, 320, 8)),
        jax.ShapeDtypeStruct((4, 320), jnp.float32),
        jax.ShapeDtypeStruct((4, 320), jnp.int8) if zeros else None,
    )
    product = partial(grouped_matmul, dtype=dtype, backend="triton")
    assert names_of(product, *arguments) == {"_grouped_matmul_kernel"}
    # Beyond, weights go through memory.
    many = (jax.ShapeDtypeStruct((1024, 512), dtype), *arguments[1:])
    assert names_of(product, *many) == set()


def test_rows_rounded_to_float8():
    struct, rope = jax.ShapeDtypeStruct, (jax.ShapeDtypeStruct((64, 32), jnp.float32),) * 2
    x, scale = struct((64, 512), jnp.bfloat16), struct((512,), jnp.float32)

    def layer(x, row_scale, column_scale, weight, rope, pool, rows):
        product = ScaledProduct(x, row_scale, column_scale, x)
        x, _, rounded = add_norm_round(x, product, weight, 1e-5, keeps_normed=False, backend="triton")
        gated = silu_round(product, dtype=jnp.dtype(jnp.bfloat16), keeps_activations=True, backend="triton")
        sizes = {"num_kv_heads": 2, "head_dim": 64, "tokens_per_row": 2}
        qkv = ScaledProduct(jnp.tile(x, (1, 2))[:, :512], row_scale, column_scale)
        return (
            rounded,
            gated,
            round_rows(x, backend="triton"),
            rotary_write_kv(qkv, rope, pool, 1, rows, backend="triton", **sizes),
        )

    pool = struct((2, 2, 4096, 128), jnp.bfloat16)
    row_scale, weight = struct((64,), jnp.float32), struct((512,), jnp.bfloat16)
    assert names_of(layer, x, row_scale, scale, weight, rope, pool, _int32((64,))) == {
        "_add_norm_round_kernel",
        "_silu_round_kernel",
        "_round_rows_kernel",
        "_rotary_write_kernel",
    }
