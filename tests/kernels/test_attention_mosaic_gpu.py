"""The Mosaic attention kernel on a Hopper GPU against float64 loops."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import hopper
from pallas_kernels.paged_attention.mosaic_kernel import QUERY_TILE, Sizes
from pallas_kernels.paged_attention.work import cut_tiles
from tests.helpers import oracles
from tests.kernels.test_attention_mosaic import in_tiles
from tests.kernels.test_attention_triton_gpu import MIXTURE, moved_far, poison
from tests.kernels.test_references import BFLOAT16, Attention, assert_close

pytestmark = pytest.mark.gpu

HALF = np.dtype(np.float16)
CASES = {
    # Every number of rows that a tile can end with, at any alignment.
    "lengths": Attention(tuple((2 + 3 * i, 2 + 3 * i + 29 * (i % 3)) for i in range(45)), 2, 1, 128, BFLOAT16),
    "128, 4 heads, bf16": Attention(MIXTURE, 8, 2, 128, BFLOAT16, padding=200),
    "128, 1 head, f16": Attention(MIXTURE, 4, 4, 128, HALF),
    "64, 8 heads, bf16": Attention(MIXTURE, 16, 2, 64, BFLOAT16, padding=0),
    "fewer tokens than a tile": Attention(((20, 45), (1, 9)), 4, 1, 128, BFLOAT16),
    "nothing but padding": Attention(((0, 0), (0, 40)), 4, 2, 128, BFLOAT16, padding=4),
    "a long context": Attention(((300, 20_000), (1, 40), (1000, 1000)), 4, 1, 128, BFLOAT16),
}
SIZES = {
    "tuned": None,
    "a tile at most for each program": Sizes(128, 2, 1000, 1),
    "many tiles a program": Sizes(128, 2, 3, 1),
    "no turns": Sizes(128, 2, 132, 0),
    "small blocks": Sizes(64, 4, 132, 1),
}


@pytest.fixture(autouse=True)
def only_on_hopper():
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")


@partial(jax.jit, static_argnames=("num_kv_heads", "scale", "sizes"))
def attend(q, pool, layer, page_table, query_start, context_len, *, num_kv_heads, scale, sizes=None):
    tiles = cut_tiles(query_start, context_len, num_tokens=q.shape[0], size=QUERY_TILE)
    options = {"num_kv_heads": num_kv_heads, "scale": scale, "sizes": sizes}
    out = hopper.attend_tiles(q, pool, layer, jnp.maximum(page_table, 0), tiles, **options)
    return out[: q.shape[0]], tiles


def check(case, seed, sizes=None, pool_of=lambda pool, table: (pool, table)):
    q, pool, *ragged = case.build(seed)
    options = {"num_kv_heads": case.kv_heads, "scale": 0.2}
    expected = oracles.attention(q, pool, case.layer, *ragged, **options)
    pool, ragged[0] = pool_of(pool, ragged[0])
    arguments = jnp.asarray(q), jnp.asarray(pool), jnp.int32(case.layer), *map(jnp.asarray, ragged)
    compiled = attend.lower(*arguments, **options, sizes=sizes).compile()
    poison()
    out, tiles = compiled(*arguments)
    out, written = np.asarray(out), in_tiles(tiles, len(q))
    assert out.dtype == q.dtype
    assert_close(out[written], expected[written])
    assert not out[ragged[1][-1] :].any(), "padding tokens give exactly 0"
    for _ in range(3):
        again, _ = compiled(*arguments)
        assert np.asarray(again)[written].tobytes() == out[written].tobytes()


@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES)))
def test_attention_on_the_gpu(seed, name):
    check(CASES[name], seed)


@pytest.mark.parametrize("name", ["128, 4 heads, bf16", "fewer tokens than a tile", "nothing but padding"])
def test_a_whole_batch_with_its_decoding_sequences(name):
    case = CASES[name]
    q, pool, *ragged = case.build(5)
    options = {"num_kv_heads": case.kv_heads, "scale": 0.2}

    @jax.jit
    def run(q, pool, *ragged):
        plan = hopper.plan(*ragged, num_tokens=q.shape[0], num_kv_heads=case.kv_heads)
        return hopper.paged_attention(q, pool, case.layer, plan, **options)

    poison()
    out = run(jnp.asarray(q), jnp.asarray(pool), *map(jnp.asarray, ragged))
    assert_close(out, oracles.attention(q, pool, case.layer, *ragged, **options))


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    check(CASES["128, 4 heads, bf16"], 0, SIZES[name])


@pytest.mark.parametrize("padding", [900, 0, 77])
def test_batches_of_several_lengths_share_a_kernel(padding):
    check(dataclasses.replace(CASES["128, 4 heads, bf16"], padding=padding), 3)


def test_a_pool_of_more_than_2_to_31_elements():
    case = Attention(((1, 700), (150, 400), (2, 30)), 8, 8, 128, BFLOAT16)

    check(case, 0, pool_of=partial(moved_far, 70_000))
