"""The Triton LoRA kernels on a GPU against float64 oracles."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora.api import LoraSegments
from pallas_kernels.pool import PAGE_SIZE
from tests.kernels.test_references import BFLOAT16, LORA, Adapters, check_lora, jitted_update

pytestmark = pytest.mark.gpu

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
LLAMA_7B = ((4096, 4096),) * 3
LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 1024))
SMOLLM = ((576, 576), (576, 192), (576, 192))
CASES = {
    **LORA,
    "7B, distinct": Adapters(((64,) * 3, (16,) * 3, (8, 0, 3), (1,) * 3), (1,) * 4, LLAMA_7B, 4096, BFLOAT16, 1, 2),
    "7B, ranks to 16": Adapters(((16,) * 3, (1, 0, 3), (9,) * 3), (1, 20, 2), LLAMA_7B, 4096, BFLOAT16, 1, 2),
    "7B, shared": Adapters(((64,) * 3, (16, 5, 64), (9,) * 3), (2, 40, 3), LLAMA_7B, 4096, BFLOAT16, after=3),
    "7B down": Adapters(((16,), (33,), (8,)), (1, 5, 1), ((11008, 4096),), 4096, BFLOAT16),
    "8B, ranks to 256": Adapters(((256, 100, 7), (3, 255, 1)), (1, 18), LLAMA_8B, 1024, BFLOAT16, 2),
    "8B prompts": Adapters(((16,) * 3, (64, 20, 64), (8,) * 3), (400, 260, 1), LLAMA_8B, 1024, BFLOAT16, 5, 9),
    "8B prompts f16": Adapters(((16,) * 3, (64, 20, 64)), (600, 2), LLAMA_8B, 1024, HALF, 5, 9),
    "SmolLM2": Adapters(((16,) * 3, (4, 8, 0)), (1, 30), SMOLLM, 192, BFLOAT16),
    "SmolLM2 prompts f32": Adapters(((16,) * 3, (4, 8, 0)), (300, 300), SMOLLM, 192, SINGLE),
    "SmolLM2 prompts, f32 inputs": Adapters(
        ((100,) * 3, (4, 8, 0)), (500, 30), SMOLLM, 192, BFLOAT16, input_dtype=SINGLE
    ),
    "13B": Adapters(((16, 16), (40, 40)), (1, 3), ((5120, 13824), (5120, 13824)), 5120, BFLOAT16),
}


def poison():
    """Leaves NaN in memory that the next outputs are likely to get."""
    for _ in range(4):
        jnp.full(1 << 22, jnp.nan).block_until_ready()


def check(case, seed, in_pool=lambda pool, segments: (pool, segments)):
    def run(*arguments):
        poison()
        return jitted_update(*arguments)

    check_lora(case, seed, "triton", in_pool, run)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(CASES)))
def test_lora_on_the_gpu(seed, name):
    check(CASES[name], seed)


def test_a_pool_of_more_than_2_to_31_elements():
    shift = 35_000  # pages; in layer 1 the case then lies around element 2**31
    case = dataclasses.replace(CASES["8B prompts"], tokens=(30, 3, 1))

    def far(pool, segments: LoraSegments):
        empty = jnp.full((2, 2, shift * PAGE_SIZE, pool.shape[3]), jnp.nan, pool.dtype)
        large = jnp.concatenate([empty, jnp.asarray(pool)], axis=2)
        assert large.size > 2**31
        return large, dataclasses.replace(segments, pages=segments.pages + shift)

    check(case, 0, far)
