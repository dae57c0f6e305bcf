"""Tokens of a model on several devices are those of the oracle, and of one device."""

import itertools
import json

import numpy as np
import pytest

from slora_jax.adapters.synthetic import synthetic_weights
from slora_jax.model.modules import MODULES
from tests.helpers.engine_cases import FIXTURES, Case, greedy, make_dummy_engine, make_engine, run
from tests.helpers.quantized_folders import CONFIG, write

_LENGTH = 48

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("smollm_gqa3", 8),  # three KV heads: two devices for each, and two that only have their share of the MLP
        *(
            pytest.param(name, tp, marks=pytest.mark.slow)
            for name, tp in (
                ("llama1_mha", 2),
                ("llama1_mha", 4),  # a head each
                ("llama3_gqa", 2),  # a KV head and its four query heads each
                ("llama3_gqa", 4),  # more devices than KV heads
                ("llama3_gqa", 8),
                ("smollm_gqa3", 2),
                ("smollm_gqa3", 4),
            )
        ),
    ],
)
def test_a_mixed_batch_gives_the_oracles_tokens_in_a_pool_too_small_for_it(name, tp):
    # Ranks 1, 3, 4, 8, 16 and 33, and all seven modules.
    case = Case(FIXTURES / name)
    mesh = {"mesh": {"tp": tp}}
    pages = {name: info.num_pages for name, info in case.engine(**mesh).adapters().items()}
    needed = [-(-(len(r["prompt"]) + _LENGTH) // 16) + pages.get(r["adapter"], 0) for r in case.requests]
    engine = case.engine(pages=1 + max(needed), **mesh)
    generations = [engine.submit(greedy(r["prompt"], r["adapter"], _LENGTH)) for r in case.requests]
    # What one device scores as the reference model does; see tests/engine/test_scoring.py.
    generations.append(engine.submit(greedy(case.requests[0]["prompt"][:5], None, 0, prompt_logprobs=1)))
    *results, scored = run(engine, *generations)
    alone = case.engine()
    (expected,) = run(alone, alone.submit(greedy(case.requests[0]["prompt"][:5], None, 0, prompt_logprobs=1)))
    for ours, theirs in zip(scored.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert abs(ours.logprob - theirs.logprob) < 1e-4
    for request, result in zip(case.requests, results, strict=True):
        assert list(result.completions[0].token_ids) == request["tokens"][:_LENGTH], (request["id"], request["adapter"])
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["evictions"] > 0
    assert {shard.device.id for shard in engine.device.pool.array.addressable_shards} == set(range(tp))


@pytest.mark.parametrize("tp", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_kv_cache_in_float8_is_that_of_one_device(tp):
    case = Case(FIXTURES / "smollm_gqa3")
    answers = {}
    for number in (1, tp):
        engine = case.engine(kv_cache_dtype="fp8", mesh={"tp": number})
        running = [engine.submit(greedy(r["prompt"], r["adapter"], 24)) for r in case.requests]
        answers[number] = [result.completions[0].token_ids for result in run(engine, *running)]
    assert answers[1] == answers[tp]


@pytest.mark.slow
def test_eight_heads_on_eight_devices_sample_like_one(tmp_path):
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        "{model_type: llama, vocab_size: 97, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 8, num_key_value_heads: 8, max_position_embeddings: 256}"
    )
    answers = {}
    for tp in (1, 8):
        engine = make_dummy_engine(shape, tp, 5, 12)
        requests = [
            greedy(np.arange(1, 40) * (i + 1) % 97, adapter, 24, logprobs=1, **sampling)
            for i, adapter in enumerate((None, "r5", "r12"))
            for sampling in ({}, {"temperature": 0.8, "top_k": 20, "seed": 7, "presence_penalty": 0.3})
        ]
        answers[tp] = run(engine, *[engine.submit(request) for request in requests])
    for one, eight in zip(answers[1], answers[8], strict=True):
        assert one.completions[0].token_ids == eight.completions[0].token_ids
        pairs = zip(one.completions[0].logprobs, eight.completions[0].logprobs, strict=True)
        np.testing.assert_allclose(*zip(*((a.logprob, b.logprob) for a, b in pairs), strict=True), atol=1e-4)


def test_a_quantised_base_answers_on_four_devices_as_on_one(tmp_path):
    write(tmp_path / "awq", "awq")
    shape = tmp_path / "shape.yaml"
    shape.write_text(json.dumps(CONFIG))
    logprobs = {}
    for name, tp in itertools.product(("awq", "fp8", "plain"), (1, 4)):
        if name == "awq":
            engine = make_engine(tmp_path / "awq", pages=100, mesh={"tp": tp})
        else:
            engine = make_dummy_engine(shape, tp, quantization={"fp8": "fp8"}.get(name))
        packed = synthetic_weights(8, MODULES, engine.pool_layout, engine.dtype, seed=8)
        engine.register_loaded_adapter("r8", dict.fromkeys(MODULES, 8), packed, scale=4.0)
        # A step without adapters is another program.
        answers = [
            run(engine, engine.submit(greedy(range(1, 30), adapter, 1, prompt_logprobs=1)))[0]
            for adapter in ("r8", None)
        ]
        logprobs[name, tp] = np.array([[token.logprob for token in one.prompt_logprobs[1:]] for one in answers])
    for name in ("awq", "plain"):
        np.testing.assert_allclose(logprobs[name, 4], logprobs[name, 1], atol=1e-4)
    # Activations that the devices share out are rounded on each by the scale of its own part.
    apart, effect = (np.abs(logprobs["fp8", 4] - logprobs[other]).mean() for other in (("fp8", 1), ("plain", 1)))
    assert 0 < apart < 1.5 * effect
    assert effect < 0.02
