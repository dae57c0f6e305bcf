"""The pool's arithmetic against the paper's numbers and against a loop that knows only the docstring's formula."""

import numpy as np
import pytest

from slora_jax.config import PAGE_SIZE
from slora_jax.memory.layout import MODULES, PoolLayout, module_shapes
from slora_jax.model.config import ModelConfig

LLAMA_7B = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)
SMALL_GQA = ModelConfig(64, 24, 40, 2, 6, 2, 4)
QKVO = ("q", "k", "v", "o")


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_llama_7b_adapter_takes_the_papers_four_rows_per_rank(rank):
    layout = PoolLayout.for_model(LLAMA_7B).adapter(dict.fromkeys(QKVO, rank))
    assert layout.num_rows == 4 * rank
    assert max(layout.start_a[:4]) + rank <= 4 * rank, "A fills the K plane"
    assert min(layout.start_b[:4]) == 4 * rank, "B starts the V plane"


def test_llama_7b_token_costs_half_a_megabyte():
    assert PoolLayout.for_model(LLAMA_7B).page_bytes(2) == PAGE_SIZE * 524288


@pytest.mark.parametrize("rank", [1, 5, 16, 100, 256])
@pytest.mark.parametrize("modules", [QKVO, MODULES, ("q", "v"), ("down",)])
def test_adapter_costs_its_own_chunks_rounded_up_to_a_page(rank, modules):
    layout = PoolLayout.for_model(LLAMA_8B).adapter(dict.fromkeys(modules, rank))
    chunks = sum(-(-s.d_in // 1024) + -(-s.d_out // 1024) for m, s in module_shapes(LLAMA_8B).items() if m in modules)
    assert layout.num_entries == chunks * rank
    assert 2 * layout.num_rows - layout.num_entries < 2 * PAGE_SIZE


def test_pack_puts_every_element_where_the_docstring_says():
    rng = np.random.default_rng(0)
    ranks = {"q": 3, "k": 1, "v": 5, "gate": 2, "down": 4}
    pool = PoolLayout.for_model(SMALL_GQA)
    layout = pool.adapter(ranks)
    shapes = module_shapes(SMALL_GQA)
    weights = {
        (layer, m): (rng.standard_normal((r, shapes[m].d_in)), rng.standard_normal((shapes[m].d_out, r)))
        for layer in range(2)
        for m, r in ranks.items()
        if not (layer == 1 and m == "v")
    }
    weights[1, "q"] = (weights[1, "q"][0][:2], weights[1, "q"][1][:, :2])
    packed = layout.pack(weights, np.dtype(np.float64))
    assert packed.shape == (2, 2, layout.num_rows, 8)
    expected = np.zeros_like(packed)
    for (layer, m), (a, b) in weights.items():
        for matrix, start in ((a, layout.start_a[MODULES.index(m)]), (b.T, layout.start_b[MODULES.index(m)])):
            for i in range(matrix.shape[0]):
                for column in range(matrix.shape[1]):
                    entry = start + (column // 8) * ranks[m] + i
                    expected[layer, entry // layout.num_rows, entry % layout.num_rows, column % 8] = matrix[i, column]
    np.testing.assert_array_equal(packed, expected)
    assert np.count_nonzero(packed) == sum(a.size + b.size for a, b in weights.values()), "no element overwritten"
