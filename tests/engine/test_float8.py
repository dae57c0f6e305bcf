"""The KV cache in float8: against a float64 model that rounds K and V by a table; against itself in a small pool."""

import numpy as np
import pytest

from slora_jax.errors import InvalidRequest
from tests.helpers import oracles
from tests.helpers.engine_cases import forced_logits, greedy, make_engine, run
from tests.oracle import reference_numpy

FLOAT8 = {"kv_cache_dtype": "fp8"}


def rounded(values):
    return oracles.FLOAT8[oracles.nearest_float8(values)]


@pytest.mark.parametrize("number", [0, -1])
def test_logits_are_those_of_a_model_that_rounds_keys_and_values(case, number):
    request = case.requests[number]
    tokens = (request["prompt"] + request["tokens"])[:60]
    model = reference_numpy.load_model(case.model)
    lora = request["adapter"] and reference_numpy.load_adapter(case.adapters / request["adapter"])
    exact, expected = (reference_numpy.logits(model, tokens, lora, kept) for kept in (lambda x: x, rounded))
    actual = forced_logits(case.engine(**FLOAT8), tokens, request["adapter"])
    # Where float32 and float64 lie on two sides of the middle between two numbers, they round differently.
    error, effect = np.linalg.norm(actual - expected), np.linalg.norm(exact - expected)
    assert effect > 1e-3 * np.linalg.norm(exact), "the rounding is seen"
    assert error < 0.1 * effect


@pytest.mark.parametrize(
    "case",
    ["llama3_gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama1_mha", "smollm_gqa3"))],
    indirect=True,
)
def test_preemption_eviction_and_prefix_reuse_do_not_change_the_tokens(case):
    large = case.engine(**FLOAT8)
    page = large.pool_layout.page_tokens
    pages = {name: info.num_pages for name, info in large.adapters().items()}
    assert pages == {name: info.num_pages for name, info in case.engine().adapters().items()}
    expected = {}
    for request in case.requests:
        (result,) = run(large, large.submit(greedy(request["prompt"], request["adapter"], 40)))
        expected[request["id"]] = result.completions[0].token_ids
    needed = [-(-(len(r["prompt"]) + 40) // page) + pages.get(r["adapter"], 0) for r in case.requests]
    small = case.engine(pages=1 + max(needed), **FLOAT8)
    for _ in range(2):
        running = [small.submit(greedy(r["prompt"], r["adapter"], 40)) for r in case.requests]
        for request, result in zip(case.requests, run(small, *running), strict=True):
            assert result.completions[0].token_ids == expected[request["id"]], (request["id"], request["adapter"])
    assert small.stats()["evictions"] > 0


def test_a_prompt_is_found_again_by_whole_pages(tiny_case):
    engine = tiny_case.engine(**FLOAT8)
    prompt = list(range(10, 160))
    (first,) = run(engine, engine.submit(greedy(prompt, None, 4)))
    (again,) = run(engine, engine.submit(greedy(prompt, None, 4)))
    assert (first.cached_tokens, again.cached_tokens) == (0, 128)
    assert again.completions[0].token_ids == first.completions[0].token_ids


def test_a_page_has_the_bytes_it_had_and_holds_more_tokens(tiny_case):
    plain, float8 = (tiny_case.engine(pages=5, **options) for options in ({}, FLOAT8))
    assert plain.device.pool.array.nbytes == float8.device.pool.array.nbytes
    assert (plain.max_model_len, float8.max_model_len) == (4 * 16, 4 * 64)
    assert float8.capacity(None, 64).requests == 4 and plain.capacity(None, 64).requests == 1
    assert float8.capacity(None, 65).pages_each == 2


def test_what_rows_cannot_hold_is_refused_by_name(tmp_path):
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        "{model_type: llama, vocab_size: 97, hidden_size: 12, intermediate_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 256}"
    )
    with pytest.raises(InvalidRequest, match=r"6 elements on each device, .* leave kv_cache_dtype out"):
        make_engine(shape, dummy=True, **FLOAT8)
    assert make_engine(shape, dummy=True, dtype="bfloat16", **FLOAT8).pool_layout.page_tokens == 32
