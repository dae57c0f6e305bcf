"""The pool's arithmetic against the paper's numbers and against a loop that knows only the docstring's formula."""

import numpy as np
import pytest

from slora_jax.config import PAGE_SIZE
from slora_jax.errors import InvalidRequest
from slora_jax.memory.layout import PoolLayout
from slora_jax.model.config import ModelConfig
from slora_jax.model.modules import MODULES, module_shapes
from slora_jax.model.shards import Shards

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


# Several devices.

# Query and KV heads of each device, None where it has an empty place.
HEADS = {
    # 4 query heads over 4 KV heads
    ("mha", 2): ([[0, 1], [2, 3]], [[0, 1], [2, 3]]),
    ("mha", 4): ([[0], [1], [2], [3]], [[0], [1], [2], [3]]),
    # 8 over 2
    ("gqa", 2): ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1]]),
    ("gqa", 4): ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [0], [1], [1]]),
    ("gqa", 8): ([[0], [1], [2], [3], [4], [5], [6], [7]], [[0], [0], [0], [0], [1], [1], [1], [1]]),
    # 9 over 3
    ("gqa3", 2): ([[0, 1, 2, 3, 4, 5], [6, 7, 8, None, None, None]], [[0, 1], [2, None]]),
    ("gqa3", 4): ([[0, 1, 2], [3, 4, 5], [6, 7, 8], [None] * 3], [[0], [1], [2], [None]]),
    ("gqa3", 8): (
        [[0, 1], [2, None], [3, 4], [5, None], [6, 7], [8, None], [None] * 2, [None] * 2],
        [[0], [0], [1], [1], [2], [2], [None], [None]],
    ),
}
MODELS = {
    "mha": ModelConfig(64, 24, 40, 2, 4, 4, 4),
    "gqa": ModelConfig(64, 24, 40, 2, 8, 2, 4),
    "gqa3": ModelConfig(64, 24, 40, 2, 9, 3, 4),
}


def columns_of(heads, head_dim=4):
    return [None if head is None else head * head_dim + i for head in heads for i in range(head_dim)]


def picked(vectors, columns):
    return np.stack([np.zeros(len(vectors)) if c is None else vectors[:, c] for c in columns], axis=1)


@pytest.mark.parametrize(("name", "count"), HEADS)
def test_each_device_gets_what_it_multiplies_with(name, count):
    model, (queries, kv_heads) = MODELS[name], HEADS[name, count]
    rng = np.random.default_rng(1)
    ranks = dict(zip(MODULES, (3, 1, 5, 4, 2, 8, 7), strict=True))
    layout = PoolLayout.for_model(model, count).adapter(ranks)
    shapes = module_shapes(model)
    weights = {
        (layer, m): (rng.standard_normal((r, shapes[m].d_in)), rng.standard_normal((shapes[m].d_out, r)))
        for layer in range(2)
        for m, r in ranks.items()
    }
    width = len(kv_heads[0]) * 4
    packed = layout.pack(weights, np.dtype(np.float64))
    assert packed.shape == (2, 2, layout.num_rows, count * width) == layout.packed_shape
    seen = 0
    for shard in range(count):
        entries = packed[..., shard * width : (shard + 1) * width].reshape(2, -1, width)
        ffn = [shard * (40 // count) + i for i in range(40 // count)]
        hidden = [shard * (24 // count) + i for i in range(24 // count)]
        q, kv = columns_of(queries[shard]), columns_of(kv_heads[shard])
        outputs = {"q": q, "k": kv, "v": kv, "o": hidden, "gate": ffn, "up": ffn, "down": hidden}
        for (layer, m), (a, b) in weights.items():
            if m in ("o", "down"):
                part_of_a = picked(a, q if m == "o" else ffn)
            else:
                # Ranks shard, shard + count, ...; a row of zeros where there is none.
                rows = -(-ranks[m] // count)
                part_of_a = np.zeros((rows, a.shape[1]))
                for i, rank in enumerate(range(shard, ranks[m], count)):
                    part_of_a[i] = a[rank]
            index = MODULES.index(m)
            for start, part in (
                (layout.start_a[index], part_of_a),
                (layout.start_b[index], picked(b.T, outputs[m])),
            ):
                chunks = -(-part.shape[1] // width)
                found = entries[layer, start : start + chunks * len(part)].reshape(chunks, len(part), width)
                matrix = found.swapaxes(0, 1).reshape(len(part), -1)
                np.testing.assert_array_equal(matrix[:, : part.shape[1]], part)
                assert not matrix[:, part.shape[1] :].any()
                seen += np.count_nonzero(part)
    assert seen == np.count_nonzero(packed), "nothing else is written"


def test_eight_devices_hold_an_eighth_of_an_adapter_each():
    ranks = dict.fromkeys(QKVO, 64)
    for model in (LLAMA_7B, LLAMA_8B):
        one, eight = (PoolLayout.for_model(model, count) for count in (1, 8))
        assert eight.row_width * 8 == one.row_width
        assert eight.adapter(ranks).num_entries == one.adapter(ranks).num_entries
        assert eight.page_bytes(2) * 8 == one.page_bytes(2)


def test_devices_without_heads_are_counted():
    idle = {key: Shards(MODELS[key[0]], key[1]).num_idle for key in HEADS}
    assert {key: count for key, count in idle.items() if count} == {("gqa3", 4): 1, ("gqa3", 8): 2}


@pytest.mark.parametrize("count", [0, 3, 5, 16])
def test_numbers_that_cannot_share_a_model_are_refused(count):
    with pytest.raises(InvalidRequest, match=r"choose tp from 1, 2, 4$"):
        PoolLayout.for_model(MODELS["mha"], count)
