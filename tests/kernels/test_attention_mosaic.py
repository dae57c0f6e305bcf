"""The Mosaic attention kernel without a GPU: interpreted, and lowered for CUDA."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import choose_backend, paged_attention, plan_attention
from pallas_kernels.paged_attention import hopper, triton
from pallas_kernels.paged_attention.mosaic_kernel import QUERY_TILE, Sizes
from pallas_kernels.paged_attention.work import Tiles, cut_tiles
from pallas_kernels.pool import PAGE_SIZE
from tests.helpers import oracles
from tests.helpers.triton_on_cpu import compiled
from tests.kernels.test_references import BFLOAT16, Attention, assert_close

HALF = np.dtype(np.float16)

INTERPRETED = {
    "grouped, chunks, several tiles a program": (
        Attention(((131, 150), (1, 40), (0, 5), (37, 69), (3, 200)), 4, 1, 64, BFLOAT16, padding=90),
        Sizes(128, 2, 3, 1),
    ),
    "multi-head, no padding": (Attention(((70, 290), (128, 128)), 2, 2, 64, HALF, padding=0), Sizes(64, 3, 1, 0)),
    "heads of 128, fewer tokens than a tile": (Attention(((20, 45), (1, 9)), 2, 1, 128, HALF), Sizes(64, 2, 132, 1)),
    "nothing but padding": (Attention(((0, 0), (0, 40)), 2, 2, 64, HALF, padding=4), Sizes(128, 2, 1, 1)),
}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(INTERPRETED)))
def test_attention_interpreted(seed, name):
    case, sizes = INTERPRETED[name]
    q, pool, table, query_start, context_len = case.build(seed)
    options = {"num_kv_heads": case.kv_heads, "scale": 0.3}
    expected = oracles.attention(q, pool, case.layer, table, query_start, context_len, **options)
    ragged = jnp.asarray(query_start), jnp.asarray(context_len)
    tiles = cut_tiles(*ragged, num_tokens=len(q), size=QUERY_TILE)

    q, pool, table = map(jnp.asarray, (q, pool, table))
    options |= {"sizes": sizes, "interpret": plgpu.InterpretGPUParams()}
    out = hopper.attend_tiles(q, pool, case.layer, table, tiles, **options)

    assert out.dtype == q.dtype
    out = out[: len(q)]
    written = in_tiles(tiles, len(q))
    assert_close(out[written], expected[written])
    assert not np.asarray(out[query_start[-1] :]).any(), "padding tokens give exactly 0"
    assert np.isnan(np.asarray(out[~written], np.float32)).all(), "other tokens are not written"


def in_tiles(tiles, num_tokens):
    """Which tokens are in a tile; no token is in two."""
    count = np.zeros(num_tokens, int)
    for token, length, *_ in np.asarray(tiles.records)[: int(tiles.count[0])]:
        count[token : token + length] += 1
    assert count.max() == 1
    return count == 1


LOWERED = {  # tokens, query heads, KV heads, head size, dtype, sizes
    "8B": (8192, 32, 8, 128, jnp.bfloat16, None),
    "7B": (8192, 32, 32, 128, jnp.bfloat16, None),
    "few tokens": (37, 32, 8, 128, jnp.float16, None),
    "heads of 64, an odd number of tokens": (301, 6, 2, 64, jnp.bfloat16, None),
    "other sizes": (300, 8, 2, 128, jnp.float16, Sizes(64, 4, 10_000, 0)),
}


@pytest.mark.parametrize("name", LOWERED)
def test_attention_lowers(name):
    num_tokens, num_heads, num_kv_heads, head_dim, dtype, sizes = LOWERED[name]

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((2, 2, 1024 * PAGE_SIZE, num_kv_heads * head_dim), dtype)
    attend = partial(hopper.attend_tiles, num_kv_heads=num_kv_heads, scale=0.1, sizes=sizes)
    tiles = Tiles(integers(80, 4), integers(1), QUERY_TILE)
    traced = jax.jit(attend).trace(q, pool, integers(), integers(8, 600), tiles)
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (max(num_tokens, 128), *q.shape[1:]) and lowered.out_info.dtype == dtype


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_whole_batch_lowers():
    """The tiles in Mosaic, the decoding sequences in Triton, into one output."""
    pool = jax.ShapeDtypeStruct((2, 2, 1024 * PAGE_SIZE, 8 * 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((300, 32, 128), jnp.bfloat16)
    table, starts, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 64), (9,), (8,)))

    def attend(q, pool, *ragged):
        plan = plan_attention(*ragged, num_tokens=300, backend="hopper")
        return paged_attention(q, pool, 1, plan, num_kv_heads=8, scale=0.1)

    with compiled(triton, 90) as kernels:
        lowered = jax.jit(attend).trace(q, pool, table, starts, lengths).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert {name for name, _ in kernels} == {"_decode_kernel", "_combine_kernel"}


def device(platform, capability=None):
    return SimpleNamespace(platform=platform, compute_capability=capability, device_kind="a device")


def test_what_runs_where():
    bfloat16 = jnp.dtype(jnp.bfloat16)
    assert choose_backend(device("cpu"), 128, bfloat16) == "reference"
    assert choose_backend(device("gpu", "9.0"), 128, bfloat16) == "hopper"
    assert choose_backend(device("gpu", "9.0"), 80, bfloat16) == "triton"
    assert choose_backend(device("gpu", "9.0"), 128, jnp.dtype(jnp.float32)) == "triton"
    assert choose_backend(device("gpu", "10.0"), 128, bfloat16) == "triton"
    assert choose_backend(device("gpu", "8.0"), 64, bfloat16) == "triton"
    for capability in ("8.9", "9.0", "10.0"):
        assert choose_backend(device("gpu", capability), 128, bfloat16, tokens_per_row=2) == "triton"
    assert choose_backend(device("cpu"), 128, bfloat16, tokens_per_row=2) == "reference"
    with pytest.raises(NotImplementedError, match=r"a device has compute capability 8.6, and .*float8 came with 8.9"):
        choose_backend(device("gpu", "8.6"), 128, bfloat16, tokens_per_row=2)


def test_float8_is_for_another():
    ragged = jnp.zeros((1, 1), jnp.int32), jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="not in float8: use triton"):
        plan_attention(*ragged, num_tokens=3, backend="hopper", tokens_per_row=2)


@pytest.mark.parametrize(
    "change", [{"head_dim": 80}, {"dtype": jnp.float32}, {"pool_dtype": jnp.float16}, {"scale": 0}]
)
def test_what_only_others_do(change):
    sizes = {"head_dim": 64, "dtype": jnp.bfloat16, "pool_dtype": jnp.bfloat16, "scale": 1.0} | change
    q = jnp.zeros((2, 2, sizes["head_dim"]), sizes["dtype"])
    pool = jnp.zeros((1, 2, 16, sizes["head_dim"]), sizes["pool_dtype"])
    tiles = Tiles(jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32), QUERY_TILE)
    arguments = q, pool, 0, jnp.zeros((1, 1), jnp.int32), tiles
    with pytest.raises(NotImplementedError, match="the Mosaic kernel does head_dim 64 and 128"):
        hopper.attend_tiles(*arguments, num_kv_heads=1, scale=sizes["scale"])
