"""OpenAI's ``best_of``: more completions are made than come back."""

from dataclasses import replace

import pytest

from slora_jax.api.app import create_app
from tests.api.test_app import complete, error
from tests.helpers.fake_engine import FakeEngine


class RankedEngine(FakeEngine):
    """The model finds an answer's tokens the likelier the nearer its index is to 2, and the earlier of two the more."""

    def _next(self, index, sequence, request):
        delta = super()._next(index, sequence, request)
        return delta._replace(logprobs=tuple(replace(t, logprob=-1.0 - abs(index - 2)) for t in delta.logprobs))


@pytest.fixture
def ranked(tmp_path):
    engine = RankedEngine(tmp_path / "model")
    engine.start()
    yield create_app(engine).test_client()
    engine.close()


def test_the_likeliest_of_several_come_back(ranked):
    every = complete(ranked, n=5, max_tokens=8, return_token_ids=True).get_json()["choices"]
    best = complete(ranked, n=3, best_of=5, max_tokens=8, return_token_ids=True, prompt=["hello", "hello"]).get_json()
    assert [choice["index"] for choice in best["choices"]] == list(range(6))
    for first in (0, 3):
        chosen = best["choices"][first : first + 3]
        assert [c["token_ids"] for c in chosen] == [every[i]["token_ids"] for i in (2, 1, 3)]
        assert [c["logprobs"] for c in chosen] == [None] * 3
    assert best["usage"]["completion_tokens"] == 2 * sum(len(choice["token_ids"]) for choice in every)
    (choice,) = complete(ranked, best_of=5, max_tokens=8, logprobs=1).get_json()["choices"]
    assert choice["text"] == every[2]["text"]
    assert set(choice["logprobs"]["token_logprobs"]) == {-1.0}


def test_best_of_n_is_all_of_them(ranked):
    plain, best = (complete(ranked, n=3, max_tokens=4, **f).get_json()["choices"] for f in ({}, {"best_of": 3}))
    assert plain == best
    assert complete(ranked, n=1, best_of=1, stream=True).status_code == 200
    error(complete(ranked, prompt=["x"] * 20, best_of=128), 400, None, "prompt")
