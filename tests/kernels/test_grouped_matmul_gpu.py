"""Products with packed weights on a GPU: the kernel against a float64 oracle."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_backend, grouped_matmul
from pallas_kernels.grouped_matmul.triton import most_rows
from slora_jax.engine.runner import compiler_options
from tests.kernels.test_grouped_matmul import BF16, CASES, F16, F32, ROUNDING, Product, check

pytestmark = pytest.mark.gpu

LARGE = {
    "7B qkv": Product(1, 4096, 12288, 128),
    "7B o, zeros": Product(16, 4096, 4096, 128, zeros=True),
    "7B down": Product(48, 11008, 4096, 128),
    "8B gate and up, zeros": Product(100, 4096, 28672, 128, zeros=True),
    "8B down, groups of 32": Product(128, 14336, 4096, 32, zeros=True),
    "8B qkv, by channel": Product(512, 4096, 6144, 4096),
    "SmolLM2, groups of 64": Product(300, 576, 1536, 64),
    "8B down, eight bits by channel": Product(1, 14336, 4096, 14336, bits=8),
    "8B down, eight bits, zeros": Product(200, 14336, 4096, 128, zeros=True, bits=8),
    "past the kernel": Product(1500, 1024, 1024, 128, zeros=True),
}


def run(rows: int, dtype):
    backend = choose_backend(jax.devices()[0], 128, jnp.dtype(dtype))
    product = partial(grouped_matmul, dtype=dtype, backend=backend)
    compiled = jax.jit(product, compiler_options=compiler_options(rows))

    def call(**inputs):
        # Leaves NaN in memory that the next outputs are likely to get.
        for _ in range(4):
            jnp.full(1 << 22, jnp.nan).block_until_ready()
        return compiled(**inputs)

    return call


def arrays(case: Product) -> dict:
    return {name: None if array is None else jnp.asarray(array) for name, array in case.build(0).items()}


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES | LARGE)))
def test_products_on_the_gpu(seed, name, dtype):
    case = replace((CASES | LARGE)[name], dtype=dtype)
    check(case, seed, run(case.rows, dtype), ROUNDING[dtype])


@pytest.mark.parametrize("rows", [1, 64, 512])
def test_a_result_does_not_depend_on_timing(rows):
    inputs = arrays(Product(rows, 4096, 4096, 128, dtype=BF16))
    call = run(rows, BF16)
    first = np.asarray(call(**inputs))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(call(**inputs)), first)


def test_the_kernel_is_part_of_the_program():
    """Up to the number of rows from which weights go through memory, and not beyond."""
    for rows in (1, most_rows(), most_rows() + 1):
        inputs = arrays(Product(rows, 512, 256, 128, dtype=BF16))
        text = jax.jit(partial(grouped_matmul, dtype=BF16, backend="triton")).lower(**inputs).compile().as_text()
        assert ("__gpu$xla.gpu.triton" in text) == (rows <= most_rows())
