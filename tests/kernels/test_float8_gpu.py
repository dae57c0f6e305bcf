"""Rows rounded to float8 on a GPU: the kernels against the oracle, and in a program as a step's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ScaledProduct, add_norm_round, round_rows, silu_round
from slora_jax.engine.runner import compiler_options
from tests.kernels.test_float8 import BF16, CASES, EPSILON, F16, F32, Rows, check_all

pytestmark = pytest.mark.gpu

LARGE = {
    "7B, one row": Rows(1, 4096, BF16, update=True),
    "7B": Rows(64, 11008, BF16),
    "8B": Rows(33, 14336, BF16, update=True),
    "70B": Rows(8, 28672, BF16),
    "f16": Rows(17, 5120, F16, update=True),
    "f32": Rows(17, 6656, F32, update=True),
}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES | LARGE)))
def test_kernels_on_the_gpu(seed, name):
    check_all((CASES | LARGE)[name], seed, "triton")


@pytest.mark.parametrize("rows", [2, 512])
def test_the_same_bits_in_a_compiled_step(rows):
    """What XLA puts around the kernels changes nothing, and they are parts of its program."""
    rng = np.random.default_rng(0)
    x, wide = (jnp.asarray(rng.standard_normal((rows, n)), jnp.bfloat16) for n in (4096, 8192))
    scales = [jnp.asarray(rng.uniform(0.5, 2, n), jnp.float32) for n in (rows, 4096, 8192)]

    def step(x, wide, of_rows, narrow, of_wide):
        term = ScaledProduct(x, of_rows, narrow)
        x, _, normed = add_norm_round(x, term, narrow, EPSILON, keeps_normed=False, backend="triton")
        gate_up = ScaledProduct(wide, of_rows, of_wide)
        _, gated = silu_round(gate_up, dtype=BF16, keeps_activations=False, backend="triton")
        return normed, gated, round_rows(x, backend="triton")

    compiled = jax.jit(step).lower(x, wide, *scales).compile(compiler_options(rows))
    assert compiled.as_text().count("__gpu$xla.gpu.triton") >= 3
    same = partial(jax.tree.map, lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)))
    first = compiled(x, wide, *scales)
    same(first, step(x, wide, *scales))
    for _ in range(3):
        same(first, compiled(x, wide, *scales))
