"""The Triton LoRA kernels without a GPU: interpreted, and compiled for every supported generation."""

import dataclasses
import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.lora import triton as lora
from pallas_kernels.lora.api import LoraSegments
from tests.helpers.triton_on_cpu import assert_interpreted, compiled, interpreted
from tests.kernels.test_references import BFLOAT16, LORA, Adapters, check_lora, update

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = np.dtype(np.float16)

INTERPRETED = {
    **LORA,
    "grouped, chunks": Adapters(
        ((20, 20, 5), (7, 3, 40), (1, 2, 3)), (1, 20, 2), ((200, 200), (200, 64), (200, 64)), 64, before=2, after=3
    ),
    "a width of no power of two": Adapters(((20,), (7,)), (1, 5), ((576, 192),), 192),
    "one row a vector": Adapters(((9, 3), (5, 16), (0, 2)), (1, 6, 2), ((64, 48), (64, 64)), 64, before=2, after=1),
    "prompts": Adapters(((4, 9), (0, 3), (33, 17)), (70, 4, 130), ((64, 96), (64, 32)), 32, HALF, 3, 5),
}


@pytest.mark.skipif(INTERPRET, reason="is the outer process")
def test_interpreted():
    assert_interpreted(__file__, "test_lora_interpreted", len(INTERPRETED))


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(INTERPRETED)))
def test_lora_interpreted(seed, name, monkeypatch):
    case = INTERPRETED[name]
    if case.dtype == BFLOAT16 and case.input_dtype is None:
        case = dataclasses.replace(case, dtype=HALF)

    # By the number of tokens, as without an interpreter, but of far fewer.
    kind = "decode" if case.num_tokens <= 100 else "prefill"

    def few_programs(op, device, _):
        sizes = tuning.block_sizes(op, device, kind)
        return sizes | {"programs": 7, "ranks": 8} if op == "lora_shrink" else sizes  # interpreted one by one

    monkeypatch.setattr(lora, "block_sizes", few_programs)
    outputs = None

    def run(*arguments):
        nonlocal outputs
        with interpreted(lora):
            outputs = outputs or update(*arguments)
        return outputs

    check_lora(case, seed, "triton", run=run)


@pytest.mark.parametrize(
    ("ones", "shared"),
    [(60, (2, 3, 17, 30)), (0, (8, 120)), (128, ()), (1, ()), (300, (2,) * 40 + (9,) * 10), (0, (512,) * 16)],
)
def test_no_program_is_left_with_much_more_work_than_the_others(ones, shared):
    ranks = np.array([64, 32, 16, 8])[np.arange(ones + len(shared)) % 4, None]
    token_start = np.cumsum([0, *(1,) * ones, *shared]).astype(np.int32)
    segments = LoraSegments(
        jnp.array(token_start), jnp.zeros_like(token_start), jnp.zeros(1, jnp.int32),
        *(jnp.array(np.broadcast_to(ranks, (len(ranks), 3)), jnp.int32),) * 3, jnp.ones((len(ranks), 3)),
        active=(0, 1, 2), max_rank=64, total_rank=64 * len(ranks),
    )  # fmt: skip
    plan = lora.plan(segments, num_tokens=max(token_start[-1], 1), row_width=64, widths=((64, 64),) * 3)
    rows, tile_rows, programs, most_splits = 2, 32, 100, 8
    shares = lora._share_out(plan, (0, 1, 2), rows, tile_rows, programs, most_splits)
    begins, splits, tile_cost = (np.asarray(a) for a in (shares.begins, shares.splits, shares.tile_cost))
    assert 1 <= splits[0] <= most_splits
    work, done = np.zeros(programs), []
    end_before = 0
    for tile, end in enumerate(np.asarray(shares.ends)):
        tokens, rank = int(plan.records[tile, 0, 1]), int(plan.records[tile, :, 2].sum())
        items = range(end_before, end, 1 if tokens == 1 else tile_cost[0])
        blocks = -(-rank // (rows if tokens == 1 else tile_rows)) if tokens else 0
        assert len(items) == (blocks if tokens == 1 else blocks * splits[0])
        for item in items:
            (program,) = np.flatnonzero((begins[:-1, 0] <= item) & (item < begins[1:, 0]))
            work[program] += 1 if tokens == 1 else tile_rows / rows / splits[0]
            assert begins[program, 1] <= tile, "a share begins in a tile of its own or one before"
            done.append(tile)
        end_before = end
    assert begins[0, 0] == 0 and begins[-1, 0] == end_before
    # One item more than the mean, of the largest.
    assert work.max() <= work.mean() + max(1, tile_rows / rows / splits[0])
    if ones and shared:
        assert work.max() <= 2.5 * work.mean()


COMPILED = {  # tokens, row width, module widths, largest rank, dtype of x and y, dtype of the pool
    "7B decode": (128, 4096, ((4096, 4096),) * 3, 64, jnp.bfloat16, jnp.bfloat16),
    "7B decode, small ranks": (128, 4096, ((4096, 4096),) * 3, 16, jnp.bfloat16, jnp.bfloat16),
    "7B prompts": (8192, 4096, ((4096, 4096),) * 3, 64, jnp.bfloat16, jnp.bfloat16),
    "8B decode": (64, 1024, ((4096, 4096), (4096, 1024), (4096, 1024)), 16, jnp.bfloat16, jnp.bfloat16),
    "13B": (64, 5120, ((5120, 13824), (5120, 13824)), 100, jnp.float16, jnp.float16),
    "SmolLM2 prompts, f32 inputs": (600, 192, ((576, 576), (576, 192)), 256, jnp.float32, jnp.bfloat16),
}


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.parametrize(
    ("name", "capability"), [*itertools.product(COMPILED, (80, 90)), ("8B decode", 86), ("7B prompts", 86)]
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_lora_compiles(name, capability, monkeypatch):
    num_tokens, width, widths, max_rank, dtype, pool_dtype = COMPILED[name]
    kind = {80: "NVIDIA A100-SXM4-40GB", 86: "NVIDIA A10G", 90: "NVIDIA H200"}[capability]
    monkeypatch.setattr(lora, "device_kind", lambda: kind)
    integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    by_module = integers((4, len(widths)))
    segments = LoraSegments(
        integers((5,)), integers((5,)), integers((40,)), by_module, by_module, by_module,
        jax.ShapeDtypeStruct(by_module.shape, jnp.float32),
        active=tuple(range(len(widths))), max_rank=max_rank, total_rank=4 * max_rank,
    )  # fmt: skip

    def step(x, pool, segments):
        modules = tuple(range(len(widths)))
        plan = lora.plan(segments, num_tokens=num_tokens, row_width=width, widths=widths)
        sums = lora.lora_shrink(x, pool, 1, plan, modules)
        return lora.lora_expand(sums, pool, 1, plan, modules, dtype), lora.lora_delta(x, pool, 1, plan, modules)

    with compiled(lora, capability) as kernels:
        x = jax.ShapeDtypeStruct((num_tokens, widths[0][0]), dtype)
        outs = jax.eval_shape(step, x, jax.ShapeDtypeStruct((2, 2, 1024, width), pool_dtype), segments)

    assert outs == (jax.ShapeDtypeStruct((num_tokens, sum(d_out for _, d_out in widths)), dtype),) * 2
    assert {"_shrink_kernel", "_expand_kernel"} <= {name for name, _ in kernels}
    shared_memory = {80: 163, 86: 99, 90: 227}[capability] * 1024
    assert all(code.metadata.shared <= shared_memory for _, code in kernels)
