"""The Triton LoRA kernels without a GPU: interpreted, and compiled for every supported generation."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_references import BFLOAT16, LORA, Adapters, assert_close
from triton_on_cpu import compiled, interpreted

from pallas_kernels.lora import triton as lora
from pallas_kernels.lora.api import LoraSegments

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = np.dtype(np.float16)

INTERPRETED = {
    **LORA,
    "grouped, chunks": Adapters(
        ((20, 20, 5), (7, 3, 40), (1, 2, 3)), (1, 20, 2), ((200, 200), (200, 64), (200, 64)), 64, before=2, after=3
    ),
    "a width of no power of two": Adapters(((20,), (7,)), (1, 5), ((576, 192),), 192),
    "one row a vector": Adapters(((9, 3), (5, 16), (0, 2)), (1, 6, 2), ((64, 48), (64, 64)), 64, before=2, after=1),
    "long segments": Adapters(((4, 9), (0, 3), (33, 17)), (300, 4, 230), ((64, 96), (64, 32)), 32, HALF, 3, 5),
}


@pytest.mark.skipif(INTERPRET, reason="is the outer process")
def test_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_lora_interpreted", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert f"{len(INTERPRETED)} passed" in result.stdout


@pytest.mark.skipif(not INTERPRET, reason="run by test_interpreted")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(INTERPRETED)))
def test_lora_interpreted(seed, name):
    case = INTERPRETED[name]
    if case.dtype == BFLOAT16 and case.input_dtype is None:
        case = dataclasses.replace(case, dtype=HALF)
    segments, pool, _ = case.build(seed)
    rng = np.random.default_rng(1000 + seed)
    modules = tuple(reversed(range(len(case.widths))))
    x = rng.normal(size=(case.num_tokens, case.widths[0][0])).astype(case.input_dtype or case.dtype)
    ys = tuple(rng.normal(size=(case.num_tokens, case.widths[m][1])).astype(x.dtype) for m in modules)
    expected_sums = oracles.shrink(x, pool, case.layer, segments, modules)
    # What a token without an adapter holds, or partial sums past a token's rank, must not matter.
    x[: case.before] = np.nan
    x[case.num_tokens - case.after :] = np.nan
    partial_sums = np.full(expected_sums.shape, np.nan, np.float32)
    for g in range(len(segments.rank)):
        own = slice(segments.token_start[g], segments.token_start[g + 1])
        for j, m in enumerate(modules):
            partial_sums[own, j, : segments.rank[g, m]] = expected_sums[own, j, : segments.rank[g, m]]
    expected = oracles.expand(np.nan_to_num(partial_sums), ys, pool, case.layer, segments, modules)

    with interpreted(lora):
        plan = lora.plan(segments, num_tokens=case.num_tokens, row_width=case.row_width, widths=case.widths)
        sums = lora.lora_shrink(x, pool, case.layer, plan, modules)
        outs = lora.lora_expand(jnp.asarray(partial_sums), tuple(map(jnp.asarray, ys)), pool, case.layer, plan, modules)
        fused = lora.lora_update(x, tuple(map(jnp.asarray, ys)), pool, case.layer, plan, modules)

    assert_close(sums, expected_sums)
    for out, wanted in zip(fused, oracles.expand(expected_sums, ys, pool, case.layer, segments, modules), strict=True):
        assert_close(out, wanted)
    for out, wanted, y in zip(outs, expected, ys, strict=True):
        assert out.dtype == y.dtype
        assert_close(out, wanted)
        np.testing.assert_array_equal(out[: case.before], y[: case.before])


COMPILED = {  # tokens, row width, module widths, largest rank, dtype of x and y, dtype of the pool
    "7B decode": (128, 4096, ((4096, 4096),) * 3, 64, jnp.bfloat16, jnp.bfloat16),
    "7B decode, small ranks": (128, 4096, ((4096, 4096),) * 3, 16, jnp.bfloat16, jnp.bfloat16),
    "7B prompts": (8192, 4096, ((4096, 4096),) * 3, 64, jnp.bfloat16, jnp.bfloat16),
    "8B decode": (64, 1024, ((4096, 4096), (4096, 1024), (4096, 1024)), 16, jnp.bfloat16, jnp.bfloat16),
    "13B": (64, 5120, ((5120, 13824), (5120, 13824)), 100, jnp.float16, jnp.float16),
    "SmolLM2 prompts, f32 inputs": (600, 192, ((576, 576), (576, 192)), 256, jnp.float32, jnp.bfloat16),
}


@pytest.mark.skipif(INTERPRET, reason="kernels that interpret cannot be compiled")
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_lora_compiles(name, capability, monkeypatch):
    num_tokens, width, widths, max_rank, dtype, pool_dtype = COMPILED[name]
    kind = {80: "NVIDIA A100-SXM4-40GB", 86: "NVIDIA A10G", 90: "NVIDIA H200"}[capability]
    monkeypatch.setattr(lora, "device_kind", lambda: kind)
    integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    by_module = integers((4, len(widths)))
    segments = LoraSegments(
        integers((5,)), integers((5,)), integers((40,)), by_module, by_module, by_module,
        jax.ShapeDtypeStruct(by_module.shape, jnp.float32), max_rank=max_rank, total_rank=4 * max_rank,
    )  # fmt: skip

    def step(x, ys, pool, segments):
        modules = tuple(range(len(widths)))
        plan = lora.plan(segments, num_tokens=num_tokens, row_width=width, widths=widths)
        sums = lora.lora_shrink(x, pool, 1, plan, modules)
        lora.lora_update(x, ys, pool, 1, plan, modules)
        return lora.lora_expand(sums, ys, pool, 1, plan, modules)

    with compiled(lora, capability) as kernels:
        ys = tuple(jax.ShapeDtypeStruct((num_tokens, d_out), dtype) for _, d_out in widths)
        x = jax.ShapeDtypeStruct((num_tokens, widths[0][0]), dtype)
        outs = jax.eval_shape(step, x, ys, jax.ShapeDtypeStruct((2, 2, 1024, width), pool_dtype), segments)

    assert outs == ys
    assert {"_shrink_kernel", "_expand_kernel"} <= {name for name, _ in kernels}
    shared_memory = {80: 163, 86: 99, 90: 227}[capability] * 1024
    assert all(code.metadata.shared <= shared_memory for _, code in kernels)


def test_ys_of_several_dtypes_are_not_supported():
    plan = lora.TritonLoraPlan(jnp.zeros((1, 2, 8), jnp.int32), jnp.zeros(1, jnp.int32), token_tile=16, max_rank=4)
    ys = (jnp.zeros((1, 8)), jnp.zeros((1, 8), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="use the reference"):
        lora.lora_expand(jnp.zeros((1, 2, 4)), ys, jnp.zeros((1, 2, 16, 8)), 0, plan, (0, 1))
