"""The Mosaic attention kernel without a GPU: interpreted, and lowered for CUDA."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import choose_backend, paged_attention, plan_attention
from pallas_kernels.paged_attention import hopper, mosaic_kernel, triton
from pallas_kernels.paged_attention.mosaic_kernel import QUERY_TILE, Sizes
from pallas_kernels.paged_attention.work import Tiles, cut_tiles
from pallas_kernels.pool import PAGE_SIZE
from tests.helpers import oracles
from tests.helpers.mosaic import kernels_in, text_of
from tests.helpers.triton_on_cpu import compiled
from tests.kernels.test_references import BFLOAT16, Attention, assert_close

HALF = np.dtype(np.float16)

INTERPRETED = {
    "grouped, chunks, several tiles a program": (
        Attention(((131, 150), (1, 40), (0, 5), (37, 69), (3, 200)), 4, 1, 64, BFLOAT16, padding=90),
        Sizes(128, 2, 3, 1),
    ),
    "multi-head, no padding": (Attention(((70, 290), (128, 128)), 2, 2, 64, HALF, padding=0), Sizes(64, 3, 1, 0)),
    "heads of 128, fewer tokens than a tile": (Attention(((20, 45), (1, 9)), 2, 1, 128, HALF), Sizes(64, 2, 7, 1)),
    "nothing but padding": (Attention(((0, 0), (0, 40)), 2, 2, 64, HALF, padding=4), Sizes(128, 2, 1, 1)),
}


@pytest.fixture
def strict_copies(monkeypatch):
    """The interpreter's TMA copies fail where they pass an array's end, instead of dropping what is there.

    On a GPU they would pass it unseen, as the kernel is lowered for longer arrays.
    """
    monkeypatch.setattr(gpu_callbacks.AsyncCopyGmemToSmemTask, "out_of_bounds_source_fill", None)
    monkeypatch.setattr(gpu_callbacks.AsyncCopySmemToGmemTask, "clips_out_of_bounds_destination", False)


@pytest.mark.usefixtures("strict_copies")
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


@pytest.mark.usefixtures("strict_copies")
def test_arrays_as_long_as_the_kernel_is_lowered_for():
    """What lies behind the batch is not used and not written, whatever the shapes say."""
    case, sizes = Attention(((131, 150), (1, 40), (30, 69)), 2, 1, 64, BFLOAT16, padding=0), Sizes(64, 2, 3, 1)
    q, pool, table, query_start, context_len = case.build(7)
    num_tokens = len(q)
    tiles = cut_tiles(jnp.asarray(query_start), jnp.asarray(context_len), num_tokens=num_tokens, size=QUERY_TILE)
    last_token, last_length, *_ = np.asarray(tiles.records)[int(tiles.count[0]) - 1]
    assert last_token + last_length == num_tokens and last_length < QUERY_TILE, "whose queries are read from further up"
    options = {"num_kv_heads": case.kv_heads, "scale": 0.3, "sizes": sizes, "interpret": plgpu.InterpretGPUParams()}
    expected = hopper.attend_tiles(*map(jnp.asarray, (q, pool)), case.layer, jnp.asarray(table), tiles, **options)

    operands = (
        np.pad(q, ((0, 600 - num_tokens), (0, 0), (0, 0)), constant_values=np.nan),
        pool.reshape(-1, pool.shape[3]),
        np.pad(table, ((0, 50), (0, 0)), constant_values=1 << 30),
        np.pad(tiles.records, ((0, 70), (0, 0)), constant_values=1 << 30),
        tiles.count,
        *(np.full(1, value, np.int32) for value in (case.layer, num_tokens)),
    )
    out = hopper.launch(*map(jnp.asarray, operands), num_rows=pool.shape[2], **options)

    assert out.shape == (600, *q.shape[1:])
    assert np.asarray(out[:num_tokens]).tobytes() == np.asarray(expected).tobytes()
    assert np.isnan(np.asarray(out[num_tokens:], np.float32)).all(), "nothing is written behind the batch"


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


integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def lowered(num_tokens, num_heads, num_kv_heads, head_dim, dtype, sizes, num_sequences=8, num_tiles=80, scale=0.1):
    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((2, 2, 1024 * PAGE_SIZE, num_kv_heads * head_dim), dtype)
    attend = partial(hopper.attend_tiles, num_kv_heads=num_kv_heads, scale=scale, sizes=sizes)
    tiles = Tiles(integers((num_tiles, 4)), integers((1,)), QUERY_TILE)
    traced = jax.jit(attend).trace(q, pool, integers(()), integers((num_sequences, 600)), tiles)
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("name", LOWERED)
def test_attention_lowers(name):
    num_tokens, num_heads, _, head_dim, dtype, _ = LOWERED[name]
    program = lowered(*LOWERED[name])
    assert len(kernels_in(program)) == 1
    assert program.out_info.shape == (max(num_tokens, 128), num_heads, head_dim) and program.out_info.dtype == dtype


def test_steps_of_all_sizes_share_one_kernel(monkeypatch):
    traced = []
    attend = mosaic_kernel.attend

    def count(q, *refs, **options):
        traced.append(q.shape)
        attend(q, *refs, **options)

    monkeypatch.setattr(mosaic_kernel, "attend", count)
    of_all = 8, 2, 128, jnp.bfloat16, Sizes(128, 2, 132, 1)
    steps = [(64, 1, 2), (300, 256, 259), (1024, 8, 17), (1024, 256, 265)]
    # No other test has this scale: nothing has lowered the kernel before.
    programs = [lowered(num_tokens, *of_all, *others, scale=0.123) for num_tokens, *others in steps]
    kernels = [kernel for program in programs for kernel in kernels_in(program)]
    assert len(traced) == 1
    assert len(kernels) == len(steps) and len({kernel.code for kernel in kernels}) == 1
    for (num_tokens, num_sequences, num_tiles), kernel, program in zip(steps, kernels, programs, strict=True):
        rows = max(num_tokens, QUERY_TILE)
        for operand in (f"{rows}x8x128xbf16", f"{num_sequences}x600xi32", f"{num_tiles}x4xi32"):
            assert f"tensor<{operand}>" in kernel.call
        assert f"dense<{rows}> : tensor<i32>" in program.as_text(), "the kernel is told how many rows there are"


def test_code_does_not_depend_on_lengths():
    """Only how arrays are described does, to TMA and to the compiler: nothing that is computed with."""

    def code(num_tokens, num_sequences, num_tiles):
        array = jax.ShapeDtypeStruct
        operands = (
            array((num_tokens, 8, 128), jnp.bfloat16),
            array((4096, 256), jnp.bfloat16),
            *map(integers, ((num_sequences, 600), (num_tiles, 4), (1,), (1,), (1,))),
        )
        launch = partial(hopper.launch, num_rows=1024, num_kv_heads=2, scale=0.1, sizes=Sizes(128, 2, 132, 1))
        (kernel,) = kernels_in(jax.jit(launch).trace(*operands).lower(lowering_platforms=("cuda",)))
        return text_of(kernel).splitlines()

    lines = list(zip(code(40_961, 24_577, 12_289), code(50_021, 31_013, 20_011), strict=True))
    different = {re.findall(r'"stable_mosaic_gpu\.([\w.]+)"|$', a)[0] for a, b in lines if a != b}
    assert different == {
        "builtin.unrealized_conversion_cast",
        "llvm.mlir.constant",
        "memref.expand_shape",
        "memref.extract_aligned_pointer_as_index",
        "memref.extract_strided_metadata",
        "memref.reinterpret_cast",
        "memref.subview",
        "memref.transpose",
    }


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_whole_batch_lowers():
    """The tiles in Mosaic, the decoding sequences in Triton, into one output."""
    pool = jax.ShapeDtypeStruct((2, 2, 1024 * PAGE_SIZE, 8 * 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((300, 32, 128), jnp.bfloat16)
    table, starts, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 64), (9,), (8,)))

    def attend(q, pool, *ragged):
        plan = plan_attention(*ragged, num_tokens=300, num_kv_heads=8, backend="hopper")
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
        plan_attention(*ragged, num_tokens=3, num_kv_heads=8, backend="hopper", tokens_per_row=2)


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
