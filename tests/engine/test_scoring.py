"""Log-probabilities of prompts' tokens, against a model in NumPy that is itself checked against transformers + PEFT."""

import numpy as np
import pytest

from slora_jax.errors import InvalidRequest
from slora_jax.request import MAX_LOGPROBS
from tests.helpers.engine_cases import greedy, make_engine, run
from tests.oracle import reference_numpy

MOST_SCORED = 60
"""The NumPy model takes a millisecond and more a token."""


def expected_logprobs(case, prompt, adapter) -> np.ndarray:
    """``[len(prompt), V]``: what comes after each token."""
    model = reference_numpy.load_model(case.model)
    lora = None if adapter is None else reference_numpy.load_adapter(case.adapters / adapter)
    logits = reference_numpy.logits(model, prompt, lora)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def check(result, case, prompt, adapter, top: int) -> None:
    first, *scored = result.prompt_logprobs
    assert first is None and [token.token_id for token in scored] == prompt[1:]
    for token, logprobs in zip(scored, expected_logprobs(case, prompt, adapter), strict=False):
        own = logprobs[token.token_id]
        np.testing.assert_allclose(token.logprob, own, atol=2e-4)
        # Two tokens may be so close that float32 has them the other way round.
        assert (logprobs > own + 1e-3).sum() < token.rank <= 1 + (logprobs > own - 1e-3).sum()
        assert len(token.top) == top
        np.testing.assert_allclose([value for _, value in token.top], np.sort(logprobs)[::-1][:top], atol=2e-4)
        np.testing.assert_allclose([value for _, value in token.top], logprobs[[i for i, _ in token.top]], atol=2e-4)


def test_prompts_of_a_mixed_batch_have_the_reference_models_log_probabilities(case):
    """In pieces of at most 32 tokens, each beside the answers of the others, which stay what they are."""
    engine = case.engine()
    wanted = [None, 0, 1, 3, MAX_LOGPROBS]
    requests = [(r, r["prompt"][:MOST_SCORED], wanted[i % 5]) for i, r in enumerate(case.requests)]
    generations = [
        engine.submit(greedy(r["prompt"] if top is None else prompt, r["adapter"], prompt_logprobs=top))
        for r, prompt, top in requests
    ]
    for (request, prompt, top), result in zip(requests, run(engine, *generations), strict=True):
        if top is None:
            assert result.prompt_logprobs is None
            assert list(result.completions[0].token_ids) == request["tokens"]
        else:
            check(result, case, prompt, request["adapter"], top)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_all_of_a_prompt_is_scored_when_it_is_cached_preempted_and_has_several_answers(tiny_case, prefix_cache):
    request = max(tiny_case.requests, key=lambda r: len(r["prompt"]))
    prompt, adapter = request["prompt"][:MOST_SCORED], request["adapter"]
    engine = tiny_case.engine(scheduler={"prefix_cache": prefix_cache, "max_batch_tokens": 24})
    run(engine, engine.submit(greedy(prompt, adapter, 4)))
    alone = run(engine, engine.submit(greedy(prompt, adapter, 4, prompt_logprobs=2, n=3)))[0]
    check(alone, tiny_case, prompt, adapter, 2)
    assert len({completion.token_ids for completion in alone.completions}) == 1
    # Pages for three of them: the others are preempted, when some of their prompt's tokens are scored already.
    pages = 1 + engine.adapters()[adapter].num_pages + 3 * -(-(len(prompt) + 64) // 16)
    small = tiny_case.engine(pages=pages, scheduler={"prefix_cache": prefix_cache, "max_batch_tokens": 24})
    submitted = [small.submit(greedy(prompt[i:], adapter, 64, prompt_logprobs=2)) for i in range(5)]
    results = run(small, *submitted)
    assert small.stats()["preemptions"] > 0
    check(results[0], tiny_case, prompt, adapter, 2)
    for i, result in enumerate(results):
        check(result, tiny_case, prompt[i:], adapter, 2)


def test_a_prompt_alone_is_read_to_the_end_of_the_context_and_nothing_is_answered(tiny_case):
    engine = tiny_case.engine(max_model_len=64)
    prompt = (tiny_case.requests[0]["prompt"] * 64)[:64]
    (result,) = run(engine, engine.submit(greedy(prompt, None, 0, prompt_logprobs=1, n=2)))
    check(result, tiny_case, prompt, None, 1)
    assert [(c.text, c.token_ids, c.finish_reason) for c in result.completions] == [("", (), "length")] * 2
    assert engine.stats()["generated_tokens"] == 0 and engine.stats()["pages_used"] == 0
    (short,) = run(engine, engine.submit(greedy(prompt[:1], None, 0, prompt_logprobs=1)))
    assert short.prompt_logprobs == (None,)
    for tokens, max_tokens in ((prompt * 2, 0), (prompt, 1)):
        with pytest.raises(InvalidRequest, match="64 including the output"):
            engine.submit(greedy(tokens, None, max_tokens))


def test_a_prompt_that_is_given_up_has_no_scores(tiny_case):
    engine = tiny_case.engine()
    generation = engine.submit(greedy(tiny_case.requests[0]["prompt"], prompt_logprobs=0))
    generation.cancel()
    (result,) = run(engine, generation)
    assert result.completions[0].finish_reason == "abort"
    assert result.prompt_logprobs is None


def test_after_a_fault_a_prompt_is_scored_anew(tiny_case, monkeypatch):
    engine = make_engine(tiny_case.model, tiny_case.adapters, scheduler={"max_batch_tokens": 16})
    start, steps = engine.device.runner.start, []

    def fail_once(step):
        steps.append(step)
        if len(steps) == 3:
            raise RuntimeError("out of memory")
        return start(step)

    monkeypatch.setattr(engine.device.runner, "start", fail_once)
    prompt = tiny_case.requests[0]["prompt"][:16]
    # The fault ends who is in the step; the other has been scored in part by then, and waits for its turn.
    longer = (prompt * 4)[:56]
    generations = [engine.submit(greedy(longer, prompt_logprobs=1, max_tokens=3)) for _ in range(3)]
    results = run(engine, *generations)
    assert engine.stats()["recoveries"] == 1
    ended = [result.completions[0].finish_reason for result in results]
    assert "error" in ended and "length" in ended
    for result in results:
        if result.completions[0].finish_reason == "length":
            check(result, tiny_case, longer, None, 1)
