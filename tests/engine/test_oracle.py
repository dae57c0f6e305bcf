"""The engine against transformers + PEFT: logits, tokens, mixed batches, merged weights, and a pool too small.

The expected values were made by ``tests/oracle/make_oracle.py``, which shares no code with the engine.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.engine_cases import FIXTURES, Case, forced_logits, greedy, make_engine, run
from tests.oracle import reference_numpy


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


def small_pool(case) -> int:
    """Pages, just enough for the hungriest request to run alone."""
    adapter_pages = {name: info.num_pages for name, info in case.engine().adapters().items()}
    return 1 + max(-(-(len(r["prompt"]) + 64) // 16) + adapter_pages.get(r["adapter"], 0) for r in case.requests)


def test_logits_agree_to_1e_4(case):
    expected = load_file(case.folder / "expected.safetensors")
    engine = case.engine()
    for request in case.requests:
        tokens = request["prompt"] + request["tokens"]
        ours = forced_logits(engine, tokens, request["adapter"])[request["logit_positions"]]
        assert relative_error(ours, expected[f"{request['id']}.logits"]) < 1e-4, request["id"]


def test_a_mixed_batch_gives_the_oracles_64_tokens(case):
    # All that a server on a CPU does, shapes that settle with the adapters that come included.
    engine = case.engine(few_shapes=False)
    generations = [engine.submit(greedy(r["prompt"], r["adapter"])) for r in case.requests]
    results = run(engine, *generations)
    for request, result in zip(case.requests, results, strict=True):
        assert list(result.completions[0].token_ids) == request["tokens"], (request["id"], request["adapter"])
    assert engine.stats()["pages_used"] == 0


def test_one_case_mixes_eight_requests_over_five_adapters_and_the_base():
    requests = Case(FIXTURES / "llama1_mha").requests
    adapters = {r["adapter"] for r in requests}
    assert len(requests) >= 8
    assert None in adapters
    assert len(adapters - {None}) >= 5


def test_each_request_alone_gives_the_same_tokens(case):
    engine = case.engine(pages=small_pool(case))
    for request in case.requests:
        (result,) = run(engine, engine.submit(greedy(request["prompt"], request["adapter"])))
        assert list(result.completions[0].token_ids) == request["tokens"], (request["id"], request["adapter"])


def test_log_probabilities_agree(case):
    expected = load_file(case.folder / "expected.safetensors")
    engine = case.engine(pages=small_pool(case))
    generations = [engine.submit(greedy(r["prompt"], r["adapter"], logprobs=2)) for r in case.requests]
    for request, result in zip(case.requests, run(engine, *generations), strict=True):
        logprobs = result.completions[0].logprobs
        top2 = expected[f"{request['id']}.top2_logits"] - expected[f"{request['id']}.logsumexp"][:, None]
        np.testing.assert_allclose([[value for _, value in p.top] for p in logprobs], top2, atol=2e-4)
        assert [p.logprob for p in logprobs] == [p.top[0][1] for p in logprobs], "greedy takes the most likely"


def merged_folder(case, adapter: str, target):
    """The case's model with one adapter added into its weights, as a plain Hugging Face folder."""
    shutil.copytree(case.model, target)
    for file in target.glob("model*.safetensors*"):
        file.unlink()
    weights = dict(reference_numpy.load_model(case.model).weights)
    for module, lora in reference_numpy.load_adapter(case.adapters / adapter).items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + lora.scaling * (lora.b @ lora.a)
    save_file(
        {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in weights.items()}, target / "model.safetensors"
    )
    return target


def test_an_adapter_equals_the_model_it_is_merged_into(case, tmp_path):
    for adapter in sorted({r["adapter"] for r in case.requests} - {None}):
        engine = make_engine(merged_folder(case, adapter, tmp_path / adapter), pages=small_pool(case))
        requests = [r for r in case.requests if r["adapter"] == adapter]
        results = run(engine, *(engine.submit(greedy(r["prompt"])) for r in requests))
        for request, result in zip(requests, results, strict=True):
            assert list(result.completions[0].token_ids) == request["tokens"], (request["id"], adapter)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_eviction_and_prefix_reuse_do_not_change_the_tokens(case, prefix_cache):
    engine = case.engine(pages=small_pool(case), scheduler={"prefix_cache": prefix_cache})
    for _ in range(2):
        generations = [engine.submit(greedy(r["prompt"], r["adapter"])) for r in case.requests]
        for request, result in zip(case.requests, run(engine, *generations), strict=True):
            assert list(result.completions[0].token_ids) == request["tokens"], (request["id"], request["adapter"])
    # Small enough to leave its prompt's pages in the pool for the second time.
    small = min((r for r in case.requests if len(r["prompt"]) > 16), key=lambda r: len(r["prompt"]))
    for _ in range(2):
        (result,) = run(engine, engine.submit(greedy(small["prompt"], small["adapter"])))
        assert list(result.completions[0].token_ids) == small["tokens"]
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["evictions"] > 0
    assert stats["adapter_loads"] > len(engine.adapters())
    assert (stats["cached_tokens"] > 0) == prefix_cache


def test_fixtures_hold_prompts_longer_than_a_chunk(case):
    expected = json.loads((case.folder / "expected.json").read_text())
    assert max(len(r["prompt"]) for r in expected["requests"]) > 2 * 32
