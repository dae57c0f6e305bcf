"""Scores of prompts over HTTP: OpenAI's ``echo`` with ``logprobs``, and vLLM's ``prompt_logprobs``."""

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def post(client, route, **body):
    return client.post(route, json=body)


def complete(client, **body) -> dict:
    response = post(client, COMPLETIONS, **{"model": "base", "prompt": "hello by hello", "max_tokens": 0} | body)
    assert response.status_code == 200, response.text
    return response.get_json()


def test_a_prompt_alone_is_scored(client):
    """What evaluation harnesses send: the prompt's log-probabilities, and no answer."""
    answer = complete(client, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello by hello", "length")
    assert answer["usage"]["completion_tokens"] == 0 and "prompt_logprobs" not in choice
    shape = choice["logprobs"]
    assert "".join(shape["tokens"]) == "hello by hello"
    # The fake engine gives the i-th token, from 1, a log-probability of -i / 2.
    assert shape["token_logprobs"] == [None, *(-0.5 * i for i in range(1, len(shape["tokens"])))]
    assert shape["top_logprobs"][:2] == [None, {"!": -1.0, shape["tokens"][1]: -0.5}]
    lengths = [len(token) for token in shape["tokens"]]
    assert shape["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_scores_of_the_prompt_and_of_the_answer_make_one_list(client):
    body = complete(client, prompt=["hello", "hello by"], echo=True, logprobs=0, max_tokens=3, n=2)
    assert [choice["text"] for choice in body["choices"]] == ["hellobas", "helloas", "hello bybas", "hello byas"]
    for choice in body["choices"]:
        shape = choice["logprobs"]
        assert "".join(shape["tokens"]) == choice["text"]
        assert len(shape["token_logprobs"]) == len(shape["tokens"])
        assert shape["token_logprobs"][0] is None
        assert choice["text"][shape["text_offset"][-1] :] == shape["tokens"][-1]


def test_offsets_are_those_of_the_text_that_was_sent(client):
    (choice,) = complete(client, prompt="hello hello", truncate_prompt_tokens=2, echo=True, logprobs=0)["choices"]
    shape = choice["logprobs"]
    assert choice["text"] == "hello hello" and len(shape["tokens"]) == 2
    for token, offset in zip(shape["tokens"], shape["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_vllms_list_has_each_token_by_its_id_with_its_rank(client, engine):
    ids = engine.tokenizer.encode("hello by")
    (choice,) = complete(client, prompt=ids, prompt_logprobs=1, logprobs=None, max_tokens=2)["choices"]
    first, second, *_ = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    own = {"logprob": -0.5, "rank": 1, "decoded_token": engine.tokenizer.decode(ids[1:2])}
    assert second == {"0": {"logprob": -1.0, "rank": 1, "decoded_token": "!"}, str(ids[1]): own}
    assert len(choice["prompt_logprobs"]) == len(ids)


def test_each_list_has_as_many_of_the_likely_tokens_as_were_asked_of_it(client):
    (choice,) = complete(client, echo=True, logprobs=1, prompt_logprobs=3)["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2
    assert len(choice["prompt_logprobs"][1]) == 4
    (choice,) = complete(client, echo=True, logprobs=3, prompt_logprobs=0)["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 4
    assert len(choice["prompt_logprobs"][1]) == 1


def test_a_chat_is_scored_too(client):
    fields = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    body = post(client, CHAT, **fields, prompt_logprobs=0).get_json()
    assert body["prompt_logprobs"][0] is None and len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in post(client, CHAT, **fields).get_json()


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_no_scores_come_in_a_stream(client, route):
    prompt = {"prompt": "hello"} if route == COMPLETIONS else {"messages": [{"role": "user", "content": "hello"}]}
    response = post(client, route, model="base", **prompt, prompt_logprobs=1, stream=True)
    assert response.status_code == 400 and response.get_json()["error"]["param"] == "prompt_logprobs"
